"""The stored tensors of CompressedTensors into a packed weight, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qcompile.errors import CheckpointError
from qcompile.methods import stored
from qcompile.methods.base import Quantized
from qcompile.methods.compressed_tensors_args import Args, Scheme
from qcompile.methods.compressed_tensors_layout import official
from qcompile.methods.compressed_tensors_legacy import expand, marlin24, marlin_scales

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

Tensors = dict[str, torch.Tensor]


def read(
    module: Module, selected: Quantized, scheme: Scheme | None, names: Mapping[str, str], source: TensorSource
) -> Packed:
    """The packed weight that `select` chose, from any of the layouts."""
    fmt = selected.format
    tensors = {name: stored.finite(source.read(full), full, module) for name, full in selected.names.items()}
    args = None if scheme is None else scheme.weights
    if "bitmask" in names:
        tensors["weight"] = expand(tensors["weight"], source.read(names["bitmask"]), module)
    elif args is not None and "meta" in names:
        return _marlin(fmt, args, tensors, source.read(names["meta"]), module)
    elif args is not None and tensors.keys() != {s.name for s in fmt.stored(module.n, module.k)}:
        return _calibrated(fmt, args, tensors["weight"], names, module, source)
    elif "weight_zero_point" in names and "zero" not in tensors:
        _require_zeros(source.read(names["weight_zero_point"]), names["weight_zero_point"], module)
    return stored.packed(fmt, _shaped(fmt, tensors, selected.names, module), module)


def _shaped(fmt: Format, tensors: Tensors, names: Mapping[str, str], module: Module) -> Tensors:
    """The tensors with the dimensions of the format's; CheckpointError for a power of two that is not a number."""
    for s in fmt.stored(module.n, module.k):
        if s.name in ("scale", "zero", "tensor_scale"):
            tensors[s.name] = tensors[s.name].reshape(s.shape)
        if s.name == "scale" and s.dtype == "u8":
            stored.exponents(tensors["scale"], names["scale"], module)
    return tensors


def _require_zeros(zero: torch.Tensor, name: str, module: Module) -> None:
    if bool((zero.float() != 0).any()):
        raise CheckpointError(
            "a symmetric weight has zero points",
            where=f"{name} (module {module.path})",
            found=f"{int((zero.float() != 0).sum())} numbers other than 0",
            expected="no zero point, or zeros",
            remedy="the checkpoint and its quantization_config do not belong together",
        )


def _marlin(fmt: Format, args: Args, tensors: Tensors, meta: torch.Tensor, module: Module) -> Packed:
    from qcompile.pack import pack

    columns = args.blocks[1] or module.k
    codes = marlin24(tensors["packed"], meta, args.num_bits, module)
    scale = marlin_scales(tensors["scale"], columns, module).repeat_interleave(columns, 1)[:, : module.k]
    fields = {"code": codes + (1 << (args.num_bits - 1)), "scale": scale}
    return stored.packed(fmt, pack(fmt, fields, module.n, module.k), module)


def _calibrated(
    fmt: Format, args: Args, weight: torch.Tensor, names: Mapping[str, str], module: Module, source: TensorSource
) -> Packed:
    """A float weight rounded by the scales that lie beside it."""
    from qcompile.formats.blocks import grid
    from qcompile.methods.compressed_tensors_quantize import build

    def part(name: str) -> torch.Tensor:
        stored.require(names, (name,), module, "compressed-tensors")
        return stored.finite(source.read(names[name]), names[name], module)

    blocks = grid(module.n, module.k, *args.blocks)
    zero = None if args.symmetric else part("weight_zero_point").reshape(blocks)
    whole = part("weight_global_scale").reshape(1) if args.strategy == "tensor_group" else None
    return build(weight, part("weight_scale").reshape(blocks), zero, whole, args, fmt, module)


def written(packed: Packed) -> Tensors:
    """The tensors of a weight by the package's names, as it writes them since 0.18."""
    from qcompile.formats.bitstream import Bitstream
    from qcompile.repack import repack

    fmt, tensors = packed.format, packed.tensors
    if isinstance(fmt, Bitstream) and fmt.padded:
        new = replace(fmt, padded=False)
        fmt, tensors = new, repack(packed, new).tensors
    if fmt.kind == "dense":
        return dict(tensors)
    out = {name: tensors[own] for own, name in official(fmt).items()}
    if getattr(fmt, "rows", 1) == 0:  # one scale for everything has one dimension
        out |= {name: out[name].reshape(1) for name in ("weight_scale", "weight_zero_point") if name in out}
    return out | ({"weight_shape": torch.tensor([packed.N, packed.K])} if isinstance(fmt, Bitstream) else {})
