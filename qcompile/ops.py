"""qcompile's own graph operators, each with its eager implementation: the meaning of a node, and every kernel's oracle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One weight of a linear node: `format` (a format's JSON), `n` rows, `tensors` stored tensors in the operand list."""

    format: dict[str, Any]
    n: int
    tensors: int


@dataclass(frozen=True)
class LinearSpec:
    """Everything about a `qcompile.linear` node but its tensors.

    y = epilogue(prologue(x) @ cat(W of parts).T + bias).

    `prologue`: None, {"op": "rms_norm", "eps": e, "offset": 0 or 1} (weight + offset multiplies) or {"op": "layer_norm", "eps": e}.
    `epilogue`, in order: {"op": "silu" | "gelu" | "gelu_tanh" | "relu" | "sigmoid" | "tanh"}; {"op": "add"} and {"op": "mul"}
    (the next extra tensor, shaped like y); {"op": "glu", "act": name}: the rows of the two halves of N give
    act(first half) * second half, so y has N/2 columns.
    Extra tensors, in order: bias [N] if `bias`; norm weight [K] (and norm bias [K] for layer_norm) if there is a prologue; one for
    each add or mul.
    `accuracy` is "exact" (float activations) or "int8" (activations rounded to int8 per `act_group` inputs).
    """

    k: int
    parts: tuple[Part, ...]
    bias: bool = False
    prologue: dict[str, Any] | None = None
    epilogue: tuple[dict[str, Any], ...] = ()
    accuracy: str = "exact"

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def n_out(self) -> int:
        return self.n // 2 if any(e["op"] == "glu" for e in self.epilogue) else self.n

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> LinearSpec:
        data = json.loads(text)
        data["parts"] = tuple(Part(**part) for part in data["parts"])
        data["epilogue"] = tuple(data["epilogue"])
        return LinearSpec(**data)
