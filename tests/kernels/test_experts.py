"""The kernel of mixtures of experts against the eager operator."""

from __future__ import annotations

import pytest
import torch
from linear_programs import differ, executable_of, experts, native_run

from qcompile.errors import LoweringError
from qcompile.format import Format
from qcompile.formats.dense import Dense
from qcompile.formats.lanes import Lanes, LanesDense, interleave, pack_lanes
from qcompile.formats.minifloat import E2M1
from qcompile.target import native

EXPERTS, ROWS = 5, 7
FORMATS = [
    Lanes(4, 32, E2M1),
    Lanes(4, 32, None, "f16", "f16"),
    Lanes(8, 32, code="f8e4m3"),
    Lanes(3, 16, None, 2.0, "bf16", rounding="product-bf16"),
    LanesDense("f32"),
    LanesDense("bf16"),
    Dense("f32"),
]


def stored(format: Format, n: int, k: int) -> dict[str, torch.Tensor]:
    if isinstance(format, LanesDense | Dense):
        values = torch.randn(n, k).to({"f32": torch.float32, "bf16": torch.bfloat16}[format.dtype])
        return {"weight": values} if isinstance(format, Dense) else {"values": interleave(values)}
    assert isinstance(format, Lanes)
    groups = k // format.group
    codes = torch.randint(1 << format.bits, (n, k))
    codes = codes & 0xBB if format.code != "int" else codes  # no NaN, no infinity
    return pack_lanes(format, codes, torch.rand(n, groups) + 0.5, torch.randint(16, (n, groups)) + 0.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.kind}-{getattr(f, 'bits', f)}-{getattr(f, 'zero', '')}")
def test_formats(format: Format, bias: bool) -> None:
    torch.manual_seed(0)
    made, inputs = experts(format, stored(format, EXPERTS * 48, 96), EXPERTS, 48, 96, ROWS, bias=bias)
    assert [spec.template for spec in executable_of(made, native())[0].kernels.values()] == ["experts-gemv"]
    assert differ(made, inputs) < 3e-6


def test_every_number_of_rows_and_of_threads() -> None:
    torch.manual_seed(0)
    format = Lanes(4, 32, E2M1)
    made, _ = experts(format, stored(format, EXPERTS * 80, 64), EXPERTS, 80, 64, ROWS, dynamic=True)
    for m in (1, 2, 33):
        inputs = [torch.randn(m, 64), torch.randint(EXPERTS, (m,))]
        assert differ(made, inputs) < 3e-6
        assert torch.equal(native_run(made, inputs, threads=1), native_run(made, inputs, threads=3))


def test_an_expert_that_does_not_exist_reads_nothing_and_shows() -> None:
    torch.manual_seed(0)
    format = Lanes(4, 32, E2M1)
    made, (x, expert) = experts(format, stored(format, EXPERTS * 16, 32), EXPERTS, 16, 32, ROWS)
    wrong = expert.clone()
    wrong[2], wrong[4] = 2**40, -1
    found, expected = native_run(made, [x, wrong]), native_run(made, [x, expert])
    assert found[2].isnan().all() and found[4].isnan().all()
    right = [i for i in range(ROWS) if i not in (2, 4)]
    assert torch.equal(found[right], expected[right])


def test_outputs_that_fill_no_block_run_through_aten() -> None:
    format = LanesDense("f32")
    made, _ = experts(format, stored(format, EXPERTS * 20, 32), EXPERTS, 20, 32, ROWS)
    with pytest.raises(LoweringError, match="no kernel") as caught:
        executable_of(made, native())
    assert caught.value.found == "20 outputs of each expert are no multiple of 16"
