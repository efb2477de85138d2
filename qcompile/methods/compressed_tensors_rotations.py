"""CompressedTensors' rotations that run with the model (QuIP, SpinQuant); others are in the stored weights and leave no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import stored
from qcompile.methods.compressed_tensors_args import ONLINE, Place, Rotation
from qcompile.methods.compressed_tensors_config import CompressedTensorsConfig, hits, is_class
from qcompile.methods.rotations import rotation as by_matrix

if TYPE_CHECKING:
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied


@dataclass(frozen=True)
class Turn:
    """One use of a rotation: rows in blocks of `size` go through its matrix, or the inverse of that.

    `names` holds the stored tensors: "weight" [size, size], without one it is the plain Hadamard matrix; "perm" [size],
    the order in which the matrix takes rows and columns.
    """

    group: str
    rotation: Rotation
    inverse: bool
    size: int
    names: Mapping[str, str]

    def inverted(self) -> Turn:
        """The turn that undoes this one; of Hadamard matrices only."""
        return replace(self, inverse=not self.inverse)

    def read(self, width: int, source: TensorSource) -> tuple[Applied, ...]:
        """The transforms of rows [width]."""
        from qcompile.transform import Applied
        from qcompile.transforms.linear import Hadamard

        if "weight" not in self.names:
            return (Applied(Hadamard(self.size)),)
        name = self.names["weight"]
        matrix = stored.finite(source.read(name), name, self.group).double()
        if "perm" in self.names:
            name = self.names["perm"]
            order = stored.each_once(source.read(name).long(), self.size, "row", f"{name} (transform {self.group!r})")
            matrix = matrix[order][:, order]
        if self.rotation.type != "random-matrix":  # entries 1 and -1; the inverse is the transposed
            matrix = (matrix.t() if self.inverse else matrix) / self.size**0.5
        return by_matrix(matrix, width)


def of_module(config: CompressedTensorsConfig, module: Module, location: str, source: TensorSource) -> tuple[Turn, ...]:
    """What turns the module's input or output, in the order in which it happens."""
    found = []
    for group, rotation, place in _places(config, location):
        if _named(place.targets, module) and not _named(place.ignore, module):
            if module.kind != "Linear":
                raise ConfigError(
                    "a transform of an embedding does not run with the model",
                    where=f"{module.path}, transform {group!r}",
                    found=location,
                    expected="weight_output",
                    remedy="quantize the model anew without this transform",
                )
            prefix, width = module.weight.removesuffix("weight"), module.k if location == "input" else module.n
            found.append(_turn(group, rotation, place, prefix, width, source))
    return tuple(reversed(found) if location == "input" else found)  # hooks in front of a layer: the last comes first


def of_attention(
    config: CompressedTensorsConfig, path: str, width: int, source: TensorSource
) -> tuple[list[Turn], list[str]]:
    """What turns the keys of an attention module, and, as is checked, its queries in the same way; the stored tensors."""

    def turns(location: str) -> list[Turn]:
        return list(
            _turn(group, rotation, place, f"{path}.", width, source)
            for group, rotation, place in _places(config, location)
            if _names(place.targets, path) and not _names(place.ignore, path)
        )

    q, k = turns("q_attn"), turns("k_cache")
    said = [[(turn.group, turn.inverse, turn.rotation.type) for turn in side] for side in (q, k)]
    if said[0] != said[1] or any(turn.rotation.type == "random-matrix" for turn in q):
        raise ConfigError(
            "transforms of queries and keys do not cancel",
            where=f"{path}, field 'transform_config'",
            found=f"q_attn {said[0]}, k_cache {said[1]}",
            expected="the same Hadamard transforms of both",
            remedy="quantize the model anew: attention would not be that of the original",
        )
    return k, sorted({name for turn in (*q, *k) for name in turn.names.values()})


def _places(config: CompressedTensorsConfig, location: str) -> list[tuple[str, Rotation, Place]]:
    every = config.rotations.items()
    return [
        (group, rotation, place) for group, rotation in every for place in rotation.apply if place.location == location
    ]


def _named(targets: Sequence[str], module: Module) -> bool:
    return any(hits(target, module.path) or is_class(target, module) for target in targets)


def _names(targets: Sequence[str], path: str) -> bool:
    """Whether targets name an attention module; the name of its class is not known here."""
    return any(hits(target, path) or target.endswith("Attention") for target in targets)


def _turn(group: str, rotation: Rotation, place: Place, prefix: str, width: int, source: TensorSource) -> Turn:
    size = rotation.head_dim or width
    plain = rotation.type == "hadamard" and not rotation.randomize
    if width % size or (plain and size & (size - 1)):
        raise ConfigError(
            "a transform does not fit what it acts on",
            where=f"{prefix}{group}_{place.location}, transform {group!r}",
            found=f"blocks of {size} for a width of {width}",
            expected="a divisor of the width, and a power of two for 'hadamard'",
            remedy="check that the checkpoint belongs to this config.json",
        )
    names = {}
    for part, shape in {"weight": (size, size), "perm": (size,)}.items():
        if part == "perm" and not (rotation.randomize and "hadamard" in rotation.type):
            continue
        found = _stored(group, rotation, place, f"{prefix}{group}_{place.location}.", part, shape, source)
        if found:
            names[part] = found
        elif not plain:
            raise CheckpointError(
                "a transform lacks its matrix",
                where=f"{prefix}{group}_{place.location}.{part}",
                found="no such tensor, and none of another module that it could share",
                expected=f"{list(shape)}",
                remedy="the checkpoint is incomplete: it must hold the matrices of transforms that run with the model",
            )
    return Turn(group, rotation, place.inverse, size, names)


def _stored(
    group: str, rotation: Rotation, place: Place, prefix: str, part: str, shape: tuple[int, ...], source: TensorSource
) -> str:
    """The name of a stored part: the module's own, or the one that all modules with such a transform share; "": none.

    A checkpoint holds shared tensors once. Inverses of matrices that are no Hadamard matrices are matrices of their own.
    """
    names = source.names()
    if prefix + part in names:
        if tuple(source.info(prefix + part).shape) != shape:
            raise CheckpointError(
                "a transform's matrix has another shape than what it acts on",
                where=prefix + part,
                found=list(source.info(prefix + part).shape),
                expected=list(shape),
                remedy="the checkpoint and its quantization_config do not belong together",
            )
        return prefix + part
    apart = rotation.type == "random-matrix"
    alike = {p.location for p in rotation.apply if p.location in ONLINE and not (apart and p.inverse != place.inverse)}
    ends = tuple(f".{group}_{location}.{part}" for location in alike)
    found = [name for name in names if name.endswith(ends) and tuple(source.info(name).shape) == shape]
    if len(found) > 1:
        raise CheckpointError(
            "it is not clear which matrix a transform shares",
            where=prefix + part,
            found=", ".join(found[:6]),
            expected=f"{prefix + part}, or one tensor {list(shape)} for all modules",
            remedy="the checkpoint is incomplete",
        )
    return found[0] if found else ""
