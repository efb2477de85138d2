"""What a method does around the matmul: to x before the weight meets it, and to y after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qcompile.described import Described, from_json
from qcompile.format import Stored, check_tensors
from qcompile.registry import Registry

TRANSFORMS = Registry(
    "transform",
    {
        "permute": "qcompile.transforms.linear:Permute",
        "scale": "qcompile.transforms.linear:Scale",
        "hadamard": "qcompile.transforms.linear:Hadamard",
        "rotate": "qcompile.transforms.linear:Rotate",
        "rms-norm": "qcompile.transforms.norm:RmsNorm",
        "round-to": "qcompile.transforms.cast:RoundTo",
        "llm-int8": "qcompile.transforms.llm_int8:LlmInt8",
        "sparse": "qcompile.transforms.sparse:Sparse",
        "round-int": "qcompile.transforms.round_int:RoundInt",
        "round-float": "qcompile.transforms.round_float:RoundFloat",
        "round-mx": "qcompile.transforms.round_float:RoundMx",
        "round-nvfp4": "qcompile.transforms.round_float:RoundNvfp4",
        "round-four-over-six": "qcompile.transforms.four_over_six:RoundFourOverSix",
        "round-fp-quant": "qcompile.transforms.fp_quant:RoundFpQuant",
    },
)


class Transform(Described, ABC):
    """A function of rows, f32 [..., K] -> f32 [..., width(K)], with its stored tensors: a frozen dataclass, so JSON.

    What only rounds (activation quantization) and what is linear in x (a permutation, a rotation, a scale for each
    input) are both transforms; `weight` tells them apart.
    """

    def stored(self, K: int) -> tuple[Stored, ...]:
        """The stored tensors of a transform of rows [K], in order."""
        return ()

    def width(self, K: int) -> int:
        """The length of the rows that come out."""
        return K

    @abstractmethod
    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        """The rows transformed; `t` holds the stored tensors by name.

        Made of ATen operators alone and without a look at values, so that it can be traced for any leading dimensions:
        what a backend has no kernel for runs as these operators.
        """

    def weight(self, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        """The weight [N, K] that does to x what `w` does to apply(x); `w` itself where `apply` only rounds x."""
        return w

    def summary(self) -> str:
        """A few words for the report."""
        return self.kind


@dataclass
class Applied:
    """A transform with its tensors."""

    transform: Transform
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def check(self, K: int, where: str = "") -> None:
        """CheckpointError unless each tensor has the dtype and shape that a transform of rows [K] stores."""
        check_tensors(f"transform '{self.transform.kind}'", self.transform.stored(K), self.tensors, where)

    def __call__(self, x: Tensor) -> Tensor:
        return self.transform.apply(x, self.tensors)

    def weight(self, w: Tensor) -> Tensor:
        """The weight that acts on what goes into the transform, from the one that acts on what comes out."""
        return self.transform.weight(w, self.tensors)


def transform_from_json(data: Mapping[str, Any]) -> Transform:
    """The transform that `to_json` described; ArtifactError for an unknown kind, or a wrong parameter.

    >>> transform_from_json({"kind": "hadamard", "size": 512})
    Hadamard(size=512)
    """
    found: Transform = from_json(TRANSFORMS, data)
    return found


def effective_weight(w: Tensor, before: Sequence[Applied], residual: Applied | None) -> Tensor:
    """The weight [N, K] that acts on the layer's own input, from `w`, which the format holds."""
    if residual is not None:
        w = residual.weight(w)
    for applied in reversed(before):
        w = applied.weight(w)
    return w
