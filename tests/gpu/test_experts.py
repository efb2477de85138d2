"""CUDA kernels of mixtures of experts, interpreted, against the eager operator: few rows one by one, many in blocks."""

from __future__ import annotations

import pytest
import torch
from gpu.triton_lowered import Interpreted
from linear_programs import experts
from tiny_programs import run

from qcompile.experts import Gate
from qcompile.format import Format, Packed
from qcompile.formats.dense import Dense
from qcompile.formats.fragments import fragments_for
from qcompile.formats.lanes import Lanes, pack_lanes
from qcompile.formats.minifloat import E2M1
from qcompile.program import Program

EXPERTS, N, K = 3, 20, 96
FORMATS = {"table": Lanes(4, 32, E2M1), "affine": Lanes(4, 32, None, "f16", "f16"), "dense": Dense("bf16")}


def stored(format: Format) -> dict[str, torch.Tensor]:
    if isinstance(format, Dense):
        return {"weight": torch.randn(EXPERTS * N, K).to(torch.bfloat16)}
    assert isinstance(format, Lanes)
    n, groups = EXPERTS * N, K // format.group
    codes = torch.randint(1 << format.bits, (n, K))
    return pack_lanes(format, codes, torch.rand(n, groups) + 0.5, torch.randint(16, (n, groups)) + 0.0)


def in_fragments(form: Lanes, n: int) -> tuple[Format, dict[str, torch.Tensor]]:
    """A weight of that form for `EXPERTS` times n outputs, in the order of tensor cores."""
    codes = torch.randint(1 << form.bits, (EXPERTS * n, K))
    groups = K // form.group
    tensors = pack_lanes(
        form, codes, torch.rand(len(codes), groups) + 0.5, torch.randint(16, (len(codes), groups)) + 0.0
    )
    made = fragments_for(Packed(form, tensors, EXPERTS * n, K))
    assert isinstance(made, tuple)
    return made[0].format, made[0].tensors


def difference(made: Program, given: list[torch.Tensor]) -> float:
    """The greatest difference from the eager result, over the greatest eager number."""
    y, expected = Interpreted(made)(*given), run(made, *given)
    assert y.shape == expected.shape
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("format", [pytest.param("affine", marks=pytest.mark.full), "table", "dense"])
def test_every_number_of_rows(format: str) -> None:
    torch.manual_seed(0)
    form = FORMATS[format]
    made, _ = experts(form, stored(form), EXPERTS, N, K, 9, bias=True, dynamic=True)
    made.model_config["torch_dtype"] = "float16"
    for rows, limit in ((2, 2e-6), (19, 2e-3), (70, 2e-3)):
        expert = torch.randint(EXPERTS, (rows,))
        expert[expert == 1] = 2  # an expert that nobody asks
        assert difference(made, [torch.randn(rows, K), expert]) < limit


@pytest.mark.parametrize("format", [pytest.param("table", marks=pytest.mark.full), "affine"])
def test_weights_in_the_order_of_tensor_cores(format: str) -> None:
    """Whole blocks of 16 outputs are computed as a linear's; others by the format's expression."""
    torch.manual_seed(0)
    for n, tier in ((48, "lanes"), (20, "generic")):
        made, _ = experts(*in_fragments(FORMATS[format], n), EXPERTS, n, K, 9, bias=True, dynamic=True)
        made.model_config["torch_dtype"] = "float16"
        for rows in (3, 19):
            given = [torch.randn(rows, K), torch.randint(EXPERTS, (rows,))]
            assert difference(made, given) < 2e-3, (tier, rows)


TURNS = Gate("silu", turns=True, limit=4.0, alpha=1.702, plus=1.0)
HALVES = Gate("gelu_tanh")


@pytest.mark.parametrize("rows", [3, 10])  # for two experts each: one by one, and in blocks
def test_gates_and_sums_are_part_of_the_kernels(rows: int) -> None:
    torch.manual_seed(0)
    generic, blocks = Dense("bf16"), FORMATS["table"]
    weights = {"generic": lambda n: (generic, {"weight": torch.randn(EXPERTS * n, K).to(torch.bfloat16)})}
    weights["lanes"] = lambda n: in_fragments(blocks, n)
    for tier, n, gate in (("generic", 20, TURNS), ("generic", 20, HALVES), ("lanes", 48, TURNS), ("lanes", 32, HALVES)):
        up, given = experts(*weights[tier](n), EXPERTS, n, K, rows, bias=True, each=2, gate=gate)
        up.model_config["torch_dtype"] = "float16"
        assert difference(up, given) < 5e-3, (tier, gate)
        down, given = experts(*weights[tier](n), EXPERTS, n, K, 2 * rows, bias=True, summed=2)
        down.model_config["torch_dtype"] = "float16"
        assert difference(down, given) < 2e-3, tier
        few = rows == 3
        assert Interpreted(up).kernels == (["experts-gather"] if few else ["experts-order", "experts-grouped"])
        assert Interpreted(down).kernels == Interpreted(up).kernels + ["pointwise"] * (not few)


def test_an_expert_that_does_not_exist_shows() -> None:
    torch.manual_seed(0)
    generic = (FORMATS["table"], stored(FORMATS["table"]), EXPERTS, N)
    fragments = (*in_fragments(FORMATS["table"], 16), EXPERTS, 16)
    for weight, rows in ((generic, 7), (generic, 17), (fragments, 7), (fragments, 17)):
        made, _ = experts(*weight, K, 9, dynamic=True)
        x, expert = torch.randn(rows, K), torch.randint(EXPERTS, (rows,))
        wrong = expert.clone()
        wrong[2], wrong[4] = 2**40, -1
        found, expected = Interpreted(made)(x, wrong), run(made, x, expert)
        assert found[2].isnan().all() and found[4].isnan().all()
        right = [i for i in range(rows) if i not in (2, 4)]
        torch.testing.assert_close(found[right], expected[right], rtol=3e-2, atol=3e-2 * float(expected.abs().max()))
