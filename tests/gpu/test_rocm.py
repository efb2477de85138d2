"""Kernels for AMD's GPUs, of which none was there: texts without NVIDIA's instructions, machine code, artifacts, the report."""

from __future__ import annotations

import json
from typing import Any

import end_to_end_models as tiny
import format_cases
import numpy as np
import pytest
import torch
from gpu import test_codebook, test_glue
from gpu.interpret import run

import qcompile
from qcompile.artifact import Built, KernelSpec
from qcompile.errors import ArtifactError
from qcompile.evaluate import dequantize
from qcompile.format import Format
from qcompile.formats.gptq import Gptq
from qcompile.formats.native import Native
from qcompile.lowering.triton import templates, toolchain
from qcompile.lowering.triton.linear import Shape
from qcompile.target import target

GFX942 = target("rocm:gfx942")
# s_waitcnt vmcnt(0), s_barrier, buffer_wbl2 sc1, and the upper half of global_store_dword
WAIT, BARRIER, PUBLISH, STORE = 0xBF8C0F70, 0xBF8A0000, 0xE0A08000, 0xDC70
MATRIX = 0xD3C0 >> 6  # the upper ten bits of v_mfma_*


def generic(format: Format, n: int, k: int, most: int, split_k: int = 1) -> KernelSpec:
    shape = Shape((format.to_json(),), (n,), k, compute="f16" if most > 4 else "bf16")
    return KernelSpec("linear-generic", shape.params(most=most, split_k=split_k))


def native(layout: Native, most: int) -> KernelSpec:
    shape = Shape((layout.to_json(),), (96,), 256)
    return KernelSpec("linear-native", shape.params(group=0, most=most, split_k=1, outliers=False))


def decoder(format: Format, n: int, k: int) -> KernelSpec:
    params: dict[str, Any] = {"format": format.to_json(), "n": n, "k": k, "y": "bf16"}
    return KernelSpec("dequantize", params)


def compiled(specs: list[KernelSpec]) -> list[Built]:
    """The kernels, each started as 64 threads a warp allow; ToolchainError where one has no machine code."""
    made = toolchain.compile_sources([templates.emit(spec, GFX942) for spec in specs], GFX942)
    for built in made:
        launch = built.launch
        assert built.object[:4] == b"\x7fELF" and launch is not None and launch.spills == 0
        assert launch.scratch == 2 and launch.warps * GFX942.warp <= 1024 and launch.shared <= 65536
    return made


def words(built: Built) -> list[int]:
    found: list[int] = np.frombuffer(built.object[: len(built.object) // 4 * 4], "<u4").tolist()
    return found


def test_a_warp_waits_for_its_parts_of_a_sum_before_they_are_counted() -> None:
    """AMD's barriers do not, so that another program could read parts that are not there yet."""
    (built,) = compiled([generic(Gptq(4, 128), 64, 1024, 4, split_k=2)])
    code = words(built)
    published = code.index(PUBLISH)
    stored = max(i for i in range(published) if code[i] >> 16 == STORE)
    assert WAIT in code[stored : code.index(BARRIER, stored)]
    assert "inline_asm" not in templates.emit(generic(Gptq(4, 128), 64, 1024, 4, 2), target("cuda:sm_90")).text


NATIVE = {
    "int4": Native(bits=4, zero=8, block=128),
    "e4m3": Native("f8e4m3"),
    "e5m2": Native("f8e5m2"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_codes_are_taken_apart_by_plain_arithmetic(name: str) -> None:
    """The text for the GPU itself, in the interpreter: what it multiplies are int8 and f16, which that gets right."""
    layout, n, k = NATIVE[name], 96, 256
    source = templates.emit(native(layout, 4), GFX942)
    assert "inline_asm" not in source.text and "float8" not in source.text
    random = torch.Generator().manual_seed(0)
    if layout.code == "int":
        x = torch.randint(-127, 128, (3, k), generator=random, dtype=torch.int8)
        codes, worth = x, x.double()
    else:
        dtype = {"f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}[layout.code]
        small = torch.randn(3, k, generator=random).to(dtype)
        codes, worth = small.view(torch.uint8), small.double()
    tensors = format_cases.random_storage(layout, n, k)
    if layout.code != "int":
        tensors["codes"] = torch.randn(n, k, generator=random).to(dtype).view(torch.uint8)
    scale, y = torch.rand(3, 1, generator=random), torch.full((3, n), torch.nan)
    run(source, [codes, y, *(tensors[stored.name] for stored in layout.stored(n, k)), scale], [3])
    expected = worth @ dequantize(layout, tensors, n, k).double().T * scale
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)


def test_kernels_of_each_way_compile() -> None:
    """One of each: decoded weights, int8, what are 8-bit floats elsewhere and codebooks, on matrix cores; and without them."""
    book = test_codebook.CASES[0]
    specs = [
        generic(Gptq(4, 32), 96, 64, 32),
        *(native(layout, 32) for layout in (NATIVE["int4"], NATIVE["e4m3"])),
        test_codebook.kernel(*book[:3], 32, book[3]),
        decoder(Gptq(4, 32), 96, 64),
        test_glue.SPECS[0],
    ]
    products = [sum(word >> 22 == MATRIX for word in words(built)) for built in compiled(specs)]
    assert min(products[:4]) >= 4 and products[4:] == [0, 0]


def test_an_artifact_holds_machine_code_and_says_what_runs_it(tmp_path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    q = qcompile.compile(layer, config, target="rocm:gfx942", example_inputs=(torch.randn(2, 64),), strict=True)
    (row,) = q.report.weights.values()
    assert row.tier == "generic" and "NVIDIA's" in row.reason
    assert {kernel.code for kernel in q.report.kernels} == {"gfx942"}
    q.save(tmp_path / "m.qc")
    found = {file.name.partition(".")[2] for file in (tmp_path / "m.qc").glob("kernel-*")}
    assert found == {"gfx942.py", "gfx942.hsaco"}
    with pytest.raises(ArtifactError) as error:
        qcompile.load(tmp_path / "m.qc", native="trusted")
    assert str(error.value) == (
        "the artifact is for another machine\n  found:    no AMD GPU with a driver\n  expected: rocm:gfx942\n"
        '  try:      target="reference" runs anywhere'
    )
    with pytest.raises(ArtifactError, match="for another kind of machine"):
        qcompile.load(tmp_path / "m.qc", target="cuda:sm_90")
    x = torch.randn(2, 64)
    weight = q.weight("0")
    found_y = qcompile.load(tmp_path / "m.qc", target="reference")(x)
    torch.testing.assert_close(found_y, torch.nn.functional.linear(x, weight, layer[0].bias), rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(("format", "n", "k"), format_cases.CASES, ids=format_cases.IDS)
def test_every_format_compiles(format: Format, n: int, k: int) -> None:
    compiled([*(generic(format, n, k, most) for most in (4, 32, 2048)), decoder(format, n, k)])


@pytest.mark.full
@pytest.mark.parametrize("most", [4, 32, 128])
@pytest.mark.parametrize("i", range(len(test_codebook.CASES)))
def test_every_codebook_compiles(i: int, most: int) -> None:
    format, rows, k, epilogue = test_codebook.CASES[i]
    compiled([test_codebook.kernel(format, rows, k, most, epilogue)])


@pytest.mark.full
@pytest.mark.parametrize("model", [("llama", "gptq"), ("gpt-oss", "float")], ids="-".join)
def test_a_model_compiles(model: tuple[str, str], tmp_path) -> None:
    q = tiny.compiled(*model, "rocm:gfx942")
    assert q.report.kernels and all(row.spills == 0 for row in q.report.kernels)
    q.save(tmp_path / "m.qc")
    assert json.loads((tmp_path / "m.qc" / "manifest.json").read_text())["target"] == "rocm:gfx942"
    with pytest.raises(ArtifactError, match="no AMD GPU with a driver"):
        qcompile.load(tmp_path / "m.qc")
