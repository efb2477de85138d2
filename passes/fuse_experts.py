"""What a mixture of experts does around its two matmuls becomes a part of them: rows for several experts, gates, shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from qcompile.experts import ExpertsSpec, Gate
from qcompile.passes.base import Context, Pass
from qcompile.passes.fuse_epilogue import ACTIVATIONS
from qcompile.passes.graph import is_call, shape
from qcompile.passes.pattern import Match, Pattern, apply, match
from qcompile.program import Program

aten, qc = torch.ops.aten, torch.ops.qcompile
mul, experts = aten.mul.Tensor, qc.experts.default


def _remade(x: Any, expert: Any, stored: Any, bias: Any, spec: str, *share: Any, **more: Any) -> Any:
    return experts(x, expert, stored, bias, replace(ExpertsSpec.from_text(spec), **more).to_text(), *share)


def _repeated(x: Any, sizes: Any, flat: Any, expert: Any, stored: Any, bias: Any, spec: Any) -> Any:
    each = aten.reshape.default(aten.expand.default(aten.unsqueeze.default(x, 1), sizes), flat)
    return experts(each, expert, stored, bias, spec)


def _rows_together(found: Match) -> str | None:
    x, sizes = shape(found["x"]), found["sizes"]
    alike = len(x) == 2 and len(sizes) == 3 and isinstance(sizes[1], int) and found["flat"][-1] == x[1] == sizes[2]
    return None if alike else "its rows are not those of x, each several times"


def _halves(act: Any) -> Callable[..., Any]:
    def find(
        x: Any, expert: Any, stored: Any, bias: Any, spec: Any, dim: Any, middle: Any, end: Any, how: Any = None
    ) -> Any:
        y = experts(x, expert, stored, bias, spec)
        gate = aten.slice.Tensor(y, dim, 0, middle)
        made = act(gate, approximate=how) if act is aten.gelu.default else act(gate)
        return mul(made, aten.slice.Tensor(y, dim, middle, end))

    return find


def _in_halves(found: Match) -> str | None:
    n = ExpertsSpec.from_text(found["spec"]).n
    halves = found["dim"] in (1, -1) and 2 * found["middle"] == n and found["end"] >= n
    return None if halves else f"gate and up are not the halves of {n} columns"


def _gated_halves(name: str) -> Callable[..., Any]:
    def made(x: Any, expert: Any, stored: Any, bias: Any, spec: str, *rest: Any) -> Any:
        act = "gelu_tanh" if rest[-1] == "tanh" else name
        return _remade(x, expert, stored, bias, spec, gate=Gate(act))

    return made


def _turns(
    x: Any, expert: Any, stored: Any, bias: Any, spec: Any, dim: Any, end: Any, most: Any, least: Any, limit: Any,
    alpha: Any, plus: Any,
) -> Any:  # fmt: skip
    y = experts(x, expert, stored, bias, spec)
    gate = aten.clamp.default(aten.slice.Tensor(y, dim, 0, end, 2), None, most)
    up = aten.clamp.default(aten.slice.Tensor(y, dim, 1, end, 2), least, limit)
    return mul(aten.add.Tensor(up, plus), mul(gate, aten.sigmoid.default(mul(gate, alpha))))


def _in_turns(found: Match) -> str | None:
    n = ExpertsSpec.from_text(found["spec"]).n
    if found["dim"] not in (1, -1) or found["end"] < n:
        return f"gate and up do not take turns in {n} columns"
    limits = found["most"] == found["limit"] and found["least"] == -found["limit"]
    numbers = all(isinstance(found[name], (int, float)) for name in ("alpha", "plus"))
    return None if limits and numbers else "gate and up have limits of their own"


def _gated_turns(
    x: Any, expert: Any, stored: Any, bias: Any, spec: str, dim: Any, end: Any, most: float, least: float, limit: float,
    alpha: float, plus: float,
) -> Any:  # fmt: skip
    gate = Gate("silu", turns=True, limit=float(limit), alpha=float(alpha), plus=float(plus))
    return _remade(x, expert, stored, bias, spec, gate=gate)


def _shared(x: Any, expert: Any, stored: Any, bias: Any, spec: Any, share: Any, column: Any, sizes: Any) -> Any:
    y = mul(experts(x, expert, stored, bias, spec), aten.reshape.default(share, column))
    return aten.sum.dim_IntList(aten.reshape.default(y, sizes), [1])


def _one_share_each(found: Match) -> str | None:
    share, sizes = shape(found["share"]), found["sizes"]
    alike = len(share) == 2 and len(sizes) == 3 and share[1] == sizes[1] and isinstance(sizes[1], int)
    return None if alike and found["column"][-1] == 1 else "its results do not have a share each"


PATTERNS = (
    Pattern(
        "rows-of-experts", _repeated,
        lambda x, sizes, flat, expert, stored, bias, spec: _remade(x, expert, stored, bias, spec, each=sizes[1]),
        _rows_together,
    ),
    *(
        Pattern("gate-of-experts", _halves(act), _gated_halves(name), _in_halves, key=experts)
        for act, name in ACTIVATIONS.items()
    ),
    Pattern("gate-of-experts", _turns, _gated_turns, _in_turns, key=experts),
    Pattern(
        "shares-of-experts", _shared,
        lambda x, expert, stored, bias, spec, share, column, sizes: _remade(
            x, expert, stored, bias, spec, share, summed=sizes[1]
        ),
        _one_share_each, key=experts,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class FuseExperts(Pass):
    """A mixture's first matmul reads each row once for all its experts and computes the gated unit; its second one adds what
    the experts of a row have made, each times its share. Backends without such kernels leave the graph as it is.
    """

    name: ClassVar[str] = "fuse-experts"

    def run(self, program: Program, ctx: Context) -> int:
        if not ctx.backend.experts:
            return 0
        count = 0
        for pattern in PATTERNS:
            for node in list(program.graph.graph.nodes):
                found = match(pattern, node) if not node._erased else None
                if isinstance(found, str):
                    ctx.refuse(pattern.name, node, found)
                elif found is not None and ctx.take():
                    (weight,) = (each for each in found.nodes if is_call(each, experts))
                    module = weight.meta["module"]
                    apply(pattern, found).meta["module"] = module
                    count += 1
        return count
