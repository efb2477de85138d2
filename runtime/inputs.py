"""Checks what a caller passes in: names, dtypes and shapes against a program's ports; finds the named sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from qcompile.artifact import Buffer, Port
from qcompile.dims import Dim, evaluate, names
from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ArtifactError, ConfigError, near
from qcompile.runtime.state import CAPACITY, State

PAST, START, LENGTH, BATCH = "past", "start", "s", "b"


def check_indices(name: str, tensor: torch.Tensor, below: int) -> None:
    """ConfigError unless every element of an integer tensor is in 0 .. below - 1."""
    if tensor.numel() == 0:
        return
    least, greatest = (int(value) for value in torch.aminmax(tensor))
    if least < 0 or greatest >= below:
        raise ConfigError(
            "an index is out of range", where=name, found=least if least < 0 else greatest, expected=f"0 to {below - 1}"
        )


class Signature:
    """The inputs of a program: `ports`, the buffers they fill, the bounds of the named sizes.

    `longest` is how many positions a conversation may have, None where nothing says so.
    """

    def __init__(self, ports: Iterable[Port], buffers: Mapping[str, Buffer], limits: Mapping[str, tuple[int, int]]):
        self.ports, self.limits = {port.name: port for port in ports}, limits
        # A position past what one prompt may have is past what the model knows.
        bounds = [limits[name][1] for name in (LENGTH, CAPACITY) if name in limits]
        self.longest = min(bounds) if bounds else None
        self.below: dict[str, Dim] = {
            port.name: below for port in self.ports.values() if (below := buffers[port.view.buffer].below) is not None
        }

    def accept(
        self, inputs: Mapping[str, torch.Tensor], state: State | None, stateful: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The inputs with those that come from `state`, and the named sizes; makes room in the state for the new slots.

        ConfigError for a missing, unknown or misshapen input, a dtype that cannot convert, or a size out of range.
        """
        if stateful and state is None:
            raise ConfigError(
                "this program continues a conversation", found="no state", expected="state=session.new_state(batch)"
            )
        given = dict(inputs)
        if state is not None:
            given[PAST], given[START] = state.past, state.first
            given = {name: tensor for name, tensor in given.items() if name in self.ports or name in inputs}
        if given.keys() != self.ports.keys():
            self._names(given)
        sizes = {} if state is None else {BATCH: state.batch}
        later: list[tuple[str, int, Dim, int]] = []
        for name, port in self.ports.items():
            tensor = given[name]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != DTYPES[port.dtype]:
                self._dtype(name, tensor, port)
            self._shape(name, tensor, port, sizes, later)
        for name, (least, most) in self.limits.items():
            if name in sizes and not least <= sizes[name] <= most:
                raise ConfigError(
                    f"the size {name!r} is out of range", found=sizes[name], expected=f"{least} to {most}"
                )
        if state is not None:
            state.reserve(state.length + sizes[LENGTH], self.longest)
            sizes.update(state.sizes)
        for name, axis, dim, found in later:
            if evaluate(dim, sizes) != found:
                raise ConfigError(
                    "an input has the wrong shape",
                    where=name,
                    found=f"{found} at axis {axis}",
                    expected=f"{evaluate(dim, sizes)} ({dim})",
                )
        for name, below in self.below.items():
            check_indices(name, given[name], evaluate(below, sizes))
        return given, sizes

    def fill(self, given: Mapping[str, torch.Tensor], defaults: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """`given` and, for each input that is missing and has a default, a tensor full of it.

        Its shape comes from the sizes that the given inputs name.
        """
        filled, sizes = dict(given), dict[str, int]()
        for name, tensor in given.items():
            if name in self.ports and isinstance(tensor, torch.Tensor):
                pairs = zip(self.ports[name].view.shape, tensor.shape, strict=False)
                sizes.update({dim: found for dim, found in pairs if isinstance(dim, str) and dim.isidentifier()})
        for name in defaults.keys() & self.ports.keys() - given.keys():
            port = self.ports[name]
            if all(names(dim) <= sizes.keys() for dim in port.view.shape):
                shape = [evaluate(dim, sizes) for dim in port.view.shape]
                filled[name] = torch.full(shape, defaults[name], dtype=DTYPES[port.dtype])
        return filled

    def _names(self, given: Mapping[str, torch.Tensor]) -> None:
        known = ", ".join(self.ports)
        for name in given:
            if name not in self.ports:
                raise ConfigError(f"an input is not known{near(name, self.ports)}", found=repr(name), expected=known)
        raise ConfigError("an input is missing", found=", ".join(given) or "none", expected=known)

    def _dtype(self, name: str, tensor: torch.Tensor, port: Port) -> None:
        """Floats convert to floats, integers to integers; a float is never cut to an integer."""
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError("an input is not a tensor", where=name, found=type(tensor).__name__, expected=port.dtype)
        wanted = DTYPES[port.dtype]
        if tensor.dtype not in NAMES or tensor.dtype.is_floating_point != wanted.is_floating_point:
            raise ConfigError("an input has the wrong dtype", where=name, found=tensor.dtype, expected=port.dtype)

    def _shape(
        self, name: str, tensor: torch.Tensor, port: Port, sizes: dict[str, int], later: list[tuple[str, int, Dim, int]]
    ) -> None:
        shape = port.view.shape
        if tensor.dim() != len(shape):
            raise ConfigError(
                "an input has the wrong shape", where=name, found=list(tensor.shape), expected=_show(shape)
            )
        for axis, (dim, found) in enumerate(zip(shape, tensor.shape, strict=True)):
            if isinstance(dim, str) and dim.isidentifier():
                if sizes.setdefault(dim, found) == found:
                    continue
                expected = f"{_show(shape)} with {dim} = {sizes[dim]} as elsewhere"
                raise ConfigError(
                    "an input has the wrong shape", where=name, found=list(tensor.shape), expected=expected
                )
            if isinstance(dim, str):
                later.append((name, axis, dim, found))
            elif dim != found:
                raise ConfigError(
                    "an input has the wrong shape", where=name, found=list(tensor.shape), expected=_show(shape)
                )


def bind_weights(buffers: Mapping[str, Buffer], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensor of each weight buffer; ArtifactError for one that is missing or has another dtype, shape or range."""
    bound = {}
    for name, buffer in buffers.items():
        if buffer.kind != "weight":
            continue
        tensor = weights.get(name)
        if tensor is None:
            raise ArtifactError("a weight is missing", where=name, expected=f"{buffer.dtype} {_show(buffer.shape)}")
        if tensor.dtype != DTYPES[buffer.dtype] or tuple(tensor.shape) != buffer.shape:
            raise ArtifactError(
                "a weight is not what the program expects",
                where=name,
                found=f"{NAMES.get(tensor.dtype, tensor.dtype)} {_show(tuple(tensor.shape))}",
                expected=f"{buffer.dtype} {_show(buffer.shape)}",
            )
        if buffer.below is not None:
            try:
                check_indices(name, tensor, evaluate(buffer.below, {}))
            except ConfigError as error:
                raise ArtifactError(error.summary, where=name, found=error.found, expected=error.expected) from None
        bound[name] = tensor
    return bound


def _show(shape: Iterable[Dim]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
