"""What outlives a call: the key and value caches of one conversation, growing as it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from qcompile.artifact import Buffer
from qcompile.dims import evaluate
from qcompile.dtypes import DTYPES
from qcompile.errors import ConfigError
from qcompile.runtime.memory import empty

CAPACITY = "c"
LEAST_CAPACITY = 64


class State:
    """The state tensors of a program for `batch` sequences: `tensors` by name, of which `length` slots are filled.

    Shapes name the batch size `b` and the capacity `c` (slots). `past` [1] (i64) holds `length`; `first` [b] (i64) is
    the first slot of each sequence that is not padding. A state belongs to one caller at a time.
    """

    def __init__(self, buffers: Iterable[Buffer], batch: int, device: torch.device | str = "cpu"):
        self.buffers, self.batch, self.device = tuple(buffers), batch, torch.device(device)
        self.capacity = self.length = 0
        self.past = empty((1,), torch.int64, self.device)
        self.first = empty((batch,), torch.int64, self.device)
        self.tensors: dict[str, torch.Tensor] = {}

    @property
    def sizes(self) -> Mapping[str, int]:
        """The sizes that the state decides."""
        return {CAPACITY: self.capacity} if self.buffers else {}

    def reset(self) -> None:
        """Forget the conversation, keep the memory."""
        self.advance(-self.length)
        self.first.zero_()

    def advance(self, slots: int) -> None:
        """Count `slots` more slots as filled."""
        self.length += slots
        self.past += slots

    def reserve(self, slots: int, most: int | None = None) -> None:
        """Make room for `slots` slots in all: the next power of two, at most `most`. What is filled stays."""
        if most is not None and slots > most:
            raise ConfigError(
                "a sequence is longer than the model was compiled for",
                found=f"{slots} positions",
                expected=f"at most {most}",
                remedy="compile with a greater limit, or shorten the prompt",
            )
        if slots <= self.capacity:
            return
        capacity = max(LEAST_CAPACITY, 1 << (slots - 1).bit_length())
        self._grow(min(capacity, most) if most is not None else capacity)

    def _grow(self, capacity: int) -> None:
        sizes = {"b": self.batch, CAPACITY: capacity}
        for buffer in self.buffers:
            shape = [evaluate(dim, sizes) for dim in buffer.shape]
            # Zeros: a kernel may load a whole tile of slots, and 0 * whatever was there must be 0.
            larger = empty(shape, DTYPES[buffer.dtype], self.device)
            if self.length and CAPACITY in buffer.shape:
                axis = buffer.shape.index(CAPACITY)
                kept = self.tensors[buffer.name].narrow(axis, 0, self.length)
                larger.narrow(axis, 0, self.length).copy_(kept)
            self.tensors[buffer.name] = larger
        self.capacity = capacity
