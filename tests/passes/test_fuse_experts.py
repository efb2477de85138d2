"""What is around the matmuls of a mixture of experts becomes a part of them, where the backend has such kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_programs import Call, ops, program, reasons, same
from torch.nn import functional

from qcompile.backend import CpuBackend, CudaBackend
from qcompile.experts import ExpertsSpec, Gate
from qcompile.formats.dense import Dense
from qcompile.ops import Part
from qcompile.passes.fuse_experts import FuseExperts
from qcompile.passes.normalise import Normalise

E, K, N, EACH = 3, 8, 12, 2
INPUTS = (torch.randn(5, K), torch.randint(E, (5, EACH)), torch.rand(5, EACH))
WEIGHTS = {"up": torch.randn(E * N, K), "down": torch.randn(E * K, N // 2), "bias": torch.randn(E, N)}


def spec(n: int, k: int) -> str:
    return ExpertsSpec(E, n, k, (Part(Dense("f32").to_json(), E * n, 1),)).to_text()


def mixture(gate: Callable[[torch.Tensor], torch.Tensor]):  # type: ignore[no-untyped-def]
    def forward(x, chosen, share, up, down, bias):  # type: ignore[no-untyped-def]
        expert = chosen.reshape(-1)
        rows = x.unsqueeze(1).expand(5, EACH, K).reshape(-1, K)
        hidden = gate(torch.ops.qcompile.experts(rows, expert, [up], bias, spec(N, K)))
        y = torch.ops.qcompile.experts(hidden, expert, [down], None, spec(K, N // 2))
        return (y * share.reshape(-1, 1)).reshape(5, EACH, K).sum(1)

    return forward


def turns(y: torch.Tensor, least: float = -3.0) -> torch.Tensor:
    gate, up = y[..., ::2].clamp(max=3.0), y[..., 1::2].clamp(least, 3.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.7))


def halves(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda y: act(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1]


def fused(gate: Callable[[torch.Tensor], torch.Tensor], backend=None):  # type: ignore[no-untyped-def]
    made = program(Call(mixture(gate), **WEIGHTS), *INPUTS)
    return made, same(made, [Normalise(), FuseExperts()], INPUTS, backend=backend or CudaBackend())


def test_rows_gates_and_shares_become_parts_of_the_matmuls() -> None:
    cases = {
        Gate("silu"): halves(functional.silu),
        Gate("gelu_tanh"): halves(lambda gate: functional.gelu(gate, approximate="tanh")),
        Gate("silu", turns=True, limit=3.0, alpha=1.7, plus=1.0): turns,
    }
    for gate, function in cases.items():
        made, _ = fused(function)
        assert ops(made).count("qcompile.experts") == 2 and set(ops(made)) <= {"aten.reshape", "qcompile.experts"}
        up, down = (
            ExpertsSpec.from_text(node.args[4])
            for node in made.graph.graph.find_nodes(op="call_function", target=torch.ops.qcompile.experts.default)
        )
        assert (up.gate, up.each, up.summed, down.gate, down.each, down.summed) == (gate, 2, 0, None, 1, 2)


def test_a_gate_that_no_kernel_has_stays() -> None:
    made, ctx = fused(lambda y: turns(y, -2.0))
    assert reasons(ctx) == ["gate and up have limits of their own"] and "aten.sigmoid" in ops(made)


def test_a_backend_without_such_kernels_keeps_the_graph() -> None:
    made, ctx = fused(turns, CpuBackend())
    assert dict(ctx.report.passes)["fuse-experts"] == 0 and "aten.sum.dim_IntList" in ops(made)
