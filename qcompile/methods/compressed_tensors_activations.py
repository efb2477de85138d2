"""What CompressedTensors does to the input and the output of a layer, and to keys and values, as transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from qcompile.errors import ConfigError
from qcompile.methods.compressed_tensors_args import Args

if TYPE_CHECKING:
    from qcompile.transform import Applied, Transform

Read = Callable[[str], torch.Tensor]  # the stored tensor of a suffix, such as "scale"
_ELEMENTS = {8: "f8e4m3", 6: "e2m3", 4: "e2m1"}


def suffixes(args: Args) -> tuple[str, ...]:
    """The ends of the names of what a rounding stores: of what it does not find out while running."""
    if args.dynamic is True:
        return ()
    if args.strategy == "tensor_group":
        return ("global_scale",)
    return ("scale",) if args.symmetric else ("scale", "zero_point")


def rounding(args: Args, width: int, read: Read, where: str) -> Applied:
    """The rounding of rows [width]; ConfigError for what the package computes on no device, or only with calibration."""
    from qcompile.transform import Applied

    per, small = args.strategy, args.type == "float" and args.num_bits == 4
    legal = per in ("token", "tensor", "group") or (per == "tensor_group" and small)
    if not legal or (args.dynamic is False and per != "tensor") or (args.type == "float" and not args.symmetric):
        raise ConfigError(
            "this rounding of activations is not supported",
            where=where,
            found=", ".join(f"{name}: {value!r}" for name, value in args.to_dict().items()),
            expected="per token or group while running, per tensor, or 'tensor_group' with a stored global scale; "
            "symmetric for floats",
            remedy="leave the module out by 'ignore', or take the activations out of the scheme",
        )
    if per in ("group", "tensor_group") and width % (args.group_size or 1):
        raise ConfigError(
            "the groups of activations do not divide the layer's width",
            where=where,
            found=f"width {width}",
            expected=f"a multiple of {args.group_size}",
            remedy="leave the module out by 'ignore'",
        )
    if args.type == "int":
        return _integers(args, read)
    if args.mx:
        return Applied(_mx(args))
    if per == "tensor_group":
        from qcompile.transforms.round_float import RoundNvfp4

        whole = read("global_scale") if args.dynamic == "local" else torch.ones(1)
        return Applied(RoundNvfp4(size=args.group_size or 16), {"tensor_scale": whole.reshape(1).float()})
    return _floats(args, read)


def cache_rounding(args: Args, heads: int, width: int, read: Read, where: str) -> Applied:
    """The rounding of keys or values [B, heads, S, width]: of a token is of all positions of a head, as the package has it."""
    from qcompile.transform import Applied
    from qcompile.transforms.rounding import Rounding

    per_head = args.strategy == "attn_head"
    made = rounding(replace(args, strategy="tensor") if per_head else args, width, read, where)
    if args.strategy not in ("token", "attn_head"):
        return made
    plain = cast(Rounding, made.transform)
    if not per_head:
        return Applied(replace(plain, per="head"), made.tensors)
    tensors = {name: tensor.reshape(heads, 1, 1) for name, tensor in made.tensors.items()}
    return Applied(replace(plain, heads=heads), tensors)


def _integers(args: Args, read: Read) -> Applied:
    from qcompile.dtypes import NAMES
    from qcompile.transform import Applied
    from qcompile.transforms.round_int import RoundInt

    low, high = (int(limit) for limit in args.limits)
    tensors = {name.removesuffix("_point"): _one(read(name)) for name in suffixes(args)}
    made = RoundInt(
        per=args.strategy,  # type: ignore[arg-type]
        size=args.group_size or 0 if args.strategy == "group" else 0,
        scale=NAMES[tensors["scale"].dtype] if tensors else "",
        low=low,
        high=high,
        symmetric=args.symmetric,
        zero=NAMES[tensors["zero"].dtype] if "zero" in tensors else "",
    )
    return Applied(made, tensors)


def _floats(args: Args, read: Read) -> Applied:
    from qcompile.dtypes import NAMES
    from qcompile.transform import Applied
    from qcompile.transforms.round_float import RoundFloat

    tensors = {name: _one(read(name)) for name in suffixes(args)}
    made = RoundFloat(
        per=args.strategy,  # type: ignore[arg-type]
        size=args.group_size or 0 if args.strategy == "group" else 0,
        scale=NAMES[tensors["scale"].dtype] if tensors else "",
        element=_ELEMENTS[args.num_bits],  # type: ignore[arg-type]
    )
    return Applied(made, tensors)


def _one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1) if tensor.numel() == 1 else tensor


def _mx(args: Args) -> Transform:
    from qcompile.transforms.round_float import RoundMx

    return RoundMx(
        element=_ELEMENTS[args.num_bits],  # type: ignore[arg-type]
        size=args.group_size or 32,
        rule="even3" if args.num_bits == 6 else "even1",
        shift=8 if args.num_bits == 8 else 2,
    )


def stored(applied: Applied, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a rounding by the package's names; `what` is "input", "output", "k" or "v"."""
    names = {"scale": "scale", "zero": "zero_point", "tensor_scale": "global_scale"}
    return {f"{what}_{names[name]}": tensor for name, tensor in applied.tensors.items()}
