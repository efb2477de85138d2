"""TorchAO's tensor classes: which parts of a weight a file holds, what its header says of them, and what they are here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompile.dtypes import NAMES
from qcompile.format import Format, Packed
from qcompile.methods.torchao_recipes import Per
from qcompile.transform import Applied
from qcompile.transforms.linear import Scale

Parts = Mapping[str, Tensor]
Expected = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]

FLOATS = ("f32", "f16", "bf16")
LONG = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "e2m1": "float4_e2m1fn_x2",
}
SHORT = {long: short for short, long in LONG.items()}


@dataclass(frozen=True)
class AoTensor(ABC):
    """A weight [n, k] of dtype `dtype` as one of torchao's classes stores it: its parts are tensors "_weight_<part>"."""

    type: ClassVar[str]
    optional: ClassVar[tuple[str, ...]] = ()

    n: int
    k: int
    dtype: str = "bf16"

    @abstractmethod
    def expected(self) -> Expected:
        """Each part with the dtypes and the shape that it may have."""

    @abstractmethod
    def format(self, dtypes: Mapping[str, str]) -> Format:
        """The format of the weight, from the dtypes of the parts that say something (zero points may be all 0)."""

    @abstractmethod
    def stored(self, parts: Parts) -> dict[str, Tensor]:
        """The format's stored tensors, from the parts."""

    @abstractmethod
    def parts(self, packed: Packed) -> dict[str, Tensor]:
        """The parts again, from the packed weight and the transform before it."""

    @abstractmethod
    def round(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts that torchao makes of a float weight [n, k]."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What the file's header says beside the class and the parts."""

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        """What happens to x."""
        return prescaled(parts)

    def packed(self, parts: Parts) -> Packed:
        """The parts as a packed weight."""
        useful = {name: part for name, part in parts.items() if name != "zero_point" or self.counts(part)}
        fmt = self.format({name: NAMES[part.dtype] for name, part in useful.items()})
        return Packed(fmt, self.stored(useful), self.n, self.k, self.before(parts))

    def counts(self, zero: Tensor) -> bool:
        """True when zero points change anything."""
        return bool(zero.any())


def prescaled(parts: Parts) -> tuple[Applied, ...]:
    """The scale for each input by which x is multiplied first, if there is one (AWQ, SmoothQuant)."""
    scale = parts.get("act_pre_scale")
    return () if scale is None else (Applied(Scale(NAMES[scale.dtype]), {"scale": scale.reshape(-1)}),)


def kept(packed: Packed) -> dict[str, Tensor]:
    """The part that `prescaled` came from."""
    found = next((each.tensors["scale"] for each in packed.before if isinstance(each.transform, Scale)), None)
    return {} if found is None else {"act_pre_scale": found}


def tagged(kind: str, data: Any) -> dict[str, Any]:
    """A typed value in the header's JSON."""
    return {"_type": kind, "_data": data}


def dtype(name: str) -> dict[str, Any]:
    """A dtype in the header's JSON."""
    return tagged("torch.dtype", LONG.get(name, name))


def granularity(per: Per) -> dict[str, Any]:
    """A granularity in the header's JSON."""
    names = {"PerRow": "dim", "PerAxis": "axis", "PerGroup": "group_size"}
    if per.kind == "PerBlock":
        return tagged(per.kind, {"block_size": list(per.sizes)})
    return tagged(per.kind, {names[per.kind]: per.sizes[0]} if per.sizes else {})


def rows_columns(block: tuple[int, int], n: int, k: int) -> tuple[int, int]:
    """A block as `rows` and `columns` of a format, where 0 means all of them."""
    return (1 if block[0] == 1 else 0 if block[0] == n else block[0]), (0 if block[1] == k else block[1])


def scales(block: tuple[int, int], n: int, k: int) -> tuple[int, int]:
    """How many scales there are."""
    return n // block[0], k // block[1]


def zeros_like(scale: Tensor) -> Tensor:
    """Zero points that change nothing."""
    return torch.zeros(scale.shape, dtype=torch.int8)
