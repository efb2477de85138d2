"""A layout for codebooks: codes in the order in which a thread of a GPU gathers their entries.

A warp multiplies eight rows of runs at a time: lane 4 r + c gathers for row r and the c-th quarter of the inputs, and loads its
codes as words that lie together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch

from qcompile.dtypes import DTYPES
from qcompile.evaluate import CHUNK, Reader
from qcompile.expr import Expr, cast, k, n
from qcompile.format import Format, Packed, Problem, Stored
from qcompile.formats.codebook import Aqlm, Vptq, field
from qcompile.formats.higgs import Higgs

LANE = 128  # weights for which a lane has codes in a block, or a multiple
ROWS = 8  # rows of runs that a warp gathers at a time
TILES = 4  # such rows of a block, where runs lie along the inputs
WORDS = 4  # that a lane loads at once
SIZES = (2, 4, 8, 16)
SHORTEST = 16  # inputs that must share a scale: those of one instruction of a tensor core
MOST_BITS = 32  # of the codes of one run


@dataclass(frozen=True)
class Runs(Format):
    """W = scale * the sum over books of one entry each, or by * that sum + plus; entries are runs of `size` weights along `axis`.

    A run has T bits: the codes of all books (`widths` bits each), the first one's lowest, up to a multiple of size / 2. With
    s the denominator of T / size and Q = s T / size, blocks are [32, 128 s] where runs lie along k, [8 size, 512 s / size] where
    they lie along n.

    codes i32 [blocks of N, blocks of K, Q, 128]: lane 4 r + c of 32 has the four words from 4 (4 r + c) on, Q times, which are
    one stream of its 128 s / size runs. Along n these are run r at the c-th quarter of the inputs; along k outputs r,
    r + 8, r + 16 and r + 24, each at the c-th quarter of every `span` inputs. entries (`dtype`) [all books' 2 ** width,
    size]; scales (`scale`) [K // group, N], one row where `group` is 0, none where `scale` is ""; by and plus (`dtype`) [K]
    where `norm`. Codes beyond N or K are 0. The arithmetic is float32.
    """

    kind: ClassVar[str] = "runs"
    axis: Literal["n", "k"] = "k"
    size: int = 8
    widths: tuple[int, ...] = (16,)
    dtype: str = "f16"
    scale: str = ""
    group: int = 0
    norm: bool = False

    @property
    def total(self) -> int:
        """The bits of a run: those of its codes, and so many more that a lane has whole words for 256 weights or fewer."""
        half = max(self.size // 2, 1)
        return -(-sum(self.widths) // half) * half

    @property
    def loads(self) -> int:
        """How often a lane loads four words in a block."""
        return Fraction(self.total, self.size).numerator

    @property
    def lane(self) -> int:
        """The runs of a lane in a block."""
        return LANE * Fraction(self.total, self.size).denominator // self.size

    @property
    def outputs(self) -> int:
        """Those of a block."""
        return ROWS * (TILES if self.axis == "k" else self.size)

    @property
    def inputs(self) -> int:
        """Those of a block."""
        return 4 * self.lane * self.size // TILES if self.axis == "k" else 4 * self.lane

    @property
    def span(self) -> int:
        """The inputs of a block that share scales."""
        return math.gcd(self.inputs, self.group)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the entries of each book begin."""
        return tuple(sum(1 << width for width in self.widths[:book]) for book in range(len(self.widths)))

    def blocks(self, N: int, K: int) -> tuple[int, int]:
        return -(-N // self.outputs), -(-K // self.inputs)

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        out = [
            Stored("codes", "i32", (*self.blocks(N, K), self.loads, 32 * WORDS)),
            Stored("entries", self.dtype, (sum(1 << width for width in self.widths), self.size)),
        ]
        if self.scale:
            out.append(Stored("scales", self.scale, (K // (self.group or K), N)))
        return (*out, *(Stored(name, self.dtype, (K,)) for name in ("by", "plus") if self.norm))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        at = k % self.inputs
        if self.axis == "k":
            quarter, each = self.span // 4, self.lane // TILES
            row, lane, inside = n % ROWS, at % self.span // quarter, k % self.size
            run = n % self.outputs // ROWS * each + at // self.span * (quarter // self.size) + at % quarter // self.size
        else:
            row, lane, inside = n // self.size % ROWS, at // self.lane, n % self.size
            run = at % self.lane

        def word(i: Expr) -> Expr:
            found: Expr = t.codes[n // self.outputs, k // self.inputs, i // WORDS, (row * 4 + lane) * WORDS + i % WORDS]
            return found

        unit, out, low = self._unit, dict[str, Expr](), 0
        for book, width in enumerate(self.widths):
            out[f"code{book}"] = code = field(word, run * self.total + low, width, unit)
            out[f"entry{book}"] = t.entries[code + self.starts[book], inside]
            low += width
        if self.scale:
            out["scale"] = t.scales[k // (self.group or K), n]
        return out | ({"by": t.by[k], "plus": t.plus[k]} if self.norm else {})

    @property
    def _unit(self) -> int:
        """Pieces of a code that never straddle two words."""
        return 32 if 32 % self.total == 0 else math.gcd(32, self.total, *self.widths)

    def value(self, f: Any) -> Expr:
        total = cast("f32", f.entry0)
        for book in range(1, len(self.widths)):
            total = total + cast("f32", f.get(f"entry{book}"))
        if self.scale:
            total = total * cast("f32", f.scale)
        return total * cast("f32", f.by) + cast("f32", f.plus) if self.norm else total

    def check(self, N: int, K: int) -> list[Problem]:
        if found := self.problem(K):
            return [Problem(found, "runs that a lane can gather")]
        return []

    def problem(self, K: int) -> str:
        """Why there is no such layout of a weight with K inputs; empty when there is."""
        if self.size not in SIZES or (self.axis == "n" and self.size < TILES):
            return f"runs of {self.size} weights"
        if not self.widths or min(self.widths) < 1 or self.total > MOST_BITS:
            return f"codes of {self.total} bits"
        if DTYPES[self.dtype].itemsize != 2:
            return f"entries of {self.dtype}"
        if self.axis == "k" and K % self.size:
            return f"K = {K}, no multiple of {self.size}"
        if self.group and (K % self.group or self.axis == "n" or self.span < max(SHORTEST, 4 * self.size)):
            return f"scales of {self.group} inputs"
        return ""


_NAMES: dict[type[Format], dict[str, str]] = {
    Aqlm: {},
    Higgs: {"pair": "code0", "point": "entry0"},
    Vptq: {
        "index": "code0",
        "residual_index": "code1",
        "residual": "entry1",
        "entry": "entry0",
        "scale": "by",
        "bias": "plus",
    },
}
"""What the layout calls the fields of a format, where it calls them otherwise."""

CODEBOOKS = tuple(_NAMES)
"""The formats that may have this layout."""

_BOOKS = {Aqlm: ("codebooks",), Higgs: ("tables2",), Vptq: ("centroids", "res_centroids")}
"""The tensors of a format that hold entries, in the order of the layout's."""


def runs_form(format: Format, N: int, K: int) -> Runs | str:
    """The layout that `runs_for` gives a weight [N, K], or the reason why it gives none, from the format alone."""
    match format:
        case Aqlm():
            if format.rows != 1:
                return f"entries of {format.rows} x {format.columns} weights"
            made = Runs("k", format.columns, (format.width,) * format.books, format.dtype, format.scale)
        case Higgs():
            made = Runs("k", 2, (2 * format.bits,), format.dtype, format.dtype, format.group)
        case Vptq():
            if format.outliers or format.groups > 1:
                return f"{format.outliers} columns with outliers, {format.groups} groups"
            widths = tuple(filter(None, format.index_bits))
            made = Runs("n", format.vector, widths, format.dtype, norm=format.norm)
        case _:
            return f"a weight of format '{format.kind}' has no codebook of runs"
    return made.problem(K) or made


def runs_for(packed: Packed) -> Packed | str:
    """The weight in this layout, dequantized equal bit for bit; or the reason why it has none."""
    layout = runs_form(packed.format, packed.N, packed.K)
    if isinstance(layout, str):
        return layout
    given, books = packed.tensors, [name for name in _BOOKS[type(packed.format)] if name in packed.tensors]
    entries = torch.zeros(layout.stored(packed.N, packed.K)[1].shape, dtype=DTYPES[layout.dtype])
    for name, start in zip(books, layout.starts, strict=False):
        part = given[name].reshape(-1, layout.size)
        entries[start : start + len(part)] = part
    made = {"codes": _codes(layout, packed), "entries": entries}
    if layout.scale:
        made["scales"] = given["scales"].reshape(packed.N, -1).t().contiguous()
    if layout.norm:
        made |= {"by": given["scale"], "plus": given["bias"]}
    return Packed(layout, made, packed.N, packed.K)


def _codes(layout: Runs, packed: Packed) -> torch.Tensor:
    """The stored codes."""
    located, named = packed.format.located(packed.N, packed.K), _NAMES[type(packed.format)]
    fields = {named.get(name, name): expr for name, expr in located.items()}
    down, along = (1, layout.size) if layout.axis == "k" else (layout.size, 1)
    columns, (blocks, steps) = torch.arange(0, packed.K, along), layout.blocks(packed.N, packed.K)
    each, out = max(1, CHUNK * 4 // (steps * layout.inputs * layout.outputs)), []
    for first in range(0, blocks, each):
        count = min(each, blocks - first)
        rows = torch.arange(first * layout.outputs, min((first + count) * layout.outputs, packed.N), down)
        reader, low = Reader(packed.tensors, rows, columns), 0
        runs = torch.zeros(count * layout.outputs // down, steps * layout.inputs // along, dtype=torch.int64)
        for book, width in enumerate(layout.widths):
            runs[: len(rows), : len(columns)] |= reader(fields[f"code{book}"]).long() << low
            low += width
        out.append(_words(layout, runs))
    return torch.cat(out)


def _words(layout: Runs, runs: torch.Tensor) -> torch.Tensor:
    """The stored codes of whole blocks, from the codes of their runs i64 [rows of runs, runs along the inputs]."""
    quarter = layout.span // 4 // (layout.size if layout.axis == "k" else 1)
    lanes = runs.reshape(
        -1, layout.outputs // ROWS if layout.axis == "k" else 1, ROWS, runs.shape[1] // quarter // 4, 4, quarter
    )
    steps = runs.shape[1] * (layout.size if layout.axis == "k" else 1) // layout.inputs
    lanes = lanes.reshape(*lanes.shape[:3], steps, -1, 4, quarter).permute(0, 3, 2, 5, 1, 4, 6)
    unit = math.gcd(layout.total, 32)
    parts = [lanes.reshape(-1, layout.lane) >> low & (1 << unit) - 1 for low in range(0, layout.total, unit)]
    words = torch.stack(parts, -1).reshape(-1, 32 // unit)
    whole = sum((words[:, i] << unit * i for i in range(words.shape[1])), torch.zeros(1, dtype=torch.int64))
    whole = whole.reshape(-1, steps, 32, layout.loads, WORDS).transpose(2, 3)
    return whole.reshape(-1, steps, layout.loads, 32 * WORDS).to(torch.int32)


def from_runs(layout: Packed, rows: torch.Tensor, format: Format) -> dict[str, torch.Tensor]:
    """The stored tensors of `format`, from which some `rows` of a weight in this layout, i64, were made."""
    from qcompile.pack import pack

    assert isinstance(layout.format, Runs)
    N, K, given, named = len(rows), layout.K, layout.tensors, _NAMES[type(format)]
    located, reader = layout.format.located(layout.N, K), Reader(given, rows, torch.arange(K))
    made = {name: reader(located[named.get(name, name)]).expand(N, K) for name in format.located(N, K)}
    shapes = {stored.name: stored.shape for stored in format.stored(N, K)}
    books = [name for name in _BOOKS[type(format)] if name in shapes]
    # Entries that no code names are not among the fields.
    exact = {}
    for name, start in zip(books, layout.format.starts, strict=False):
        exact[name] = given["entries"][start:].reshape(-1)[: math.prod(shapes[name])].reshape(shapes[name]).clone()
    return {**pack(format, made, N, K), **exact}
