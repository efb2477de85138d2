"""The machine code of linear kernels over fragments stays within the budgets beside their schedules; nothing is run."""

from __future__ import annotations

import re

import pytest

from qcompile.artifact import KernelSpec
from qcompile.formats.fragments import Fragments
from qcompile.formats.minifloat import E2M1
from qcompile.formats.tables import NF4
from qcompile.lowering.triton import sass, templates
from qcompile.lowering.triton.budgets import budget
from qcompile.lowering.triton.linear import Shape
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.toolchain import SHARED, compile_sources
from qcompile.target import target

N = K = 4096
MOST = {"skinny": 16, "mid": 128, "large": 2048}
FORMATS: dict[tuple[str, int], Fragments] = {
    ("int", 2): Fragments(2, 128, zero="u8", scale="bf16"),
    ("int", 3): Fragments(3, 128, zero="u8", scale="bf16"),
    ("int", 4): Fragments(4, 128, zero="u8", scale="bf16"),
    ("int", 8): Fragments(8, K, zero=128.0, scale="f32"),
    ("table", 4): Fragments(4, 64, NF4, scale="f32"),
    ("fp", 4): Fragments(4, 32, E2M1, scale="f8e8m0"),
    ("fp", 8): Fragments(8, 128, scale="f32", code="f8e4m3"),
}
DAILY = [("skinny", "int", 4), ("skinny", "table", 4), ("skinny", "fp", 8), ("mid", "int", 4)]
REST = [(kind, value, bits) for kind in MOST for value, bits in FORMATS if (kind, value, bits) not in DAILY]
CASES = [(*case, 90) for case in DAILY]
FULL = [(*case, 90) for case in REST] + [(*case, capability) for case in (*DAILY, *REST) for capability in (80, 100)]


@pytest.mark.parametrize(
    ("kind", "value", "bits", "capability"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)]
)
def test_the_main_loop_is_within_its_budget(kind: str, value: str, bits: int, capability: int) -> None:
    shape = Shape((FORMATS[value, bits].to_json(),), (N,), K, x="bf16")
    _check(shape, MOST[kind], kind, value, bits, capability)


def test_a_row_and_its_norm_are_within_the_budget() -> None:
    shape = Shape((FORMATS["int", 4].to_json(),), (N,), K, prologue={"op": "rms_norm", "eps": 1e-5})
    _check(shape, 1, "skinny", "int", 4, 90)


def _check(shape: Shape, most: int, kind: str, value: str, bits: int, capability: int) -> None:
    code, bounds = target(f"cuda:sm_{capability}"), budget(kind, value, bits, capability)
    source = templates.emit(KernelSpec("linear-fragments", shape.params(most=most, split_k=1)), code)
    (made,) = compile_sources([source], code)
    assert made.launch is not None and made.launch.spills == 0 and made.launch.shared <= SHARED[capability]
    found = sass.profile(made.object)
    assert found.code.spills == 0 and found.main.tensor_cores
    if bounds is not None:
        spent = found.main.instructions / _weights(source)
        assert max(found.main.loads) >= bounds.load_bits
        assert spent <= bounds.instructions, f"{spent:.2f} {found.main.counts()}"


def _weights(source: Source) -> float:
    """The weights of a thread in one step, from the text that says the tile."""
    match = re.search(r"Tiles of (\d+) outputs x \d+ rows, (\d+) inputs a step", source.text)
    assert match is not None
    return int(match[1]) * int(match[2]) / (32 * source.warps)
