"""The formulas by which compressed-tensors quantizes a weight from its minimum and maximum, in the weight's own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.dtypes import DTYPES
from qcompile.methods import stored
from qcompile.methods.compressed_tensors_args import Args

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module

F8 = torch.float8_e4m3fn
_ELEMENTS = {8: "f8e4m3", 6: "e2m3", 4: "e2m1"}


def quantize(weight: Tensor, args: Args, fmt: Format, module: Module) -> Packed:
    """A weight [N, K] as the package's min-max observer quantizes it, in `fmt`."""
    stored.finite(weight, module.weight, module)
    weight = weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.float()
    whole = _whole(weight) if args.strategy == "tensor_group" else None
    scale, zero = qparams(*_extremes(weight, args), args, whole)
    return build(weight, scale, zero, whole, args, fmt, module)


def build(
    weight: Tensor, scale: Tensor, zero: Tensor | None, whole: Tensor | None, args: Args, fmt: Format, module: Module
) -> Packed:
    """A weight [N, K] rounded with given scales and zeros for its blocks, in `fmt`; `whole` is the global scale f32 [1]."""
    from qcompile.pack import pack

    rows, columns = args.blocks
    shape = (module.n, module.k)
    rounded = codes(weight, _spread(scale if whole is None else scale / whole, rows, columns, shape), zero, args)
    if fmt.kind in ("int8", "fp8"):
        kept = {"weight": rounded.to(DTYPES[fmt.stored(*shape)[0].dtype]), "scale": _scales(scale, fmt)}
        return stored.packed(fmt, kept | ({} if zero is None else {"zero": zero}), module)
    fields = {"scale": _spread(_scales(scale, fmt), rows, columns, shape)}
    if fmt.kind == "bitstream":
        middle = 1 << (args.num_bits - 1)
        fields["code"] = rounded.to(torch.int32) + middle
        if zero is not None:
            packed = getattr(fmt, "zero", "") == "packed"
            fields["zero"] = _spread(zero, rows, columns, shape).to(torch.int32) + (middle if packed else 0)
    else:
        fields["code"] = _index(rounded, args.num_bits)
    if whole is not None:
        fields["tensor_scale"] = whole.reshape(1, 1)
    return stored.packed(fmt, pack(fmt, fields, *shape), module)


def codes(weight: Tensor, scale: Tensor, zero: Tensor | None, args: Args) -> Tensor:
    """The weight over its scales (and plus its zeros, for its blocks), rounded to codes; floats of the arithmetic's dtype."""
    from qcompile.transforms.rounding import to_element

    low, high = args.limits
    ratio = weight / scale
    if zero is not None:
        ratio = ratio + _spread(zero, *args.blocks, (weight.shape[0], weight.shape[1])).to(weight.dtype)
    ratio = ratio.clamp(low, high)
    return torch.round(ratio) if args.type == "int" else to_element(ratio, _ELEMENTS[args.num_bits])


def qparams(low: Tensor, high: Tensor, args: Args, whole: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scales and, for asymmetric integers, the zeros i8 of blocks with these extremes; a scale of 0 becomes epsilon."""
    from qcompile.transforms.rounding import power_of_two

    low, high = low.clamp(max=0), high.clamp(min=0)
    least, greatest = args.limits
    if not args.symmetric:
        scale = (high - low) / (greatest - least)
        zero = torch.round((least - low / scale).clamp(least, greatest)).nan_to_num().to(torch.int8)
        return _nonzero(scale, torch.finfo(scale.dtype).eps), zero
    most = torch.maximum(-low, high)
    if args.mx:
        power = power_of_two(most.float(), "even3" if args.num_bits == 6 else "even1")
        shift = 8 if args.num_bits == 8 else 2
        exponent = (torch.floor(torch.log2(power)) - shift).clamp(-127, 128)
        return _nonzero(torch.exp2(exponent).to(most.dtype), 1.0), None
    scale = most / ((greatest - least) / 2)
    if whole is None:
        return _nonzero(scale, torch.finfo(scale.dtype).eps), None
    scale = (whole * scale).clamp(-448, 448).to(F8).float()
    return _nonzero(scale, 0.125), None


def _nonzero(scale: Tensor, epsilon: float) -> Tensor:
    return torch.where(scale == 0, epsilon, scale)


def _whole(weight: Tensor) -> Tensor:
    """The global scale f32 [1]: 448 * 6 over the weight's maximum, 1 where that is 0."""
    most = weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.nan_to_num(448.0 * 6.0 / most, nan=1.0, posinf=1.0, neginf=1.0).float().reshape(1)


def _extremes(weight: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """The minimum and maximum of each block; a short last block is filled with zeros, which every range holds."""
    rows, columns = args.blocks
    n, k = weight.shape
    rows, columns = rows or n, columns or k
    filled = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = filled.reshape(filled.shape[0] // rows, rows, filled.shape[1] // columns, columns)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def _spread(blocks: Tensor, rows: int, columns: int, shape: tuple[int, int]) -> Tensor:
    """Numbers for blocks as numbers for each weight [N, K]."""
    n, k = shape
    return blocks.repeat_interleave(rows or n, 0)[:n].repeat_interleave(columns or k, 1)[:, :k]


def _scales(scale: Tensor, fmt: Format) -> Tensor:
    """Scales as the format stores them: their exponents where these are bytes."""
    dtype = next(s.dtype for s in fmt.stored(1, 1) if s.name == "scale")
    if dtype == "u8":
        return (127 + torch.floor(torch.log2(scale.float()))).to(torch.uint8)
    return scale.to(DTYPES[dtype])


def _index(values: Tensor, bits: int) -> Tensor:
    """The codes i32 of 4- and 6-bit floats: the place of each value in the table of its element."""
    from qcompile.formats.minifloat import E2M1, minifloats

    table = torch.tensor(E2M1 if bits == 4 else minifloats(2, 3, 1))
    half = len(table) // 2
    sign = torch.signbit(values).to(torch.int32) * half
    return torch.searchsorted(table[:half], values.abs().float().contiguous()).to(torch.int32) + sign
