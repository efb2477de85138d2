"""Writes stored tensors: walks the address of each field backwards, scattering where decoding gathers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qcompile.dtypes import DTYPES, itemsize
from qcompile.errors import ConfigError, InternalError
from qcompile.evaluate import Reader, row_chunks
from qcompile.expr import FLOATS, Expr, const, walk
from qcompile.format import Format, Stored
from qcompile.simplify import Simplifier, coordinates

Tensors = Mapping[str, torch.Tensor]


def unpack(format: Format, tensors: Tensors, N: int, K: int) -> dict[str, torch.Tensor]:
    """Every field as a tensor [N, K]: codes, integer zeros and indices i32, scales and other floats as stored."""
    parts: dict[str, list[torch.Tensor]] = {}
    simple = Simplifier(coordinates(N, K))
    located = {name: simple(expr) for name, expr in format.located(N, K).items()}
    for rows in row_chunks(N, K):
        reader = Reader(tensors, rows, torch.arange(K))
        for name, expr in located.items():
            parts.setdefault(name, []).append(reader(expr).expand(len(rows), K))
    return {name: torch.cat(part) for name, part in parts.items()}


def pack(format: Format, fields: Tensors, N: int, K: int) -> dict[str, torch.Tensor]:
    """The stored tensors that hold these fields, each broadcast to [N, K]; bits that hold no field are 0.

    Floats are rounded to the stored dtype. ConfigError when a field does not fit: an integer out of range, or two
    values where the format keeps one for a whole group.
    """
    for problem in format.check(N, K):
        raise ConfigError(
            f"format '{format.kind}' cannot hold a weight [{N}, {K}]", found=problem.found, expected=problem.expected
        )
    located = format.located(N, K)
    if fields.keys() != located.keys():
        have, want = ", ".join(sorted(fields)), ", ".join(sorted(located))
        raise ConfigError(f"format '{format.kind}' has other fields", found=have, expected=want)
    stored = {s.name: s for s in format.stored(N, K)}
    simple = Simplifier(coordinates(N, K))
    pieces = [piece for name, expr in located.items() for piece in _pieces(name, expr, stored, simple)]
    fields = {name: field.expand(N, K) for name, field in fields.items()}
    done: dict[str, torch.Tensor] = {}
    while missing := [s for s in stored.values() if s.name not in done]:
        ready = [s for s in missing if all(piece.needs <= done.keys() for piece in pieces if piece.tensor is s)]
        if not ready:
            names = ", ".join(s.name for s in missing)
            raise InternalError(f"the addresses of format '{format.kind}' need each other", found=names)
        for s in ready:
            done[s.name] = _fill(s, [piece for piece in pieces if piece.tensor is s], fields, done, simple)
    _verify(format, done, {name: simple(expr) for name, expr in located.items()}, fields)
    return done


@dataclass(frozen=True)
class _Piece:
    """Bits [low, low + width) of a field's integer less `less`: they lie at `shift` in the element that `load` reads.

    A float field's integer is its bits as `dtype`. `added` was added to the stored word before its bits were taken.
    """

    field: str
    tensor: Stored
    load: Expr
    shift: Expr
    width: int
    low: int
    less: int
    added: int
    dtype: str | None

    @property
    def needs(self) -> set[str]:
        """The stored tensors that the address itself reads."""
        return {node.attr[0] for index in self.load.args for node in walk(index) if node.op == "load"}

    def integer(self, value: torch.Tensor) -> torch.Tensor:
        """The field's integer, from its tensor."""
        if self.dtype in FLOATS:
            dtype = DTYPES[self.dtype]
            value = value.to(dtype).contiguous().view(_INTEGERS[dtype.itemsize]).to(torch.int32)
        return value.to(torch.int32) - self.less if self.less else value


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _pieces(name: str, expr: Expr, stored: Mapping[str, Stored], simple: Simplifier) -> Iterator[_Piece]:
    def go(expr: Expr, low: int, less: int, dtype: str | None) -> Iterator[_Piece]:
        if expr.op == "field":
            yield from go(expr.args[0], low, less, dtype)
        elif expr.op == "bitcast":
            yield from go(expr.args[0], low, less, expr.attr)
        elif expr.op == "cat":
            for part, width in zip(expr.args, expr.attr, strict=True):
                yield from go(part, low, less, dtype)
                low += width
        elif expr.op == "load":
            s = stored[expr.attr[0]]
            dtype = s.dtype if s.dtype in FLOATS else dtype
            yield _Piece(name, s, simple(expr), const(0), 8 * itemsize(s.dtype), low, less, 0, dtype)
        elif expr.op == "bits":
            word, added = expr.args[0], 0
            if word.op == "add" and word.args[1].op == "const":
                word, added = word.args[0], word.args[1].attr
            if word.op == "load":
                shift = simple(expr.args[1])
                yield _Piece(name, stored[word.attr[0]], simple(word), shift, expr.attr, low, less, added, dtype)
            else:
                yield from go(word, low, less + added, dtype)
        else:
            raise InternalError(f"field '{name}' holds more than addresses and bits", found=str(expr))

    return go(expr, 0, 0, None)


def _fill(s: Stored, pieces: list[_Piece], fields: Tensors, done: Tensors, simple: Simplifier) -> torch.Tensor:
    """One stored tensor: its words are cut into slots of equal width, which are scattered and then joined."""
    (N, K), device = next(iter(fields.values())).shape, next(iter(fields.values())).device
    word = 8 * itemsize(s.dtype)
    unit = math.gcd(*(math.gcd(piece.width, simple.step(piece.shift)) for piece in pieces))
    per = word // unit
    slots = torch.zeros(math.prod(s.shape) * per, dtype=torch.uint8 if unit <= 8 else torch.int32, device=device)
    for rows in row_chunks(N, K):
        reader = Reader(done, rows.to(device), torch.arange(K, device=device))
        for piece in pieces:
            place = reader.address(piece.load) * per + reader(piece.shift) // unit
            value = fields[piece.field][rows[0] : rows[-1] + 1][: place.shape[0], : place.shape[1]]
            if (place[0, 1:] == place[0, :-1]).any():  # scales: write once a group what every input of it says
                first = torch.nn.functional.pad((place[:, 1:] != place[:, :-1]).any(0), (1, 0), value=True)
                place, value = place[:, first], value[:, first]
            value = piece.integer(value)
            for j in range(piece.width // unit):
                part = value >> (piece.low + j * unit) if piece.low + j * unit else value
                part = part & ((1 << unit) - 1) if unit < 32 else part
                slots.scatter_(0, (place + j).reshape(-1), part.expand(place.shape).reshape(-1).to(slots.dtype))
    slots = slots.reshape(-1, per)
    words = slots[:, 0].to(torch.int32)
    for j in range(1, per):
        words |= slots[:, j].to(torch.int32) << (j * unit)
    words = words - max(piece.added for piece in pieces)
    return words.to(_INTEGERS[word // 8]).view(DTYPES[s.dtype]).reshape(s.shape)


def _verify(format: Format, packed: Tensors, simple_fields: Mapping[str, Expr], fields: Tensors) -> None:
    """ConfigError unless reading `packed` gives back `fields`."""
    N, K = next(iter(fields.values())).shape
    for rows in row_chunks(N, K):
        reader = Reader(packed, rows, torch.arange(K))
        for name, expr in simple_fields.items():
            got = reader(expr)
            want = fields[name][rows[0] : rows[-1] + 1]
            want = want.to(got.dtype) if got.is_floating_point() else want
            wrong = (got != want) & ~((got != got) & (want != want))
            if bool(wrong.any()):
                n, k = wrong.nonzero()[0].tolist()
                raise ConfigError(
                    f"format '{format.kind}' cannot hold this '{name}': out of range, or not the same over a group",
                    where=f"weight [{n + int(rows[0])}, {k}]",
                    found=want[n, k].item(),
                    expected=got.expand(wrong.shape)[n, k].item(),
                )
