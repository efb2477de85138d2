"""What a format is: which tensors are stored, where the bits of each field lie, and what a weight is worth."""

from __future__ import annotations

import functools
import importlib
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from qcompile.dtypes import DTYPES, NAMES, itemsize
from qcompile.errors import ArtifactError, CheckpointError, InternalError, near
from qcompile.expr import Expr, Operand, field, load

FORMATS: dict[str, str] = {
    "gptq": "qcompile.formats.gptq:Gptq",
    "awq": "qcompile.formats.awq:Awq",
    "awq-gemv": "qcompile.formats.awq:AwqGemv",
    "awq-gemv-fast": "qcompile.formats.awq:AwqGemvFast",
    "hqq": "qcompile.formats.hqq:Hqq",
    "bnb4": "qcompile.formats.bitsandbytes:Bnb4",
    "bnb-int8": "qcompile.formats.bitsandbytes:BnbInt8",
    "eetq": "qcompile.formats.eetq:Eetq",
    "dense": "qcompile.formats.dense:Dense",
    "gguf-q4_0": "qcompile.formats.gguf:Q4_0",
    "gguf-q4_1": "qcompile.formats.gguf:Q4_1",
    "gguf-q5_0": "qcompile.formats.gguf:Q5_0",
    "gguf-q5_1": "qcompile.formats.gguf:Q5_1",
    "gguf-q8_0": "qcompile.formats.gguf:Q8_0",
    "gguf-q6_k": "qcompile.formats.gguf:Q6_K",
    "lanes": "qcompile.formats.lanes:Lanes",
    "lanes-dense": "qcompile.formats.lanes:LanesDense",
}


@dataclass(frozen=True)
class Stored:
    """One stored tensor: its name, its dtype (a key of DTYPES) and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Operand | tuple[Operand, ...]) -> Expr:
        """The load of one element: `t.scales[k // 32, n]`."""
        return load(self.name, self.dtype, self.shape, *(index if isinstance(index, tuple) else (index,)))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Problem:
    """Why a format cannot hold a weight of some shape."""

    found: str
    expected: str
    remedy: str = ""


class Names(types.SimpleNamespace):
    """Things by name: the stored tensors given to `fields`, the fields given to `value`."""

    def get(self, name: str) -> Any:
        """The thing called `name`, None if there is none."""
        return getattr(self, name, None)


class Format(ABC):
    """A way to store a weight W [N, K] (N outputs, K inputs): a frozen dataclass whose fields are its parameters.

    A format says three things: `stored`, `fields` and `value`; reading, packing, conversion, kernels and sizes follow.
    Parameters are ints, floats, bools, strings, None and tuples of them, so a format is JSON.
    """

    kind: ClassVar[str]

    @abstractmethod
    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        """The stored tensors of a weight [N, K], in order."""

    @abstractmethod
    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        """Where each field of W[n, k] lies: `t.<name>[i, j]` loads.

        Addresses and bits only, so that the packer can walk them backwards; `bits(x + constant, ...)` is
        allowed. A stored index that other addresses use (GPTQ's g_idx) is a field too.
        """

    @abstractmethod
    def value(self, f: Any) -> Expr:
        """What W[n, k] is worth, f32, from its fields `f.<name>`, with every rounding that the method makes."""

    def check(self, N: int, K: int) -> list[Problem]:
        """Why this format cannot hold [N, K]; empty when it can."""
        return []

    def group_size(self, N: int, K: int) -> int | None:
        """The longest aligned run of inputs over which only the code changes; None when that depends on stored data."""
        return None

    def bits_per_weight(self, N: int, K: int) -> float:
        """Stored bits over weights, everything counted."""
        return 8 * sum(s.nbytes for s in self.stored(N, K)) / (N * K)

    def located(self, N: int, K: int) -> dict[str, Expr]:
        """`fields` with the stored tensors bound, each wrapped in a `field` node of its name."""
        t = Names(**{s.name: s for s in self.stored(N, K)})
        return {name: field(name, expr) for name, expr in self.fields(t, N, K).items()}

    def weight(self, N: int, K: int) -> Expr:
        """W[n, k] as one f32 expression over the stored tensors."""
        value = self.value(Names(**self.located(N, K)))
        if value.dtype != "f32":
            raise InternalError(f"format '{self.kind}' has a value that is not f32", found=repr(value))
        return value

    def to_json(self) -> dict[str, Any]:
        """{"kind": ..., parameter: value}; tuples become lists."""
        values = {f.name: getattr(self, f.name) for f in fields(typing.cast(Any, self))}
        return {"kind": self.kind} | {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def format_class(kind: str) -> type[Format]:
    """The class registered for `kind`; ArtifactError for an unknown one."""
    if not isinstance(kind, str) or kind not in FORMATS:
        hint = near(str(kind), FORMATS)
        raise ArtifactError(f"unknown format{hint}", found=repr(kind), expected=", ".join(FORMATS))
    module, name = FORMATS[kind].split(":")
    found: type[Format] = getattr(importlib.import_module(module), name)
    if found.kind != kind:
        raise InternalError("the format table names the wrong class", found=f"kind {found.kind!r}", expected=kind)
    return found


def format_from_json(data: Mapping[str, Any]) -> Format:
    """The format that `to_json` described; ArtifactError for an unknown kind, or an unknown or mistyped parameter.

    >>> format_from_json({"kind": "dense", "dtype": "f16"})
    Dense(dtype='f16')
    """
    cls = format_class(data.get("kind", ""))
    hints = _hints(typing.cast(Any, cls))
    known = {f.name: f for f in fields(typing.cast(Any, cls))}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "kind":
            continue
        if name not in known:
            hint = near(name, known)
            raise ArtifactError(f"format '{cls.kind}' has no parameter '{name}'{hint}", expected=", ".join(known))
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[name]):
            expected = str(known[name].type)
            raise ArtifactError(f"format '{cls.kind}' has a wrong '{name}'", found=repr(value), expected=expected)
        values[name] = value
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


@dataclass
class Packed:
    """A weight [N, K] in some format: the stored tensors by name."""

    format: Format
    tensors: dict[str, torch.Tensor]
    N: int
    K: int

    def check(self, where: str = "") -> None:
        """CheckpointError unless the format can hold [N, K] and each tensor has the dtype and shape it stores."""
        for problem in self.format.check(self.N, self.K):
            raise CheckpointError(
                f"format '{self.format.kind}' cannot hold a weight [{self.N}, {self.K}]",
                where=where,
                found=problem.found,
                expected=problem.expected,
                remedy=problem.remedy,
            )
        stored = {s.name: s for s in self.format.stored(self.N, self.K)}
        if stored.keys() != self.tensors.keys():
            raise CheckpointError(
                f"the stored tensors are not those of format '{self.format.kind}'",
                where=where,
                found=", ".join(sorted(self.tensors)),
                expected=", ".join(sorted(stored)),
            )
        for name, s in stored.items():
            tensor = self.tensors[name]
            found = f"{NAMES.get(tensor.dtype, str(tensor.dtype))} {list(tensor.shape)}"
            if tensor.dtype != DTYPES[s.dtype] or tuple(tensor.shape) != s.shape:
                raise CheckpointError(
                    f"stored tensor '{name}' has the wrong dtype or shape",
                    where=where,
                    found=found,
                    expected=f"{s.dtype} {list(s.shape)}",
                )
