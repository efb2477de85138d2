"""RMS norms that a model spells out in arithmetic become `qcompile.rms_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import shape, value
from qcompile.passes.pattern import Match, Pattern, rewrite
from qcompile.program import Program

aten, qc = torch.ops.aten, torch.ops.qcompile
mul = aten.mul.Tensor


def _scaled(x: Any, dims: Any, eps: Any) -> Any:
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), dims, True)
    return mul(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))


def _weighted(x: Any, dims: Any, eps: Any, weight: Any) -> Any:
    return mul(weight, _scaled(x, dims, eps))


def _shifted(x: Any, dims: Any, eps: Any, weight: Any, offset: Any) -> Any:
    return mul(aten.add.Tensor(weight, offset), _scaled(x, dims, eps))


def _over_last(match: Match) -> str | None:
    rank = value(match["x"]).dim()
    dims = match["dims"] if isinstance(match["dims"], (list, tuple)) else [match["dims"]]
    if [d % rank for d in dims] != [rank - 1]:
        return f"the mean is over dimensions {list(dims)}, not over the last"
    return None if isinstance(match["eps"], (int, float)) else "the added epsilon is not a number"


def _weight_fits(match: Match) -> str | None:
    weight, columns = match["weight"], shape(match["x"])[-1:]
    if not isinstance(weight, torch.fx.Node) or shape(weight) != columns:
        return f"the factor does not have one number for each of {columns[0]} columns"
    return _over_last(match)


def _offset_is_number(match: Match) -> str | None:
    return _weight_fits(match) if isinstance(match["offset"], (int, float)) else "what is added to the weight varies"


def _ones(x: Any) -> Any:
    # With no node among its arguments, a call would be made here and now.
    return x.tracer.create_proxy("call_function", aten.ones.default, ([value(x.node).shape[-1]],), {})


def _has_weight(match: Match) -> str | None:
    whole = len(match["dims"]) == 1 and match["weight"] is not None
    return None if whole else "the norm is over several dimensions, or has no weight"


PATTERNS = (
    Pattern(
        "rms-norm-offset", _shifted,
        lambda x, dims, eps, w, offset: qc.rms_norm.default(x, w, float(eps), float(offset)),
        _offset_is_number, shared=frozenset({aten.add.Tensor}), key=aten.rsqrt.default,
    ),
    Pattern(
        "rms-norm", _weighted, lambda x, dims, eps, w: qc.rms_norm.default(x, w, float(eps), 0.0), _weight_fits,
        key=aten.rsqrt.default,
    ),
    Pattern(
        "rms-norm-plain", _scaled, lambda x, dims, eps: qc.rms_norm.default(x, _ones(x), float(eps), 0.0), _over_last,
        key=aten.rsqrt.default,
    ),
    Pattern(
        "rms-norm-operator", lambda x, dims, weight, eps: aten.rms_norm.default(x, dims, weight, eps),
        lambda x, dims, w, eps: qc.rms_norm.default(x, w, torch.finfo(torch.float32).eps if eps is None else eps, 0.0),
        _has_weight,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class FuseNorm(Pass):
    """x * rsqrt(mean(x^2) + eps) * weight becomes one norm, whatever the order of its factors."""

    name: ClassVar[str] = "fuse-norm"

    def run(self, program: Program, ctx: Context) -> int:
        return rewrite(program, ctx, *PATTERNS)
