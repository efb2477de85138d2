"""What a call returns: tensors in the structure that the source model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Output(dict[str, Any]):
    """Outputs by name, as attributes, items or (leaving out None) a tuple."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"an output of that name does not exist: {name!r}; there are {', '.join(self)}"
            ) from None

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs that are not None, in order."""
        return tuple(value for value in self.values() if value is not None)


def structured(outputs: Mapping[str, torch.Tensor], structure: Any) -> Any:
    """`outputs` in `structure` (see `artifact.Artifact`); without one, names decide.

    "output" alone is a tensor, "output_0", "output_1", ... are a tuple, other names are fields.
    """
    if structure is not None:
        return _filled(outputs, structure)
    if list(outputs) == ["output"]:
        return outputs["output"]
    if list(outputs) == [f"output_{i}" for i in range(len(outputs))]:
        return tuple(outputs.values())
    return Output(outputs)


def _filled(outputs: Mapping[str, torch.Tensor], structure: Any) -> Any:
    ((kind, value),) = structure.items()
    if kind == "output":
        return outputs[value]
    if kind in ("tuple", "list"):
        items = [_filled(outputs, item) for item in value]
        return items if kind == "list" else tuple(items)
    if kind in ("dict", "fields"):
        made = {name: _filled(outputs, item) for name, item in value.items()}
        return Output(made) if kind == "fields" else made
    return None
