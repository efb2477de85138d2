"""How torchao rounds a weight: scales, zero points and codes, in the weight's own dtype where torchao does so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompile.methods import fp4
from qcompile.transforms.rounding import LARGEST, power_of_two, to_element

Block = tuple[int, int]
Parts = dict[str, Tensor]


def blocks(weight: Tensor, block: Block) -> Tensor:
    """[N, K] as [N / rows, rows, K / columns, columns]."""
    n, k = weight.shape
    return weight.reshape(n // block[0], block[0], k // block[1], block[1])


def spread(scale: Tensor) -> Tensor:
    """[N / rows, K / columns], to go with `blocks`."""
    return scale[:, None, :, None]


def affine(weight: Tensor, block: Block, low: int, high: int, mapping: str, floor: float) -> tuple[Tensor, Tensor]:
    """Scale (the weight's dtype) and zero point (i8), [N / rows, K / columns] each, by torchao's `mapping`.

    SYMMETRIC divides max|w| by half the range (127.5, 7.5), so that the largest positive weight is clipped.
    """
    parts = blocks(weight, block)
    least, most = parts.amin((1, 3)).clamp(max=0), parts.amax((1, 3)).clamp(min=0)
    zero = torch.zeros_like(least)
    if mapping == "SYMMETRIC":
        scale = torch.maximum(-least, most) / ((high - low) / 2)
    elif mapping == "SYMMETRIC_NO_CLIPPING_ERR":
        scale = torch.maximum(least / float(low), most / float(high)) if high else least / float(low)
    else:
        scale = ((most - least) / float(high - low)).clamp(min=floor)
        zero = (low - torch.round(least / scale)).clamp(low, high)
    return scale.clamp(min=floor), zero.to(torch.int8)


def codes(weight: Tensor, block: Block, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The i8 codes [N, K]: w * (1 / scale) rounded half to even, plus the zero point."""
    rounded = torch.round(blocks(weight, block) * (1.0 / spread(scale))) + spread(zero)
    return rounded.clamp(low, high).to(torch.int8).reshape(weight.shape)


def hqq_scales(weight: Tensor, block: Block, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes i8 [N, K] and scales [N / rows, K / columns] of torchao's HQQ_SCALE_ONLY: at most 20 least-squares steps."""
    parts, tiny = weight.float().reshape(len(weight), -1, block[1]), torch.finfo(torch.float32).eps
    scale = (parts.abs().amax(2) / (max(abs(low), abs(high)) or 1)).clamp(min=tiny)
    before = scale
    for _ in range(20):
        code = torch.round(parts / scale[..., None]).clamp(low, high)
        size = (code * code).sum(2)
        scale = torch.where(size > 0, (parts * code).sum(2) / size, before).clamp(min=tiny).abs()
        if ((scale - before).abs() / before.clamp(min=tiny)).max() < 1e-5:
            break
        before = scale
    code = torch.round(parts / scale[..., None]).clamp(low, high)
    return code.to(torch.int8).reshape(weight.shape), scale.to(weight.dtype)


def float8(weight: Tensor, block: Block, element: str, dtype: torch.dtype) -> Parts:
    """qdata of `dtype` [N, K] and scale f32, max|w| / the largest element rounded to the weight's dtype.

    A block of zeros has scale 0; its codes are 0 here, where torchao writes NaN.
    """
    parts = blocks(weight, block)
    scale = (parts.abs().amax((1, 3)) / LARGEST[element]).float()
    ratio = torch.nan_to_num(parts.float() / spread(scale), nan=0.0)
    code = ratio.clamp(-LARGEST[element], LARGEST[element]).to(dtype).reshape(weight.shape)
    return {"qdata": code, "scale": scale}


def int4_rows(weight: Tensor, group: int) -> Parts:
    """Int4Tensor: f32 arithmetic, s = max(hi - lo, 1e-6) / 15, zero_point lo + 8 s; both rounded to the weight's dtype."""
    parts = weight.float().reshape(len(weight), -1, group)
    least, most = parts.amin(2), parts.amax(2)
    scale = (most - least).clamp(min=1e-6) / 15
    zero = least + scale * 8
    code = torch.round((parts - least[..., None]) / scale[..., None]).clamp(0, 15) - 8
    code = code.to(torch.int8).reshape(weight.shape)
    data = (code[:, ::2] & 15) | (code[:, 1::2] << 4)
    return {
        "qdata": data,
        "scale": scale.t().contiguous().to(weight.dtype),
        "zero_point": zero.t().contiguous().to(weight.dtype),
    }


def tinygemm(weight: Tensor, group: int) -> Mapping[str, Tensor]:
    """The fields of Int4TilePackedTo4dTensor, all of it in bfloat16: s = (hi - lo) / 15, zero lo + 8 s. [N, K] each."""
    weight = weight.to(torch.bfloat16)
    parts = weight.reshape(len(weight), -1, group)
    least, most = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    scale = ((most - least) / 15.0).clamp(min=torch.finfo(torch.bfloat16).smallest_normal)
    zero = least + scale * 8.0
    code = torch.round((parts - (zero - scale * 8.0)) / scale).clamp(0, 15).to(torch.int32)
    fields = {"code": code, "scale": scale, "zero": zero}
    return {name: value.expand_as(parts).reshape(weight.shape) for name, value in fields.items()}


def tinygemm_hqq(weight: Tensor, group: int) -> Mapping[str, Tensor]:
    """The fields of Int4TilePackedTo4dTensor by torchao's HQQ, [N, K] each: in at most 20 steps, which move the zeros alone.

    A step takes large errors out of the weight (they shrink by |error| ** -0.3 / beta) and puts the zeros at the mean of
    what is left; it is the last one when the mean error of all groups has not fallen. In float32, as on a CPU.
    """
    parts = weight.to(torch.bfloat16).float().reshape(-1, group)
    least, most = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
    inverse = (15 / (most - least)).clamp(max=2e4)
    zero, beta, best = torch.round(-least * inverse), 10.0, 1e4
    for _ in range(20):
        code = torch.round(parts * inverse + zero).clamp(0, 15)
        error = parts - (code - zero) / inverse
        kept = error.sign() * (error.abs() - (1.0 / beta) * error.abs() ** (0.7 - 1)).relu()
        zero, beta = torch.mean(code - (parts - kept) * inverse, 1, keepdim=True), beta * 1.01
        mean = float(error.abs().mean())
        if mean >= best:
            break
        best = mean
    code = torch.round(parts * inverse + zero).clamp(0, 15).to(torch.int32)
    scale = 1.0 / inverse
    fields = {"code": code, "scale": scale.bfloat16(), "zero": ((8 - zero) * scale).bfloat16()}
    return {name: value.expand_as(parts).reshape(weight.shape) for name, value in fields.items()}


def mx(weight: Tensor, element: str, mode: str) -> tuple[Tensor, Tensor]:
    """Exponents u8 [N, K / 32] and the weight over its scales, f32 [N, K], by torchao's scaling `mode`."""
    parts = weight.float().reshape(len(weight), -1, 32)
    most = parts.abs().amax(2, keepdim=True)
    if mode == "RCEIL":
        exponent = torch.ceil(torch.log2(most / LARGEST[element])).clamp(-127, 127) + 127
        scale = torch.where(exponent == 0, 1.0, torch.exp2(exponent - 127))
    else:
        rule, shift = mx_rule(element, mode)
        power = power_of_two(most, rule)
        exponent = ((power.view(torch.int32) >> 23) - shift).clamp(min=0).float()
        scale = torch.exp2(exponent - 127).clamp(min=torch.finfo(torch.float32).smallest_normal)
    return exponent[..., 0].to(torch.uint8), (parts / scale).reshape(weight.shape)


def mx_rule(element: str, mode: str) -> tuple[str, int]:
    """The rule of `power_of_two` for a scaling mode, and the exponent of the largest element, which is taken off."""
    mantissa, shift = {"f8e4m3": (3, 8), "f8e5m2": (2, 15), "e2m1": (1, 2)}[element]
    rule = {"FLOOR": "floor", "CEIL": "ceil", "EVEN": f"even{mantissa}", "RCEIL": "ceil"}[mode]
    return rule, 0 if mode == "RCEIL" else shift


def nvfp4(weight: Tensor, whole: Tensor | None) -> Parts:
    """qdata u8 [N, K / 2] and e4m3 scales [N, K / 16], under the scale `whole` of all, if any (0: nothing but zeros)."""
    parts = weight.float().reshape(len(weight), -1, 16)
    most = parts.abs().amax(2) / 6.0
    scale = (most if whole is None else torch.nan_to_num(most / whole)).clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn)
    inverse = (1.0 if whole is None else 1.0 / whole) / scale.float()
    return {"qdata": e2m1(torch.nan_to_num(parts * inverse[..., None])).reshape(len(weight), -1), "scale": scale}


def e2m1(x: Tensor) -> Tensor:
    """Two codes a byte, u8 [..., K / 2], the even one low: to the nearest, ties to the even code, the sign of 0 kept."""
    code = fp4.codes(to_element(x, "e2m1")).to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4)


def swizzled(scale: Tensor) -> Tensor:
    """Scales [R, C] of one byte as cuBLAS reads them: tiles of 128 x 4, filled with 0, [32 ceil(R / 128), 4 * 4 ceil(C / 4)]."""
    rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    whole = torch.zeros(rows * 128, columns * 4, dtype=torch.uint8)
    whole[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    tiles = whole.reshape(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows * 32, columns * 16).view(scale.dtype)


def plain_scales(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzled`: scales [rows, columns]."""
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = stored.view(torch.uint8).reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns].contiguous().view(stored.dtype)
