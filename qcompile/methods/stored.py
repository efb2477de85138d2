"""Reading the stored tensors of a quantized module: what must be there, in which shape, and with finite numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qcompile.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource


def tensors(source: TensorSource, module: Module) -> dict[str, str]:
    """The source tensors of a module: the name within the module -> the whole name."""
    start = module.weight.removesuffix("weight")
    return {name[len(start) :]: name for name in source.names().under(start)}


def require(names: Mapping[str, str], wanted: Sequence[str], module: Module, method: str) -> None:
    """Raise CheckpointError unless the module's tensors `names` hold every one of `wanted`."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CheckpointError(
            f"a module quantized with {method} lacks a stored tensor",
            where=module.path,
            found=", ".join(sorted(names)) or "no tensor of the module",
            expected=", ".join(wanted),
            remedy="the checkpoint is incomplete: it must hold "
            + ", ".join(f"{module.path}.{name}" for name in missing),
        )


def refuse_both(names: Mapping[str, str], quantized: str, module: Module, method: str) -> None:
    """Raise CheckpointError when a module has a dense `weight` beside the tensor that marks it as quantized."""
    if quantized in names and "weight" in names:
        raise CheckpointError(
            f"a module quantized with {method} also has a dense weight",
            where=module.path,
            found=f"{names['weight']} and {names[quantized]}",
            expected="one of them",
            remedy="the checkpoint says the weight twice: remove the one that is not meant",
        )


def need_dense(names: Mapping[str, str], quantized: str, module: Module, method: str) -> None:
    """Raise CheckpointError when a module has neither a dense weight nor the tensor that marks it as quantized."""
    if module.weight not in names.values() and quantized not in names:
        raise CheckpointError(
            "a module has no weight in the checkpoint",
            where=module.path,
            found=", ".join(sorted(names)) or "no tensor of the module",
            expected=f"{module.weight}, or {quantized} as {method} stores it",
            remedy="the checkpoint is incomplete, or it belongs to another architecture",
        )


def legal(fmt: Format, module: Module, method: str) -> None:
    """Raise ConfigError when `fmt` cannot hold a weight of the module's shape, with the format's own reason."""
    for problem in fmt.check(module.n, module.k):
        raise ConfigError(
            f"{method} cannot store this module's weight",
            where=f"{module.path} [{module.n}, {module.k}]",
            found=problem.found,
            expected=problem.expected,
            remedy=problem.remedy
            or "choose another group size or method, or leave the module dense by the config's skip list",
        )


def expect(name: str, source: TensorSource, dtypes: Sequence[str], shape: Sequence[int], module: Module) -> None:
    """Raise CheckpointError unless the source tensor has one of `dtypes` and the shape, judged by its header."""
    info = source.info(name)
    if info.dtype not in dtypes or tuple(info.shape) != tuple(shape):
        wrong = "shape" if info.dtype in dtypes else "dtype"
        raise CheckpointError(
            f"a stored tensor has the wrong {wrong}",
            where=f"{name} (module {module.path}, {module.n} outputs, {module.k} inputs)",
            found=f"{info.dtype} {list(info.shape)}",
            expected=f"{' or '.join(dtypes)} {list(shape)}",
            remedy="the checkpoint and its quantization_config do not belong together, or a file is damaged",
        )


def expect_all(fmt: Format, names: Mapping[str, str], source: TensorSource, module: Module) -> None:
    """`expect` for every stored tensor of the format; `names` maps its name to the source's."""
    for stored in fmt.stored(module.n, module.k):
        expect(names[stored.name], source, (stored.dtype,), stored.shape, module)


def check_groups(index: torch.Tensor, groups: int, name: str, module: Module) -> None:
    """CheckpointError unless each entry of the stored tensor `name`, the group of each input, is in 0 .. groups - 1."""
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= groups:
        raise CheckpointError(
            "a group index is out of range",
            where=f"{name} (module {module.path})",
            found=f"{least} to {most}",
            expected=f"0 to {groups - 1}",
            remedy="the file is damaged, or group_size is not the one it was made with",
        )


def finite(tensor: torch.Tensor, name: str, module: Module | str) -> torch.Tensor:
    """The tensor of a module (or of the module of a path), if every number in it is finite.

    CheckpointError with the first place where one is not.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        place = (~torch.isfinite(tensor.float())).nonzero()[0].tolist()
        raise CheckpointError(
            "a stored tensor holds a number that is not finite",
            where=f"{name} (module {module if isinstance(module, str) else module.path})",
            found=f"{tensor[tuple(place)].item()} at {place}",
            expected="finite numbers",
            remedy="the file is damaged, or the quantization that wrote it failed for this module",
        )
    return tensor


def exponents(tensor: torch.Tensor, name: str, module: Module) -> torch.Tensor:
    """The exponents u8 of a module's powers of two, if none of them is 255; CheckpointError with the first that is."""
    if bool((tensor == 255).any()):
        raise CheckpointError(
            "a stored tensor holds a number that is not finite",
            where=f"{name} (module {module.path})",
            found=f"the byte 255 at {(tensor == 255).nonzero()[0].tolist()}",
            expected="exponents from 0 to 254",
            remedy="the file is damaged, or the quantization that wrote it failed for this module",
        )
    return tensor


def load(fmt: Format, names: Mapping[str, str], source: TensorSource, module: Module) -> Packed:
    """The packed weight, read tensor by tensor and checked."""
    return packed(fmt, {name: finite(source.read(full), full, module) for name, full in names.items()}, module)


def packed(fmt: Format, tensors: dict[str, torch.Tensor], module: Module) -> Packed:
    """The stored tensors as a packed weight of the module, checked."""
    from qcompile.format import Packed

    result = Packed(fmt, tensors, module.n, module.k)
    result.check(module.path)
    return result


def usable(weight: torch.Tensor, module: Module) -> torch.Tensor:
    """A float weight [N, K] to be quantized, as float32; CheckpointError when it holds a number that is not finite."""
    return finite(weight, module.weight, module).float()


def permutation(order: torch.Tensor, name: str, module: Module) -> torch.Tensor:
    """The order of a module's inputs, i64 [K]; CheckpointError unless it names each of them once."""
    return each_once(order, module.k, "input", f"{name} (module {module.path})")


def each_once(order: torch.Tensor, count: int, what: str, where: str) -> torch.Tensor:
    """`order` itself; CheckpointError unless it names each of `count` inputs, rows ... (`what`) once."""
    if not torch.equal(order.sort().values, torch.arange(count)):
        raise CheckpointError(
            f"a stored order does not name each {what} once",
            where=where,
            found=f"{len(set(order.tolist()))} {what}s, {int(order.min())} to {int(order.max())}",
            expected=f"{count} {what}s, 0 to {count - 1}",
            remedy="the file is damaged, or belongs to another architecture",
        )
    return order


def dtypes(names: Sequence[str], allowed: Sequence[str], source: TensorSource, module: Module) -> None:
    """`expect` for the dtypes alone, of tensors whose shape is not known yet."""
    for name in names:
        expect(name, source, allowed, source.info(name).shape, module)
