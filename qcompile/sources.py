"""Where the tensors of a model come from: what every source of them offers, live modules, and sources seen in another way."""

from __future__ import annotations

import bisect
import functools
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import torch

from qcompile.dtypes import NAMES
from qcompile.errors import CheckpointError, near


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype that a source may hold: those of `dtypes.DTYPES`, and torch's own word for any other."""
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class TensorInfo:
    """What `read` gives: `dtype` as in `dtypes.DTYPES` and `shape`.

    `encoding` names the block type of a GGUF tensor (such as "q4_1"), whose value is u8 [N, bytes of a row]; "" for any
    tensor that is what it looks like.
    """

    dtype: str
    shape: tuple[int, ...]
    encoding: str = ""


class Names(Sequence[str]):
    """The names of a source's tensors, in its order. Neither `in` nor `under` looks at all of them.

    >>> names = Names(["b.weight", "a.bias", "a.weight"])
    >>> list(names), "a.bias" in names, names.under("a.")
    (['b.weight', 'a.bias', 'a.weight'], True, ['a.bias', 'a.weight'])
    """

    def __init__(self, names: Iterable[str]):
        self._names = tuple(names)
        self._there = frozenset(self._names)

    @functools.cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._names)

    def under(self, prefix: str) -> list[str]:
        """The names that start with `prefix`, sorted."""
        start = end = bisect.bisect_left(self._sorted, prefix)
        while end < len(self._sorted) and self._sorted[end].startswith(prefix):
            end += 1
        return self._sorted[start:end]

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...

    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        return self._names[at]


class TensorSource(Protocol):
    """Named tensors that are read one at a time; a name that is not there is a CheckpointError."""

    def names(self) -> Names: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str) -> torch.Tensor: ...

    def header(self) -> Mapping[str, str]:
        """What the files' headers say beside the tensors (safetensors' `__metadata__`)."""
        ...

    def sidecar(self, name: str) -> dict[str, Any] | None:
        """The JSON file `name` beside the tensors; None when there is none."""
        ...

    def describe(self) -> str: ...


def missing(name: str, source: TensorSource | Table[Any]) -> CheckpointError:
    """The error for a tensor `name` that `source` does not hold."""
    names = source.names()
    return CheckpointError(
        f"there is no tensor '{name}'{near(name, names)}",
        where=source.describe(),
        found=f"{len(names)} tensors",
        expected=name,
        remedy="check that the checkpoint is complete and belongs to this architecture",
    )


Held = TypeVar("Held")


class Table(ABC, Generic[Held]):
    """A source that knows all it holds by name: `_tensors`, complete once it is made."""

    _tensors: dict[str, Held]

    @functools.cached_property
    def _names(self) -> Names:
        return Names(self._tensors)

    def names(self) -> Names:
        return self._names

    def _held(self, name: str) -> Held:
        if name not in self._tensors:
            raise missing(name, self)
        return self._tensors[name]

    @abstractmethod
    def describe(self) -> str: ...


def tensor_at(memory: mmap.mmap, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in the bytes begin .. end - 1 of a mapped file: a view, or a copy where its elements are not aligned."""
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=begin, count=end - begin)
    if begin % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)


def listing(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "an empty folder"


@dataclass
class ModuleState(Table[torch.Tensor]):
    """The parameters and persistent buffers of a live module; a tensor that several modules share has one name."""

    module: torch.nn.Module

    def __post_init__(self) -> None:
        kept = self.module.state_dict(keep_vars=True).keys()
        named = [*self.module.named_parameters(), *((n, b) for n, b in self.module.named_buffers() if n in kept)]
        self._tensors = {name: tensor.detach() for name, tensor in named}

    def info(self, name: str) -> TensorInfo:
        tensor = self.read(name)
        return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))

    def read(self, name: str) -> torch.Tensor:
        return self._held(name)

    def header(self) -> Mapping[str, str]:
        return {}

    def sidecar(self, name: str) -> dict[str, Any] | None:
        generation: Any = getattr(self.module, "generation_config", None)
        if name == "generation_config.json" and hasattr(generation, "to_diff_dict"):
            return dict(generation.to_diff_dict())
        return None

    def describe(self) -> str:
        return f"the module {type(self.module).__name__}"


@dataclass(frozen=True)
class Wrapper:
    """A source seen in another way: what a subclass does not change is as `source` has it."""

    source: TensorSource

    def names(self) -> Names:
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name)

    def header(self) -> Mapping[str, str]:
        return self.source.header()

    def sidecar(self, name: str) -> dict[str, Any] | None:
        return self.source.sidecar(name)

    def describe(self) -> str:
        return self.source.describe()


@dataclass(frozen=True)
class Renamed(Wrapper):
    """A source whose tensors go by other names: `to` maps each new name to the name in `source`."""

    to: dict[str, str]

    @functools.cached_property
    def _names(self) -> Names:
        return Names(self.to)

    def names(self) -> Names:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self.source.info(self.old(name))

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(self.old(name))

    def old(self, name: str) -> str:
        """The name in `source`; an error that lists similar names where there is none."""
        if name not in self.to:
            raise missing(name, self)
        return self.to[name]
