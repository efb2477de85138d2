"""How CompressedTensors stores the weight of a module: the format, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qcompile.errors import ConfigError
from qcompile.methods import stored
from qcompile.methods.compressed_tensors_args import Args

if TYPE_CHECKING:
    from qcompile.format import Format
    from qcompile.formats.bitstream import Bitstream
    from qcompile.program import Module
    from qcompile.sources import TensorSource

FLOATS = ("f32", "f16", "bf16")
DENSE_PACKING = (0, 18)  # the version from which codes of 3, 5, 6 and 7 bits lie across words
_ZEROS = ("group", "channel")  # the strategies whose zero points pack-quantized packs


def layout(kind: str, args: Args, scale: str) -> Format:
    """The format of weights that are stored as `kind`, with scales of the dtype `scale` where the kind leaves it open."""
    from qcompile.formats.bitstream import Bitstream
    from qcompile.formats.integer import Int8
    from qcompile.formats.minifloat import Fp4, Fp6, Fp8

    rows, columns = args.blocks
    rounding = "none" if scale == "f32" else f"product-{scale}"
    fits, size = False, args.group_size or 0
    if kind in ("pack-quantized", "marlin-24"):
        if args.type == "int" and args.num_bits <= 8:
            zero = "" if args.symmetric else "packed" if args.strategy in _ZEROS else "i8"
            return Bitstream(args.num_bits, rows, columns, scale, zero)  # type: ignore[arg-type]
    elif kind in ("int-quantized", "float-quantized", "naive-quantized"):
        if args.type == "int" and args.num_bits <= 8:
            return Int8("i8", scale, "" if args.symmetric else "i8", rows, columns, rounding)
        if args.type == "float" and args.num_bits == 8 and args.symmetric:
            return Fp8("f8e4m3", scale, rows, columns, rounding)
    elif kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        fits = args.type == "float" and args.num_bits == 4 and size > 0
        if fits and kind.startswith("mx"):
            return Fp4(size, "u8")
        if fits:
            return Fp4(size, "f8e4m3", "divide" if args.strategy == "tensor_group" else "", "product-bf16")
    elif kind == "mxfp6-pack-quantized" and args.type == "float" and args.num_bits == 6 and size > 0:
        return Fp6("e2m3", size)
    elif kind == "mxfp8-quantized" and args.type == "float" and args.num_bits == 8 and size > 0:
        return Fp8("f8e4m3", "u8", 1, size)
    raise ConfigError(
        f"weights cannot be stored as {kind}",
        where="field 'config_groups'",
        found=", ".join(f"{name}: {value!r}" for name, value in args.to_dict().items()),
        expected="integers of 1 to 8 bits, e4m3 (symmetric), e2m1 or e2m3 floats, in the format of their kind",
        remedy="correct the scheme's 'format', or leave it out: it follows from the rest",
    )


def official(fmt: Format) -> dict[str, str]:
    """The names that the package gives to a format's stored tensors."""
    weight = "weight_packed" if fmt.kind in ("bitstream", "fp4", "fp6") else "weight"
    names = {"weight": weight, "packed": weight, "scale": "weight_scale", "zero": "weight_zero_point"}
    names |= {"tensor_scale": "weight_global_scale", "g_idx": "weight_g_idx"}
    return {s.name: names[s.name] for s in fmt.stored(1, 1)}


def check(fmt: Format, names: Mapping[str, str], source: TensorSource, module: Module) -> None:
    """CheckpointError unless the stored tensors have their dtypes and shapes, by their headers.

    Scales and zeros for whole outputs, or for the whole weight, may lack dimensions of size 1.
    """
    for s in fmt.stored(module.n, module.k):
        shape, found = s.shape, tuple(source.info(names[s.name]).shape)
        if s.name in ("scale", "zero") and 1 in shape:
            shape = next((short for short in _shorter(shape) if short == found), shape)
        if s.name == "tensor_scale" and found == ():
            shape = ()
        stored.expect(names[s.name], source, (s.dtype,), shape, module)


def _shorter(shape: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    return ((1,), ()) if shape == (1, 1) else (shape[:1],) if shape[1] == 1 else ()


def packing(fmt: Bitstream, names: Mapping[str, str], source: TensorSource, module: Module, version: str) -> bool:
    """True when codes do not lie across words, as before 0.18; told by sizes, or by the version where these agree."""
    from dataclasses import replace

    old = replace(fmt, padded=True)
    sizes = {names["packed"]: (1, module.k)} | ({names["zero"]: (0, module.n)} if fmt.zero == "packed" else {})
    for name, (dim, count) in sizes.items():
        if fmt.words(count) != old.words(count):
            shape = source.info(name).shape
            return len(shape) == 2 and shape[dim] == old.words(count)
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return fmt.bits in (3, 5, 6, 7) and len(numbers) == 2 and tuple(numbers) < DENSE_PACKING


def ordered(name: str, groups: int, columns: int, source: TensorSource, module: Module) -> bool:
    """True when a stored g_idx says no more than k // columns; its range is checked."""
    stored.expect(name, source, ("i32",), (module.k,), module)
    index = source.read(name)
    if int(index.max()) == -1:  # the package's word for "in order"
        return True
    stored.check_groups(index, groups, name, module)
    return torch.equal(index.long(), torch.arange(module.k) // columns)
