"""Few rows times weights that are entries of codebooks, in Triton's interpreter against the weight decoded by its format."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gpu.interpret import run

from qcompile.artifact import KernelSpec
from qcompile.dtypes import DTYPES
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.codebook import Aqlm, Vptq
from qcompile.formats.higgs import Higgs
from qcompile.formats.runs import Runs, runs_for, runs_form
from qcompile.lowering.triton import linear_codebook, sass, templates, toolchain
from qcompile.lowering.triton.budgets import budget
from qcompile.lowering.triton.linear import Shape
from qcompile.target import target

INTERPRETED = target("cuda:interpret")
GLU = ({"op": "glu", "act": "silu"},)


def storage(format: Format, n: int, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(seed), {}
    for stored in format.stored(n, k):
        dtype = DTYPES[stored.dtype]
        if dtype.is_floating_point:
            made[stored.name] = torch.randn(stored.shape, generator=generator).to(dtype)
        else:
            info = torch.iinfo(dtype)
            made[stored.name] = torch.randint(info.min, info.max, stored.shape, generator=generator).to(dtype)
    return made


def laid_out(format: Format, n: int, k: int, seed: int = 0) -> Packed:
    made = runs_for(Packed(format, storage(format, n, k, seed), n, k))
    assert not isinstance(made, str), made
    return made


def kernel(
    format: Format,
    rows: tuple[int, ...],
    k: int,
    most: int,
    epilogue: tuple[dict[str, Any], ...] = (),
    split_k: int = 1,
) -> KernelSpec:
    compute = getattr(format, "dtype", "f16")
    x = "f32" if most <= 4 else compute
    layouts = tuple(runs_form(format, n, k).to_json() for n in rows)  # type: ignore[union-attr]
    shape = Shape(layouts, rows, k, True, None, epilogue, compute, x)
    return KernelSpec("linear-codebook", json.loads(json.dumps(shape.params(most=most, split_k=split_k))))


CASES: list[tuple[Format, tuple[int, ...], int, tuple[dict[str, Any], ...]]] = [
    (Aqlm(2, 8), (21,), 136, ()),
    (Aqlm(1, 12, 1, 8, "bf16", "f32"), (16, 7), 80, ()),
    (Higgs(2, 64, 16), (128,), 64, GLU),
    (Higgs(3, 64, 32), (512,), 64, ({"op": "relu"},)),
    (Vptq(8, 64, 16), (37,), 40, ()),
    (Vptq(4, 4096, norm=False), (24,), 70, GLU[:0]),
]


@pytest.mark.parametrize("m", [3, 17])
@pytest.mark.parametrize(("format", "rows", "k", "epilogue"), CASES, ids=lambda each: getattr(each, "kind", ""))
def test_sums_of_entries(
    format: Format, rows: tuple[int, ...], k: int, epilogue: tuple[dict[str, Any], ...], m: int
) -> None:
    held = [laid_out(format, n, k, seed) for seed, n in enumerate(rows)]
    w = torch.cat([dequantize(each.format, each.tensors, each.N, k) for each in held])
    x, bias = torch.randn(m, k).to(DTYPES[format.dtype]), torch.randn(sum(rows))  # type: ignore[attr-defined]
    expected = torch.nn.functional.linear(x.float(), w, bias)
    if epilogue == GLU:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    elif epilogue:
        expected = expected.relu()
    y = torch.full(expected.shape, 7.0)
    spec = kernel(format, rows, k, 4 if m <= 4 else 32, epilogue)
    stored = [tensor for each in held for tensor in each.tensors.values()]
    source = templates.emit(spec, INTERPRETED)
    run(source, [x.float() if m <= 4 else x, y, *stored, bias], [m])
    rounded = format.kind == "vptq"  # x times a column's scale
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=(1e-3 if rounded else 2e-6) * float(expected.abs().max()))
    assert len(templates.extents(spec)((m,), 1)) == len(source.pointers)


def test_parts_of_k_are_added_in_order() -> None:
    format, k = Aqlm(1, 8), 512
    held, x, bias = laid_out(format, 20, k), torch.randn(2, k), torch.zeros(20)
    spec = kernel(format, (20,), k, 4, split_k=2)
    y, parts, arrivals = torch.zeros(2, 20), torch.zeros(2 * 2 * 20), torch.zeros(2, dtype=torch.int32)
    run(templates.emit(spec, INTERPRETED), [x, y, *held.tensors.values(), bias, parts, arrivals], [2])
    expected = x.half().float() @ dequantize(held.format, held.tensors, 20, k).T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert not arrivals.any()


def test_what_has_no_kernel() -> None:
    half = kernel(Higgs(2, 64, 16), (128,), 64, 4, GLU).params | {"rows": [48], "formats": [Runs("k").to_json()]}
    with pytest.raises(Exception, match="second half begins at row 24, within a block of 32"):
        templates.emit(KernelSpec("linear-codebook", half), INTERPRETED)
    with pytest.raises(Exception, match="4 parts of K that cut a block"):
        templates.emit(kernel(Aqlm(1, 12), (16,), 512, 4, split_k=4), INTERPRETED)
    with pytest.raises(Exception, match="more than 128 rows"):
        linear_codebook.calls(None, 129)  # type: ignore[arg-type]


def compiled(capability: int, chosen: list[int], most: int) -> None:
    place = target(f"cuda:sm_{capability}")
    sources = [
        templates.emit(kernel(format, rows, k, most, epilogue), place)
        for format, rows, k, epilogue in (CASES[i] for i in chosen)
    ]
    for built in toolchain.compile_sources(sources, place):
        assert built.launch is not None and built.launch.spills == 0


BOOKS: list[Format] = [
    Higgs(3), Aqlm(1, 16), Aqlm(2, 8), Aqlm(4, 8, 1, 16), Higgs(2), Higgs(4), Vptq(4, 4096), Vptq(8, 2**16), Vptq(8, 256, 256),
    Vptq(8, 2**16, 256), Vptq(16, 2**16, 1024),
]  # fmt: skip
ALL = [(format, capability, most) for format in BOOKS for capability in (80, 90, 100, 120) for most in (4, 32)]
DAILY = [(format, 90, 4) for format in BOOKS[:1]]


@pytest.mark.parametrize(
    ("format", "capability", "most"),
    [*DAILY, *(pytest.param(*case, marks=pytest.mark.full) for case in ALL if case not in DAILY)],
)
def test_the_main_loop_is_within_its_budget(format: Format, capability: int, most: int) -> None:
    """On tensor cores, codes loaded as 128 bits, with no exchange between threads."""
    place, layout = target(f"cuda:sm_{capability}"), runs_form(format, 4096, 4096)
    assert isinstance(layout, Runs)
    bounds = budget("codebook", linear_codebook.value_of(layout), linear_codebook.bits_of(layout), capability)
    source = templates.emit(kernel(format, (4096,), 4096, most), place)
    (built,) = toolchain.compile_sources([source], place)
    assert built.launch is not None and built.launch.spills == 0 and bounds is not None
    loop = sass.profile(built.object).main
    weights = source.warps * layout.outputs * layout.inputs / (32 * source.warps)
    spent, counts = loop.instructions / weights, loop.counts()
    assert loop.tensor_cores and loop.loads[128] >= layout.loads and not counts["SHFL"]
    assert spent <= bounds.instructions, f"{spent:.2f} {counts}"


@pytest.mark.full
@pytest.mark.parametrize("most", [1, 4, 32])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_compile(capability: int, most: int) -> None:
    compiled(capability, list(range(len(CASES))), most)
