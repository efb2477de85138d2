"""Targets and the way from MLIR text to an object."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.errors import ConfigError, ToolchainError
from qcompile.lowering.mlir import toolchain
from qcompile.lowering.mlir.literals import portable
from qcompile.lowering.mlir.text import Text
from qcompile.target import CPU_LEVELS, native, target


def text() -> str:
    t = Text("scale")
    with t.loop(0, t.dim(0)) as i:
        place = t.arg(0).at(i, "f32")
        t.store(t.load(place, "f32") * 0.1, place)
    return t.finish()


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_same_text_same_bytes(level: str) -> None:
    first, second = (toolchain.compile_module(text(), CPU_LEVELS[level]) for _ in range(2))
    assert first == second and first.startswith(b"\x7fELF") and b"scale" in first


def test_keys_tell_texts_and_targets_apart() -> None:
    keys = {toolchain.key(source, level) for source in (text(), text() + " ") for level in CPU_LEVELS.values()}
    assert len(keys) == 2 * len(CPU_LEVELS)


def test_a_refused_text_is_kept() -> None:
    with pytest.raises(ToolchainError, match="custom op 'nonsense'") as caught:
        toolchain.compile_module("func.func @f() { nonsense }", native())
    kept = Path(caught.value.where)
    assert kept.read_text() == "func.func @f() { nonsense }"
    kept.unlink()


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("fadd float %0, f0x3F3504F3", "fadd float %0, 0x3FE6A09E60000000"),
        ("fadd float %0, 1.000000e-01", "fadd float %0, 0x3FB99999A0000000"),
        ("fadd double %0, 1.000000e-01", "fadd double %0, 0x3FB999999999999A"),
        ("fadd half %0, -inf", "fadd half %0, 0xHFC00"),
        ("fadd bfloat %0, 1.000000e+00", "fadd bfloat %0, 0xR3F80"),
        (
            "<2 x float> <float +qnan, float -nan(0x1)>",
            "<2 x float> <float 0x7FF8000000000000, float 0xFFF8000020000000>",
        ),
        ("call void @inf(i64 %nan)", "call void @inf(i64 %nan)"),
    ],
)
def test_float_literals(new: str, old: str) -> None:
    assert portable(new) == old


def test_targets_by_name() -> None:
    assert target("cpu") == target("cpu:native") == native()
    assert target("reference:cuda:1").device == "cuda:1" and not target("reference").missing()
    assert not native().missing()
    assert sum(bool(level.missing()) for level in CPU_LEVELS.values()) >= 1  # no machine is both x86-64 and aarch64
    with pytest.raises(ConfigError, match="did you mean 'cpu:x86-64-v3'"):
        target("cpu:x86_64-v3")
