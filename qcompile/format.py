"""What a format is: which tensors are stored, where the bits of each field lie, and what a weight is worth."""

from __future__ import annotations

import math
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qcompile.described import Described, class_of, from_json
from qcompile.dtypes import DTYPES, NAMES, itemsize
from qcompile.errors import CheckpointError, InternalError
from qcompile.expr import Expr, Operand, load
from qcompile.expr import field as named
from qcompile.registry import Registry

if TYPE_CHECKING:
    from qcompile.transform import Applied

FORMATS = Registry(
    "format",
    {
        "gptq": "qcompile.formats.gptq:Gptq",
        "awq": "qcompile.formats.awq:Awq",
        "awq-gemv": "qcompile.formats.awq:AwqGemv",
        "awq-gemv-fast": "qcompile.formats.awq:AwqGemvFast",
        "hqq": "qcompile.formats.hqq:Hqq",
        "bnb4": "qcompile.formats.bitsandbytes:Bnb4",
        "bnb-int8": "qcompile.formats.bitsandbytes:BnbInt8",
        "eetq": "qcompile.formats.eetq:Eetq",
        "fp8": "qcompile.formats.minifloat:Fp8",
        "fp4": "qcompile.formats.minifloat:Fp4",
        "fp6": "qcompile.formats.minifloat:Fp6",
        "bitstream": "qcompile.formats.bitstream:Bitstream",
        "int8": "qcompile.formats.integer:Int8",
        "quark-int4": "qcompile.formats.quark:QuarkInt4",
        "mlx": "qcompile.formats.mlx:Mlx",
        "sinq": "qcompile.formats.sinq:Sinq",
        "sinq-square": "qcompile.formats.sinq:SinqSquare",
        "bitnet": "qcompile.formats.bitnet:Ternary",
        "quanto": "qcompile.formats.quanto:QuantoBits",
        "torchao-int4": "qcompile.formats.torchao:Int4Rows",
        "torchao-int4-tiles": "qcompile.formats.torchao:Int4Tiles",
        "higgs": "qcompile.formats.higgs:Higgs",
        "spqr": "qcompile.formats.spqr:Spqr",
        "aqlm": "qcompile.formats.codebook:Aqlm",
        "vptq": "qcompile.formats.codebook:Vptq",
        "dense": "qcompile.formats.dense:Dense",
        "gguf-q4_0": "qcompile.formats.gguf:Q4_0",
        "gguf-q4_1": "qcompile.formats.gguf:Q4_1",
        "gguf-q5_0": "qcompile.formats.gguf:Q5_0",
        "gguf-q5_1": "qcompile.formats.gguf:Q5_1",
        "gguf-q8_0": "qcompile.formats.gguf:Q8_0",
        "gguf-q6_k": "qcompile.formats.gguf:Q6_K",
        "gguf-q2_k": "qcompile.formats.gguf_k:Q2_K",
        "gguf-q3_k": "qcompile.formats.gguf_k:Q3_K",
        "gguf-q4_k": "qcompile.formats.gguf_k:Q4_K",
        "gguf-q5_k": "qcompile.formats.gguf_k:Q5_K",
        "gguf-iq4_nl": "qcompile.formats.gguf_k:IQ4_NL",
        "gguf-iq4_xs": "qcompile.formats.gguf_k:IQ4_XS",
        "fouroversix": "qcompile.formats.fouroversix:FourOverSix",
        "fp-quant": "qcompile.formats.fp_quant:FpQuant",
        "gemma": "qcompile.formats.gemma:Gemma",
        "native": "qcompile.formats.native:Native",
        "lanes": "qcompile.formats.lanes:Lanes",
        "lanes-dense": "qcompile.formats.lanes:LanesDense",
        "fragments": "qcompile.formats.fragments:Fragments",
        "runs": "qcompile.formats.runs:Runs",
    },
)


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


class Format(Described, ABC):
    """A way to store a weight W [N, K] (N outputs, K inputs): a frozen dataclass whose fields are its parameters.

    A format says three things: `stored`, `fields` and `value`; reading, packing, conversion, kernels and sizes follow.
    """

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
        return {name: named(name, expr) for name, expr in self.fields(t, N, K).items()}

    def weight(self, N: int, K: int) -> Expr:
        """W[n, k] as one f32 expression over the stored tensors."""
        value = self.value(Names(**self.located(N, K)))
        if value.dtype != "f32":
            raise InternalError(f"format '{self.kind}' has a value that is not f32", found=repr(value))
        return value


def format_class(kind: str) -> type[Format]:
    """The class registered for `kind`; ArtifactError for an unknown one."""
    found: type[Format] = class_of(FORMATS, kind)
    return found


def format_from_json(data: Mapping[str, Any]) -> Format:
    """The format that `to_json` described; ArtifactError for an unknown kind, or an unknown or mistyped parameter.

    >>> format_from_json({"kind": "dense", "dtype": "f16"})
    Dense(dtype='f16')
    """
    found: Format = from_json(FORMATS, data)
    return found


@dataclass
class Packed:
    """A weight [N, K] in some format, and what happens around the matmul that reads it.

    `tensors` are the stored tensors by name. y = after(linear(before(x), W, bias) + residual(before(x))): `before`
    and `after` are applied in order, `residual` [..., K] -> [..., N] adds a part of the weight that the format does not
    hold. `bias` f32 [N] stands for the module's own when a method changes it.
    """

    format: Format
    tensors: dict[str, torch.Tensor]
    N: int
    K: int
    before: tuple[Applied, ...] = ()
    after: tuple[Applied, ...] = ()
    residual: Applied | None = None
    bias: torch.Tensor | None = None

    @property
    def is_bare(self) -> bool:
        """True when nothing happens around the matmul."""
        return not (self.before or self.after or self.residual is not None or self.bias is not None)

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
        check_tensors(f"format '{self.format.kind}'", self.format.stored(self.N, self.K), self.tensors, where)
        for applied in (*self.before, *([self.residual] if self.residual is not None else [])):
            applied.check(self.K, where)
        for applied in self.after:
            applied.check(self.N, where)


def check_tensors(what: str, stored: Sequence[Stored], tensors: Mapping[str, torch.Tensor], where: str = "") -> None:
    """CheckpointError unless `tensors` are those that `what` stores, each with its dtype and shape."""
    wanted = {s.name: s for s in stored}
    if wanted.keys() != tensors.keys():
        raise CheckpointError(
            f"the stored tensors are not those of {what}",
            where=where,
            found=", ".join(sorted(tensors)),
            expected=", ".join(sorted(wanted)),
        )
    for name, s in wanted.items():
        found = f"{NAMES.get(tensors[name].dtype, str(tensors[name].dtype))} {list(tensors[name].shape)}"
        if tensors[name].dtype != DTYPES[s.dtype] or tuple(tensors[name].shape) != s.shape:
            raise CheckpointError(
                f"stored tensor '{name}' has the wrong dtype or shape",
                where=where,
                found=found,
                expected=f"{s.dtype} {list(s.shape)}",
            )
