"""A session, whatever runs it: what generation and a compiled model ask of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from qcompile.artifact import Buffer
from qcompile.runtime.inputs import Signature
from qcompile.runtime.state import State

Outputs = dict[str, torch.Tensor]


class Runner(ABC):
    """A program ready to run on `device`, where its states and outputs are.

    `ahead` is how many steps a loop may start before it looks at what the first of them made.
    """

    signature: Signature
    states: tuple[Buffer, ...]
    device: torch.device
    ahead = 0

    def new_state(self, batch: int) -> State:
        """An empty conversation of `batch` sequences."""
        return State(self.states, batch, self.device)

    @abstractmethod
    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        state: State | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
    ) -> Outputs:
        """Outputs by name for `inputs` by name, continuing `state`; those in `out` may be written to instead of new ones."""

    def repeated(
        self, inputs: Mapping[str, torch.Tensor], state: State, then: Callable[[Outputs], None]
    ) -> Callable[[], None]:
        """A function that runs one step on `inputs`, tensors on `device`, and then `then(outputs)`.

        `then` changes the inputs for the next step. It may not look at what a tensor holds: where steps are recorded
        and replayed, it is called once.
        """
        out: Outputs = {}

        def step() -> None:
            nonlocal out
            out = self(inputs, state, out)
            then(out)

        return step

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that waits for a copy on the CPU of what `tensor` holds when all that was started is done."""
        copy = tensor.to("cpu", copy=True)
        return lambda: copy
