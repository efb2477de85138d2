"""Exact linear kernels and embeddings, through an executable, against the eager operators."""

from __future__ import annotations

import pytest
import torch
from format_cases import CASES, IDS, NF4, random_storage
from linear_programs import Tensors, build, differ, embedding, executable_of, linear, native_run
from tiny_programs import run

from qcompile.formats.lanes import Lanes, LanesDense, interleave, pack_lanes
from qcompile.formats.tables import NF4 as NF4_VALUES
from qcompile.lowering.mlir import linear_gemv, toolchain
from qcompile.lowering.mlir.linear import Shape
from qcompile.target import CPU_LEVELS

HERE = [level for level in CPU_LEVELS.values() if not level.missing()]
FORMATS = [
    *(Lanes(bits, 24, None, "f16" if bits % 2 else 0.5) for bits in range(1, 9)),
    Lanes(4, 32, tuple(NF4_VALUES)),
    Lanes(3, 16, NF4[:8], scale="f16"),
    Lanes(4, 8, None, 8.0, "bf16"),
    Lanes(5, 9, None, "f32", "f16", offset="f16", factor=0.5),
    Lanes(8, 32, code="f8e4m3"),
    Lanes(8, 16, scale="bf16", rounding="product-bf16", code="f8e4m3"),
    Lanes(8, 96, code="f8e5m2"),
    LanesDense("f32"),
    LanesDense("bf16"),
]


def stored(format: Lanes | LanesDense, n: int, k: int) -> Tensors:
    if isinstance(format, LanesDense):
        return {
            "values": interleave(torch.randn(n, k)).to(
                getattr(torch, {"f32": "float32", "bf16": "bfloat16"}[format.dtype])
            )
        }
    groups = k // format.group
    codes = torch.randint(len(format.table) if format.table else 1 << format.bits, (n, k))
    codes = codes & 0xBB if format.code != "int" else codes  # no NaN, no infinity
    zeros = torch.randint(1 << format.bits, (n, groups)) + 0.25
    return pack_lanes(format, codes, torch.rand(n, groups) + 0.5, zeros, torch.randn(n, groups))


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes that hold no float16 infinity or NaN, wherever one is read from them."""
    return tensor & 0x3B if tensor.dtype == torch.uint8 else tensor


def part(format: Lanes | LanesDense, n: int, k: int) -> tuple[Lanes | LanesDense, int, Tensors]:
    return format, n, stored(format, n, k)


@pytest.mark.parametrize(
    "format",
    FORMATS,
    ids=lambda f: f"{f.kind}-{getattr(f, 'bits', f)}-{getattr(f, 'zero', '')}-{getattr(f, 'code', '')}",
)
def test_layouts(format: Lanes | LanesDense) -> None:
    """Few rows and many, outputs that fill no block, inputs that fill no word."""
    k = 288
    for m in (1, 7):
        assert differ(*linear([part(format, 37, k)], k, m)) < 2e-6


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9, 12, 16, 33, 513, 1100])
def test_rows(m: int) -> None:
    for format, k in ((Lanes(4, 32, None, "f16"), 320), (LanesDense("f32"), 131)):
        made, inputs = linear([part(format, 96, k)], k, m)
        assert differ(made, inputs) < 2e-6
        assert torch.equal(native_run(made, inputs, threads=1), native_run(made, inputs, threads=3))


def test_one_program_serves_every_number_of_rows() -> None:
    format = Lanes(4, 32, None, 8.0)
    made, _ = linear([part(format, 48, 64)], 64, 6, dynamic=True)
    for m in (1, 2, 3, 4, 5, 40):
        assert differ(made, [torch.randn(m, 64)]) < 2e-6


@pytest.mark.parametrize("m", [1, 3, 14])
@pytest.mark.parametrize(
    "more",
    [
        {"bias": True},
        {"epilogue": ({"op": "gelu"},), "bias": True},
        {"epilogue": ({"op": "gelu_tanh"}, {"op": "mul"}, {"op": "add"})},
        {"epilogue": ({"op": "relu"}, {"op": "sigmoid"}, {"op": "tanh"})},
        {"prologue": {"op": "rms_norm", "eps": 1e-5, "offset": 0.0}, "epilogue": ({"op": "silu"},)},
        {"prologue": {"op": "rms_norm", "eps": 1e-6, "offset": 1.0}, "bias": True},
        {"prologue": {"op": "layer_norm", "eps": 1e-5}, "bias": True, "epilogue": ({"op": "add"},)},
    ],
    ids=str,
)
def test_prologues_and_epilogues(m: int, more: dict) -> None:
    k = 72
    assert differ(*linear([part(Lanes(4, 24, None, "f16"), 37, k)], k, m, **more)) < 1e-5


@pytest.mark.parametrize("m", [1, 4, 30])
@pytest.mark.parametrize("rows", [(64,), (80, 80), (37, 37)])
def test_gated_units(m: int, rows: tuple[int, ...]) -> None:
    more = {"bias": True, "epilogue": ({"op": "glu", "act": "silu"}, {"op": "add"})}
    parts = [part(Lanes(4, 16, None, "f16"), n, 48) for n in rows]
    assert differ(*linear(parts, 48, m, **more)) < 1e-5


@pytest.mark.parametrize("m", [1, 6])
def test_parts_of_different_layouts(m: int) -> None:
    parts = [
        part(Lanes(4, 16, None, "f16"), 48, 96),
        part(LanesDense("f32"), 5, 96),
        part(Lanes(8, 96, None, 128.0), 33, 96),
    ]
    assert differ(*linear(parts, 96, m, bias=True)) < 2e-6


def test_a_gated_unit_whose_halves_share_a_block_is_refused() -> None:
    made, inputs = linear([part(LanesDense("f32"), 40, 16)], 16, 2, epilogue=({"op": "glu", "act": "silu"},))
    with pytest.raises(Exception, match="not whole blocks of 16"):
        native_run(made, inputs)


# One case of every kind of format: the renderer's own tests have the expressions, test_conformance.py real checkpoints.
ONE_EACH = {case[0].kind: (case, name) for case, name in zip(CASES, IDS, strict=True)}


@pytest.mark.parametrize(("format", "n", "k"), [c for c, _ in ONE_EACH.values()], ids=[i for _, i in ONE_EACH.values()])
def test_any_format(format, n: int, k: int) -> None:
    """The generic tier, and rows of an embedding, which are bit for bit what the format says."""
    torch.manual_seed(0)  # with three outputs, the greatest may be small
    tensors = random_storage(format, n, k)
    ids = torch.tensor([[n - 1, 0], [n // 2, n - 1]])
    made = embedding(format, n, k, tensors, ids)
    torch.testing.assert_close(native_run(made, [ids]), run(made, ids), rtol=0, atol=0, equal_nan=True)
    tensors = {name: finite(tensor) for name, tensor in tensors.items()}
    made, inputs = linear([(format, n, tensors)], k, 2)
    assert differ(made, inputs) < 2e-6


@pytest.mark.parametrize("index", [0, 9, 24, 33, 40])
def test_any_format_with_many_rows(index: int) -> None:
    format, n, k = CASES[index]
    assert differ(*linear([(format, n, random_storage(format, n, k))], k, 17, bias=True)) < 2e-6


def test_an_id_out_of_range_gives_nan() -> None:
    format = LanesDense("f32")
    made = embedding(format, 9, 20, stored(format, 9, 20), torch.tensor([0]))
    y = native_run(embedding(format, 9, 20, stored(format, 9, 20), torch.tensor([1, 1, 1])), [torch.tensor([-1, 9, 3])])
    assert made is not None and y[:2].isnan().all() and y[2].isfinite().all()


@pytest.mark.parametrize("target", HERE, ids=lambda t: t.name)
@pytest.mark.parametrize(
    "format", [Lanes(4, 16, None, "f16"), Lanes(4, 16, NF4), Lanes(3, 16, None, 4.0), LanesDense("bf16")], ids=str
)
def test_every_level_that_runs_here(target, format) -> None:
    for m in (1, 3, 20):
        more = {"epilogue": ({"op": "glu", "act": "silu"},)}
        assert differ(*linear([part(format, 64, 80)], 80, m, **more), target) < 5e-6


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_level_compiles(level: str) -> None:
    target = CPU_LEVELS[level]
    made, _ = linear([part(Lanes(4, 16, NF4), 64, 80)], 80, 20, dynamic=True)
    executable, _ = executable_of(made, target)
    objects = build(executable, target)
    assert {spec.template for spec in executable.kernels.values()} == {"linear-gemv", "linear-pack", "linear-gemm"}
    assert all(item.object[:4] == b"\x7fELF" for item in objects.values())


def test_the_inner_loop_of_one_row_has_three_instructions_for_sixteen_weights() -> None:
    """4 bits: a shift, a table look-up and a multiply-add (and one load of x for all blocks that it serves)."""
    params = Shape((Lanes(4, 128, None, 8.0).to_json(),)).params(rows=1)
    target = CPU_LEVELS["cpu:x86-64-v4-vnni"]
    loop = _hottest(toolchain.assembly(linear_gemv.emit(params, target), target), "vperm")
    weights = _count(loop, "vperm")  # LLVM writes vpermd for vpermps where that saves nothing
    assert weights == 32, "eight inputs of four blocks in one turn"
    assert len(loop) < 3.6 * weights  # a prefetch a word is among them
    assert not any("(%rsp" in line for line in loop), "registers are spilled"


def _hottest(text: str, instruction: str) -> list[str]:
    """The lines of the loop body that holds the instruction most often."""
    best: list[str] = []
    body: list[str] = []
    for line in text.splitlines():
        if line.endswith(":"):
            body = []
        elif line.startswith("\t") and not line.startswith("\t."):
            body.append(line.strip())
            if line.strip().startswith("j") and _count(body, instruction) > _count(best, instruction):
                best = list(body)
    return best


def _count(body: list[str], instruction: str) -> int:
    return sum(line.startswith(instruction) for line in body)
