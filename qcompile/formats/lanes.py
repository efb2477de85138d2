"""Layouts for CPU kernels: sixteen outputs side by side, so that one vector register holds sixteen rows' numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.dtypes import DTYPES
from qcompile.evaluate import CHUNK
from qcompile.expr import Expr, bits, cast, cat, k, n
from qcompile.format import Format, Packed, Stored
from qcompile.formats.coded import Coded, content, form_of
from qcompile.formats.dense import Dense
from qcompile.formats.stream import planes

LANES = 16
SHORTEST = 8  # inputs that must share a scale for a kernel to apply it once a group


@dataclass(frozen=True)
class Lanes(Coded):
    """Affine or table codes in planes of 32-bit words, sixteen outputs interleaved; what they are worth is in `Coded`.

    Plane p of width w is "codes{p}" i32 [ceil(N/16), ceil(K/(32//w)), 16]. Word (nb, kw, lane) holds inputs
    kw*(32//w) + j of output nb*16 + lane, input j at bit 8*(j % 4) + w*(j // 4): masking a word byte by byte gives four
    consecutive inputs. "scales", and "zeros" and "offsets" where stored, are [ceil(N/16), K//group, 16]. Everything
    beyond N or K is 0.

    Without a rounding, kernels factor scale * factor out of the sum over a group; those for int8 activations always do, and
    leave the rounding of weights out.
    """

    kind: ClassVar[str] = "lanes"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks, per_group = -(-N // LANES), (-(-N // LANES), K // self.group, LANES)
        out = [Stored(f"codes{p}", "i32", (blocks, -(-K // (32 // w)), LANES)) for p, w in enumerate(planes(self.bits))]
        out.append(Stored("scales", self.scale, per_group))
        if isinstance(self.zero, str):
            out.append(Stored("zeros", self.zero, per_group))
        if self.offset is not None:
            out.append(Stored("offsets", self.offset, per_group))
        return tuple(out)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        parts = []
        for p, w in enumerate(planes(self.bits)):
            j = k % (32 // w)
            word = getattr(t, f"codes{p}")[n // LANES, k // (32 // w), n % LANES]
            parts.append(bits(word, j % 4 * 8 + j // 4 * w, w))
        at = (n // LANES, k // self.group, n % LANES)
        out = {"code": cat(*parts), "scale": t.scales[at]}
        if isinstance(self.zero, str):
            out["zero"] = t.zeros[at]
        if self.offset is not None:
            out["offset"] = t.offsets[at]
        return out


@dataclass(frozen=True)
class LanesDense(Format):
    """An unquantized weight, sixteen outputs interleaved: "values" [ceil(N/16), K, 16], rows beyond N are 0."""

    kind: ClassVar[str] = "lanes-dense"
    dtype: str = "f32"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("values", self.dtype, (-(-N // LANES), K, LANES)),)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"weight": t.values[n // LANES, k, n % LANES]}

    def value(self, f: Any) -> Expr:
        return cast("f32", f.weight)

    def group_size(self, N: int, K: int) -> int | None:
        return K


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """[N, C] as [ceil(N/16), C, 16], rows beyond N filled with 0."""
    missing = -len(rows) % LANES
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    return padded.reshape(-1, LANES, rows.shape[1]).transpose(1, 2).contiguous()


def pack_codes(codes: torch.Tensor, width: int) -> list[torch.Tensor]:
    """The planes of integer codes [N, K] in 0..2**width - 1: i32 [ceil(N/16), ceil(K/(32//w)), 16] each."""
    out, low = [], 0
    for w in planes(width):
        out.append(_plane(codes, low, w))
        low += w
    return out


def _plane(codes: torch.Tensor, low: int, w: int) -> torch.Tensor:
    per = 32 // w
    part = ((codes >> low) & ((1 << w) - 1)).to(torch.uint8) if w < 8 else codes.to(torch.uint8)
    part = torch.nn.functional.pad(part, (0, -codes.shape[1] % per, 0, -codes.shape[0] % LANES))
    part = part.reshape(part.shape[0], -1, 8 // w, 4)  # [rows, word, slot in the byte, byte]
    word_bytes = part[:, :, 0]
    for slot in range(1, 8 // w):
        word_bytes = word_bytes | (part[:, :, slot] << (w * slot))
    return interleave(word_bytes.contiguous().view(torch.int32).squeeze(-1))


def pack_lanes(
    format: Lanes,
    code: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The stored tensors from codes [N, K] and what `format` stores of scale, zero and offset, each [N, K // group]."""
    chunk = max(LANES, CHUNK * 4 // max(code.shape[1], 1) // LANES * LANES)
    blocks = [pack_codes(code[at : at + chunk], format.bits) for at in range(0, len(code), chunk)]
    out = {f"codes{p}": torch.cat(parts) for p, parts in enumerate(zip(*blocks, strict=True))}
    out["scales"] = interleave(scale.to(DTYPES[format.scale]))
    if isinstance(format.zero, str) and zero is not None:
        out["zeros"] = interleave(zero.to(DTYPES[format.zero]))
    if format.offset is not None and offset is not None:
        out["offsets"] = interleave(offset.to(DTYPES[format.offset]))
    return out


def lanes_for(packed: Packed) -> tuple[Packed, torch.Tensor | None] | str:
    """The weight in a lane layout, and the order of its inputs when that had to change; or the reason why it has none.

    Exact: dequantized, the result equals the original's columns in the order `perm` (i64 [K]; None = unchanged) bit for
    bit. Refused: formats without terms (see `Affine`), except plain float weights, and groups of fewer than 8 inputs.
    """
    format, N, K = packed.format, packed.N, packed.K
    if isinstance(format, Lanes | LanesDense):
        return packed, None
    if isinstance(format, Dense):
        return Packed(LanesDense(format.dtype), {"values": interleave(packed.tensors["weight"])}, N, K), None
    made = content(packed, SHORTEST)
    if isinstance(made, str):
        return made
    layout = Lanes(**made.form)
    return Packed(layout, pack_lanes(layout, made.codes, made.scale, made.zero, made.offset), N, K), made.order


def lanes_form(format: Format, N: int, K: int) -> Format | str:
    """The layout that `lanes_for` gives a weight [N, K], or the reason why it gives none, from the format alone.

    As `coded.form_of` counts them: zeros that may differ as stored, stored groups as runs of the format's own length. What
    has no group size at all is refused.
    """
    if isinstance(format, Lanes | LanesDense):
        return format
    if isinstance(format, Dense):
        return LanesDense(format.dtype)
    form = form_of(format, N, K, SHORTEST)
    return form if isinstance(form, str) else Lanes(**form)
