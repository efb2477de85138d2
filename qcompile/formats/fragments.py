"""A layout for tensor cores: weights in the order in which a thread holds them as the left operand of a matrix product.

mma.m16n8k16 and wgmma m64k16 agree on that order: of a block of 16 outputs and 16 inputs, thread 4 r + c of a warp holds
outputs r and r + 8 at inputs 2 c, 2 c + 1, 2 c + 8 and 2 c + 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from qcompile.dtypes import DTYPES, NAMES
from qcompile.evaluate import CHUNK
from qcompile.expr import Expr, bits, cast, cat, k, n, walk
from qcompile.format import Format, Packed, Problem, Stored
from qcompile.formats.affine import Terms
from qcompile.formats.coded import Coded, Content, at, content, form_of, terms_of, too_short
from qcompile.formats.stream import planes

ROWS = 16  # outputs of a block
INPUTS = 128  # inputs of a block: eight slots of 16
SHORTEST = 16  # inputs that must share a scale: those of a slot
NARROW = ("f8e8m0", "f8e4m3", "bf16", "f16")  # dtypes that may hold scales of f32, the narrowest first
TABLE_BITS = 4


@dataclass(frozen=True)
class Fragments(Coded):
    """Affine or table codes in planes of 32-bit words, in blocks of 16 outputs and 128 inputs; `Coded` says what they are worth.

    Plane p of width w is "codes{p}" i32 [ceil(N/16), ceil(K/128), 16, 4 w]: the words of one output lie together, first
    those of thread c = 0, then 1, 2, 3. Input k = 16 s + 8 h + 2 c + e of a block lies, for each c, in the order
    (h, q, e, j) from the lowest bit on, where slot s = i q + j and i = min(16 / w, 8) are the slots of a half word: one shift
    and one mask of a word give inputs e = 0 and e = 1 in its halves. Tables lie in the order (h, q, j, e), where 16 bits
    select four entries. "scales", and "zeros" and "offsets" where stored, are [ceil(N/16), K//group, 16], outputs r and
    r + 8 side by side. All beyond N or K is 0.

    Zeros that are whole numbers are stored as u8. `tensor`: each scale is first multiplied by "tensor_scale" f32
    [ceil(N/16)], one number a block of outputs, so that weights with a scale for the whole tensor can lie one below the other.
    """

    kind: ClassVar[str] = "fragments"
    tensor: bool = False

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks = -(-N // ROWS)
        per_group, inputs = (blocks, K // self.group, ROWS), -(-K // INPUTS)
        out = [Stored(f"codes{p}", "i32", (blocks, inputs, ROWS, 4 * w)) for p, w in enumerate(planes(self.bits))]
        out.append(Stored("scales", self.scale, per_group))
        if isinstance(self.zero, str):
            out.append(Stored("zeros", self.zero, per_group))
        if self.offset is not None:
            out.append(Stored("offsets", self.offset, per_group))
        if self.tensor:
            out.append(Stored("tensor_scale", "f32", (blocks,)))
        return tuple(out)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        parts = []
        for p, w in enumerate(planes(self.bits)):
            slot, half, thread, e = k % INPUTS // 16, k % 16 // 8, k % 8 // 2, k % 2
            i = min(16 // w, 8)
            inner = slot % i * 2 + e if self.table is not None else e * i + slot % i
            place = ((thread * 2 + half) * (8 // i) + slot // i) * (2 * i) + inner
            word = getattr(t, f"codes{p}")[n // ROWS, k // INPUTS, n % ROWS, place // (32 // w)]
            parts.append(bits(word, place % (32 // w) * w, w))
        row = (n // ROWS, k // self.group, n % 8 * 2 + n % ROWS // 8)
        out = {"code": cat(*parts), "scale": t.scales[row]}
        if isinstance(self.zero, str):
            out["zero"] = t.zeros[row]
        if self.offset is not None:
            out["offset"] = t.offsets[row]
        if self.tensor:
            out["tensor_scale"] = t.tensor_scale[n // ROWS]
        return out

    def terms(self, f: Any) -> Terms:
        terms = super().terms(f)
        if not self.tensor:
            return terms
        scale = cast("f32", terms.scale) * f.tensor_scale
        return Terms(terms.code, scale, terms.zero, terms.offset, terms.table, terms.rounding, terms.factor)

    def check(self, N: int, K: int) -> list[Problem]:
        out = super().check(N, K)
        if (self.group % INPUTS and INPUTS % self.group and self.group != K) or self.group < SHORTEST:
            out.append(Problem(f"a group of {self.group}", f"{SHORTEST}, 32, 64, a multiple of {INPUTS}, or all of K"))
        if self.table is not None and (self.bits != TABLE_BITS or len(self.table) != 1 << TABLE_BITS):
            out.append(Problem(f"{len(self.table)} entries at {self.bits} bits", f"16 at {TABLE_BITS}"))
        return out


def fragments_for(packed: Packed) -> tuple[Packed, torch.Tensor | None] | str:
    """The weight in fragment order, and the order of its inputs when that had to change; or the reason why it has none.

    Exact: dequantized, the result equals the original's columns in that order (i64 [K]; None = unchanged) bit for bit.
    Refused: formats without terms (see `Affine`), groups that cut a slot of 16 inputs, tables of more than 16 entries.
    """
    if isinstance(packed.format, Fragments):
        return packed, None
    made = content(packed, SHORTEST)
    if isinstance(made, str):
        return made
    layout = _layout(made.form, packed.K)
    if isinstance(layout, str):
        return layout
    scale, tensor = made.scale, None
    if layout.group != made.form["group"]:  # groups that cut a block of inputs come in equal pieces
        made = _pieces(made, made.form["group"] // layout.group)
        scale = made.scale
    if made.zero is not None and _are_bytes(made.zero):
        made, layout = replace(made, zero=made.zero.to(torch.uint8)), replace(layout, zero="u8")
    if layout.scale == "f32":
        scale, tensor = _factored(packed, made, layout.group)
        scale = _narrow(scale)
        layout = replace(layout, scale=NAMES[scale.dtype], tensor=tensor is not None)
    return Packed(layout, pack_fragments(layout, made, scale, tensor), packed.N, packed.K), made.order


def fragments_form(format: Format, N: int, K: int) -> Format | str:
    """The layout that `fragments_for` gives a weight [N, K], or the reason why it gives none, from the format alone.

    Zeros that may differ count as stored and scales as not narrowed; the rest is as in `coded.form_of`.
    """
    if isinstance(format, Fragments):
        return format
    form = form_of(format, N, K, SHORTEST)
    return form if isinstance(form, str) else _layout(form, K)


def _layout(form: dict[str, Any], K: int) -> Fragments | str:
    """The layout for what `Coded` says, or why there is none."""
    group, table = form["group"], form["table"]
    if group != K and group % INPUTS:
        group = math.gcd(group, INPUTS)
    if group % SHORTEST and group != K:
        return too_short(group, SHORTEST)
    if table is None:
        return Fragments(**{**form, "group": group})
    if len(table) > 1 << TABLE_BITS:
        return f"a table of {len(table)} entries, more than {1 << TABLE_BITS}"
    filled = (*table, *(0.0,) * ((1 << TABLE_BITS) - len(table)))
    return Fragments(**{**form, "group": group, "table": filled, "bits": TABLE_BITS})


def _are_bytes(zero: torch.Tensor) -> bool:
    return bool(((zero >= 0) & (zero <= 255) & (zero == zero.round())).all())


def _pieces(made: Content, times: int) -> Content:
    """The same weight in groups of a `times`-th of their length."""
    scale, zero, offset = (
        None if each is None else each.repeat_interleave(times, 1) for each in (made.scale, made.zero, made.offset)
    )
    assert scale is not None
    return Content(made.form, made.codes, scale, zero, offset, made.order)


def _factored(packed: Packed, made: Content, group: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales as a factor for each group and one for the whole tensor, where the format multiplies them so."""
    terms = terms_of(packed.format, packed.N, packed.K)
    assert isinstance(terms, Terms)
    if terms.scale.op == "mul":
        inner, outer = terms.scale.args
        if not any(node.op == "var" for node in walk(outer)):
            columns = torch.arange(packed.K) if made.order is None else made.order
            return at(packed, inner, columns[::group]), at(packed, outer, columns[:1])[0]
    return made.scale, None


def _narrow(scale: torch.Tensor) -> torch.Tensor:
    """The same numbers in the narrowest dtype that holds them all."""
    for name in NARROW:
        narrow = scale.to(DTYPES[name])
        if torch.equal(narrow.float().view(torch.int32), scale.view(torch.int32)):
            return narrow
    return scale


def pack_fragments(
    format: Fragments, made: Content, scale: torch.Tensor, tensor: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight taken apart, with `scale` [N, K // group] in the layout's dtype."""
    codes = made.codes
    chunk = max(ROWS, CHUNK * 4 // max(codes.shape[1], 1) // ROWS * ROWS)
    out = {}
    for p, w in enumerate(planes(format.bits)):
        low = sum(planes(format.bits)[:p])
        blocks = [
            _plane(codes[first : first + chunk], low, w, format.table is not None)
            for first in range(0, len(codes), chunk)
        ]
        out[f"codes{p}"] = torch.cat(blocks)
    out["scales"] = _by_rows(scale)
    if isinstance(format.zero, str) and made.zero is not None:
        out["zeros"] = _by_rows(made.zero.to(DTYPES[format.zero]))
    if format.offset is not None and made.offset is not None:
        out["offsets"] = _by_rows(made.offset.to(DTYPES[format.offset]))
    if tensor is not None:
        out["tensor_scale"] = tensor.reshape(1).repeat(-(-codes.shape[0] // ROWS))
    return out


def _plane(codes: torch.Tensor, low: int, w: int, pairs: bool) -> torch.Tensor:
    """Bits `low` .. `low` + w - 1 of codes u8 [n, K] as words i32 [ceil(n/16), ceil(K/128), 16, 4 w]."""
    part = (codes >> low) & ((1 << w) - 1) if w < 8 else codes
    part = torch.nn.functional.pad(part, (0, -codes.shape[1] % INPUTS, 0, -codes.shape[0] % ROWS))
    i = min(16 // w, 8)
    part = part.reshape(part.shape[0] // ROWS, ROWS, -1, 8 // i, i, 2, 4, 2)  # block, row, inputs, q, j, h, c, e
    order = (0, 2, 1, 6, 5, 3, 4, 7) if pairs else (0, 2, 1, 6, 5, 3, 7, 4)
    part = part.permute(order).reshape(part.shape[0], part.shape[2], ROWS, -1, 8 // w)
    whole = part[..., 0].clone()
    for slot in range(1, 8 // w):
        whole |= part[..., slot] << (w * slot)
    return whole.view(torch.int32)


def _by_rows(values: torch.Tensor) -> torch.Tensor:
    """[N, G] as [ceil(N/16), G, 16], rows r and r + 8 of a block side by side, those beyond N filled with 0."""
    missing = -len(values) % ROWS
    if missing:
        values = torch.cat([values, torch.zeros(missing, values.shape[1]).to(values.dtype)])
    return values.reshape(-1, 2, 8, values.shape[1]).permute(0, 3, 2, 1).reshape(-1, values.shape[1], ROWS).contiguous()
