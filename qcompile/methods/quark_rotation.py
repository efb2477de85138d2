"""Quark's rotations of inputs while a model runs (online R1, R4): a stored matrix, and perhaps a scale before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qcompile.dtypes import NAMES
from qcompile.errors import CheckpointError
from qcompile.methods import stored
from qcompile.methods.rotations import rotation
from qcompile.transforms.linear import Hadamard, Rotate, Scale

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

_DTYPES = ("i8", "f32", "f16", "bf16", "float64")


def names(online: Sequence[str], there: Mapping[str, str], module: Module, source: TensorSource) -> dict[str, str]:
    """The tensors of a module's rotation by their names in it: its own matrix, or one that layers of its size share."""
    if "input_rotation" in there:
        found = there["input_rotation"]
    elif module.path in online:
        shared = f"shared_input_rotation_{module.k}"
        every = [name for name in source.names() if name.rpartition(".")[2] == shared]
        if not every:
            raise CheckpointError(
                "a module whose input is rotated has no matrix",
                where=module.path,
                found=", ".join(sorted(there)),
                expected=f"input_rotation, or {shared} for all modules with {module.k} inputs",
                remedy="the checkpoint is incomplete: algo_config names this module in online_rotation_layers",
            )
        found = every[0]
    else:
        return {}
    size = source.info(found).shape[0] if source.info(found).shape else 0
    shape = (size, size) if size and module.k % size == 0 else (module.k, module.k)
    stored.expect(found, source, _DTYPES, shape, module)
    if "input_prescale" not in there:
        return {"input_rotation": found}
    stored.expect(there["input_prescale"], source, ("f32", "f16", "bf16"), (module.k,), module)
    return {"input_rotation": found, "input_prescale": there["input_prescale"]}


def read(found: Mapping[str, str], module: Module, source: TensorSource) -> tuple[Applied, ...]:
    """The transforms of the module's input."""
    from qcompile.transform import Applied

    if not found:
        return ()
    matrix = source.read(found["input_rotation"])
    whole = stored.finite(matrix, found["input_rotation"], module).double()
    if matrix.dtype == torch.int8:  # 1 and -1
        whole = whole / len(whole) ** 0.5
    turns = rotation(whole, module.k)
    if "input_prescale" not in found:
        return turns
    scale = stored.finite(source.read(found["input_prescale"]), found["input_prescale"], module)
    return (Applied(Scale(NAMES[scale.dtype]), {"scale": scale}), *turns)


def written(packed: Packed, module: Module) -> dict[str, torch.Tensor]:
    """The matrix of the transforms again, of 1 and -1 where it is a Hadamard matrix, and what x is scaled by first."""
    turns = [each for each in packed.before if isinstance(each.transform, Hadamard | Rotate | Scale)]
    if not turns:
        return {}
    size = next(each.transform.size for each in turns if isinstance(each.transform, Hadamard | Rotate))
    made, first = {}, turns[0]
    if isinstance(first.transform, Scale) and not bool((first.tensors["scale"].abs() == 1).all()):
        made["input_prescale"] = first.tensors["scale"]
        turns = turns[1:]
    matrix = torch.eye(module.k)[:size]
    for each in turns:
        matrix = each(matrix)
    matrix = matrix[:, :size]
    signs = torch.round(matrix * size**0.5)
    hadamard = torch.allclose(signs, matrix * size**0.5, atol=1e-4) and bool((signs.abs() == 1).all())
    return made | {"input_rotation": signs.to(torch.int8) if hadamard else matrix.contiguous()}
