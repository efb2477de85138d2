"""Pointwise kernels, copies, reductions, norms and gathers in Triton, interpreted, against eager; and that they compile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from glue_cases import (
    BINARY,
    REDUCTIONS,
    SMOOTH,
    SPECIAL,
    UNARY,
    VIEWS,
    around_codes,
    parts_along,
    rows_in_disorder,
    values,
)
from gpu.interpret import run
from gpu.triton_lowered import INTERPRETED, Interpreted
from tiny_programs import Call, program

from qcompile.artifact import KernelSpec
from qcompile.backend import ReferenceBackend
from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError
from qcompile.lowering import pointwise
from qcompile.lowering.triton import scalar_ops, templates, toolchain
from qcompile.lowering.triton.elementary import FUNCTIONS
from qcompile.lowering.triton.sass import profile
from qcompile.passes.base import Context, Pass, run_pipeline
from qcompile.passes.form_regions import FormRegions
from qcompile.target import target

functional = torch.nn.functional
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, for infinities and NaN


def agrees(
    function: Callable[..., Any], *inputs: torch.Tensor, rtol: float = 2e-6, atol: float = 2e-6,
    passes: Sequence[Pass] = (), dynamic: dict[int, str] | None = None, **parameters: torch.Tensor,
) -> Interpreted:  # fmt: skip
    """Asserts that the interpreted kernels give what eager gives, and that no operation is left to ATen."""
    given = program(Call(function, **parameters), *inputs, dynamic=dynamic)
    if passes:
        run_pipeline(given, passes, Context(given.report, ReferenceBackend(regions=True)))
    made = Interpreted(given)
    found, expected = made(*(x.contiguous() for x in inputs)), function(*inputs, **parameters)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    return made


def test_every_operation_has_a_text() -> None:
    assert set(scalar_ops.OPS) == set(pointwise.OPS)
    assert [name for name, text in FUNCTIONS.items() if f"def {name}(" not in text] == []


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    x = torch.cat([SPECIAL, values(41)])
    x = x[x.isfinite() & (x.abs() < 1e20)] if name in SMOOTH else x
    agrees(UNARY[name], x)


SHAPES = [((3, 7, 33), (33,)), ((5, 1, 6), (4, 1)), ((), (19,))]


@pytest.mark.parametrize(("name", "shapes"), zip(BINARY, itertools.cycle(SHAPES), strict=False))
def test_binary_with_broadcasting(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    x, y = (values(*shape, seed=i) for i, shape in enumerate(shapes))
    agrees(BINARY[name], x, y)


def test_powers_as_c_has_them() -> None:
    x, y = (item.flatten() for item in torch.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    agrees(torch.pow, x, y)


@pytest.mark.parametrize("source", ["f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"])
def test_conversion(source: str) -> None:
    x = (values(3, 19).abs() * 9).to(DTYPES[source]).t()
    every = ("f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool")
    for dtype in every if source in ("f32", "i32") else ("f32", "i8", "bool"):
        agrees(lambda x, dtype=dtype: x.to(DTYPES[dtype], copy=True), x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_rounded_after_every_operator(dtype: torch.dtype) -> None:
    x, y = values(4, 37).to(dtype), values(4, 37, seed=1).to(dtype)
    agrees(lambda x, y: (x * y + x) * 0.3, x, y, rtol=0, atol=0, passes=[FormRegions()])


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2", "f8e8m0"])
def test_every_8_bit_float_is_read(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[dtype])
    agrees(lambda x: x.to(torch.float32), codes, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2"])
def test_rounding_to_8_bit_floats(dtype: str) -> None:
    x = around_codes(dtype)
    agrees(lambda x: x.to(DTYPES[dtype]).to(torch.float32), x, rtol=0, atol=0)
    agrees(lambda x: x.to(DTYPES[dtype]).to(torch.float32), x, rtol=0, atol=0, passes=[FormRegions()])


def test_bits_of_floats() -> None:
    def power_of_two(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32) * x

    agrees(power_of_two, values(3, 77).abs() + 1e-6, rtol=0, atol=0, passes=[FormRegions()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_integers(dtype: torch.dtype) -> None:
    x, y = ((values(5, 23, seed=i) * 20).to(dtype) for i in range(2))
    agrees(lambda x, y: torch.where(x < y, x * y - 3, x // 7) & 63, x, y, rtol=0, atol=0, passes=[FormRegions()])
    agrees(lambda x, y: (x % 5) + (x > y).to(x.dtype), x, y, rtol=0, atol=0)
    agrees(lambda x, y: torch.maximum(x.abs(), -y) + torch.sign(x), x, y, rtol=0, atol=0)
    agrees(lambda x, y: x / 4 + y * 0.5, x, y)
    if dtype == torch.int64:
        agrees(lambda x: torch.where(x > 3, x, 2**62 + 1), x, rtol=0, atol=0)


def test_bools() -> None:
    x, y = values(3, 11) > 0, values(3, 11, seed=1) > 0
    agrees(lambda x, y: (x & ~y) | (x ^ y), x, y, rtol=0, atol=0, passes=[FormRegions()])
    agrees(lambda x, y: torch.where(x, torch.logical_not(y), y), x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    agrees(VIEWS[name], values(4, 7, 35))


def test_many_dimensions_that_do_not_collapse() -> None:
    x = values(3, 2, 4, 3, 2, 5)
    agrees(lambda x, y: x.permute(5, 3, 1, 4, 2, 0) + y, x, values(5, 1, 2, 1, 4, 1, seed=3))


def test_a_region_is_one_kernel_for_every_size() -> None:
    y = values(40, seed=2)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, functional.silu(x) * y, x.exp() - 1)

    made = agrees(function, values(2, 9, 40), dynamic={0: "b", 1: "s"}, passes=[FormRegions()], y=y)
    assert made.kernels == ["pointwise"]
    for b, s in ((1, 1), (5, 2)):
        x = values(b, s, 40, seed=b)
        torch.testing.assert_close(made(x), function(x, y), rtol=2e-6, atol=2e-6)


def test_arange() -> None:
    agrees(lambda x: x + torch.arange(x.shape[0]) * 2, torch.arange(37), rtol=0, atol=0)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name: str) -> None:
    for shape in ((2, 3, 1), (3, 5, 7), (1, 2, 160)):
        agrees(REDUCTIONS[name], values(*shape), rtol=1e-5, atol=1e-5)


def test_few_slices_are_folded_where_they_lie() -> None:
    x = values(3, 4, 37)
    x[1, 2, 5] = math.nan
    for function in (torch.sum, torch.mean, torch.amax, torch.amin):
        for keep in (False, True):
            assert agrees(lambda x, f=function, keep=keep: f(x, 1, keepdim=keep), x).kernels == ["pointwise"]
    assert agrees(lambda x: x.sum(1), values(3, 1, 37)).kernels == ["pointwise"]
    assert agrees(lambda x: x.sum(1), values(3, 17, 5), rtol=1e-5).kernels == ["pointwise", "reduce"]
    agrees(lambda x: x.sum(1), values(3, 6, 5), dynamic={1: "s"}, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16])
def test_sum_of_narrow_elements(dtype: torch.dtype) -> None:
    x = (values(3, 45).abs() * 30).to(dtype)
    agrees(lambda x: x.sum(-1), x, rtol=1e-3 if dtype.is_floating_point else 0, atol=0)
    if not dtype.is_floating_point:
        agrees(lambda x: x.amax(-1), x, rtol=0, atol=0)
        agrees(lambda x: x.amin(-1), x, rtol=0, atol=0)


def test_rows_of_any_length() -> None:
    """Rows longer than a tile, of a length that is known and of one that is not."""
    x = values(2, 9000)
    x[1, 8999] = 100.0
    for function in (lambda x: x.sum(-1), lambda x: x.argmax(-1), lambda x: x.amin(-1)):
        agrees(function, x, rtol=1e-5, atol=1e-3)
    agrees(lambda x: torch.softmax(x, -1), x)
    agrees(lambda x: functional.layer_norm(x, (9000,)), x, rtol=1e-5, atol=1e-5)
    agrees(lambda x: torch.log_softmax(x, -1), values(3, 50), dynamic={1: "n"}, rtol=1e-5, atol=1e-5)


def test_nan_wins_and_the_first_of_equals_is_taken() -> None:
    x = torch.zeros(5, 37)
    x[1, 20] = x[1, 35] = 5.0
    x[2, 30], x[2, 3] = math.nan, math.inf
    x[3], x[4, 5] = -math.inf, -0.0
    for function in (torch.argmax, torch.argmin, torch.amax, torch.amin):
        agrees(lambda x, function=function: function(x, -1), x, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 33, 576])
def test_norms(width: int) -> None:
    x, w, b = values(3, 5, width) + 10.0, values(width, seed=1), values(width, seed=2)
    for offset in (0.0, 1.0):
        agrees(lambda x, w, o=offset: torch.ops.qcompile.rms_norm(x, w, 1e-5, o), x.transpose(0, 1), w)
    agrees(lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-6), x, w, b, rtol=1e-5, atol=2e-5)
    agrees(lambda x: functional.layer_norm(x, (width,)), x, rtol=1e-5, atol=2e-5)
    x[0, 0, 0], x[1, 1, -1] = -math.inf if width > 1 else 0.0, 90.0
    agrees(lambda x: torch.softmax(x, -1), x)
    agrees(lambda x: torch.log_softmax(x, -1), x, rtol=1e-5, atol=1e-5)


def test_embedding_and_index_select() -> None:
    ids, i = torch.tensor([[0, 4, 9], [9, 1, 0]]), torch.tensor([2, 0, -1, 1, 2])
    for dtype in (torch.float32, torch.bfloat16):
        agrees(functional.embedding, ids, values(10, 37).to(dtype), rtol=0, atol=0)
    for axis in range(3):
        x = (values(3, 4, 19) * 5).to([torch.float32, torch.int64, torch.uint8][axis])
        agrees(lambda x, i, axis=axis: torch.index_select(x, axis, i), x, i.abs(), rtol=0, atol=0)
    agrees(lambda x, i: x[:, i, :] * 2.0, values(2, 5, 8), i)


def test_an_index_out_of_range_reads_nothing_and_shows() -> None:
    made = Interpreted(program(Call(lambda x, i: torch.index_select(x, 0, i)), values(3, 5), torch.tensor([0, 1])))
    y = made(values(3, 5), torch.tensor([2**40, 1]))
    assert y[0].isnan().all() and torch.equal(y[1], values(3, 5)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk(dtype: torch.dtype) -> None:
    x = rows_in_disorder(dtype)
    for largest in (True, False):
        for part in (0, 1):
            agrees(lambda x, part=part, big=largest: torch.topk(x, 5, largest=big)[part], x, rtol=0, atol=0)
    every = agrees(lambda x: torch.topk(x, 37)[1], torch.zeros(3, 37), rtol=0, atol=100)(torch.zeros(3, 37))
    assert torch.equal(every, torch.arange(37).expand(3, -1))


def test_cumsum() -> None:
    agrees(lambda x: x.cumsum(-1), values(2, 3, 37), rtol=1e-5, atol=1e-5)
    agrees(lambda x: x.cumsum(1), (values(2, 50) > 0), dynamic={1: "n"}, rtol=0, atol=0)
    agrees(lambda x: x.cumsum(0), (values(9000) * 5).to(torch.int32), rtol=0, atol=0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cat(axis: int) -> None:
    agrees(lambda *parts: torch.cat(parts, axis), *parts_along(axis), rtol=0, atol=0)
    agrees(lambda a, b: torch.stack([a, b * 2], axis), values(4, 3), values(4, 3, seed=9))


def test_repeat_and_diff() -> None:
    agrees(lambda x: x.repeat(2, 1, 3), values(3, 5), rtol=0, atol=0)
    agrees(lambda x: x.repeat(3, 2), values(4, 3).t().contiguous().t()[1:], rtol=0, atol=0)
    agrees(lambda x: x.repeat(x.shape[0], x.shape[1], 2), values(3, 5), dynamic={0: "b", 1: "s"}, rtol=0, atol=0)
    agrees(lambda x: x.repeat_interleave(3, 1), values(2, 4, 5), rtol=0, atol=0)
    x, before, after = (values(2, n, 5, seed=n) for n in (7, 1, 2))
    agrees(lambda x: torch.diff(x), x, rtol=0, atol=0)
    agrees(lambda x, a, b: torch.diff(x, dim=1, prepend=a, append=b), x, before, after, rtol=0, atol=0)


def test_rows_that_begin_anywhere_are_copied_for_kernels_that_want_them_aligned() -> None:
    made = agrees(lambda x: torch.softmax(x[1], -1), values(3, 5, 7))
    assert made.kernels == ["pointwise", "row-norm"]
    assert agrees(lambda x: torch.softmax(x[1], -1), values(3, 5, 8)).kernels == ["row-norm"]


BINARY_OPS = (
    pointwise.OPS[: pointwise.OPS.index("not")]
    + pointwise.OPS[pointwise.OPS.index("eq") : pointwise.OPS.index("where")]
)
POINTWISE = {
    "dims": 2, "inputs": [["f8e4m3", "unit"], ["bf16", "apart"], ["bool", "same"]],
    "outputs": [["f8e5m2", "unit", 4], ["i64", "apart", 5]], "columns": 256, "multiple": 4, "rows": [4, 1, 1, 4, 1],
    "starts": [False, True, False, False, False],
    "ops": [["where", "f32", [2, 0, 1]], ["gelu", "f32", [3]], ["to", "i64", [4]]],
}  # fmt: skip
SILU = {
    "dims": 2, "inputs": [["f32", "unit"]], "outputs": [["f32", "unit", 1]], "columns": 256, "multiple": 4, "rows": [4, 4],
    "starts": [False, False], "ops": [["silu", "f32", [0]]],
}  # fmt: skip
TILE = {"columns": 64, "whole": True, "multiple": 4}
SPECS = [
    KernelSpec("pointwise", SILU),
    KernelSpec("pointwise", POINTWISE),
    KernelSpec("reduce", {"op": "amax", "x": "bf16", "y": "f32", **TILE}),
    KernelSpec("row-norm", {"op": "layer_norm", "x": "f32", "y": "f16", "weight": "bf16", "eps": 1e-5, **TILE}),
    KernelSpec("gather", {"x": "f8e4m3", "index": "i64", "y": "f32", **TILE}),
    KernelSpec("topk", {"x": "bf16", "k": 4, "largest": True, **TILE}),
    KernelSpec("cumsum", {"x": "bool", "y": "i64", **TILE | {"whole": False}}),
]


@pytest.mark.parametrize(
    ("spec", "dims"),
    [
        (SPECS[0], (3, 12, 20, 12)),
        (SPECS[1], (3, 12, 20, 40, 3, 1, 12, 25, 2, 5)),
        *((spec, (3, 36)) for spec in SPECS[2:4]),
        (SPECS[4], (2, 3, 4, 12)),
        *((spec, (3, 36)) for spec in SPECS[5:]),
    ],
    ids=lambda item: item.template if isinstance(item, KernelSpec) else "",
)
def test_nothing_is_written_behind_the_result_and_by_programs_past_the_end(
    spec: KernelSpec, dims: tuple[int, ...]
) -> None:
    source = templates.emit(spec, INTERPRETED)
    source = replace(source, grid=(f"{source.grid[0]} + 2", 1, 1))
    extents = templates.extents(spec)(dims, 1)
    sizes = [extent.elements * DTYPES[extent.dtype].itemsize for extent in extents]
    memory = [torch.full((size + 64,), 1, dtype=torch.uint8) for size in sizes]
    for bytes_, size in zip(memory, sizes, strict=True):
        bytes_[:size] = 0
    before = [item.clone() for item in memory]
    run(source, [m[: 64 + n].view(DTYPES[e.dtype]) for m, n, e in zip(memory, sizes, extents, strict=True)], dims)
    for old, new, size, extent in zip(before, memory, sizes, extents, strict=True):
        assert torch.equal(old[size:], new[size:])
        assert extent.written or torch.equal(old, new)


@pytest.mark.parametrize(
    "name", ["cuda:sm_90", *(pytest.param(f"cuda:{name}", marks=pytest.mark.full) for name in ("sm_80", "sm_100"))]
)
def test_compiles(name: str) -> None:
    """Without spills; rows whose places are known multiples of 4 are moved 16 bytes at once."""
    place = target(name)
    made = toolchain.compile_sources([templates.emit(spec, place) for spec in SPECS], place)
    assert all(built.object and built.launch is not None and not built.launch.spills for built in made)
    found = profile(made[0].object).code
    assert set(found.loads) == {128} and found.counts()["STG"] == found.loads[128]


@pytest.mark.full
@pytest.mark.parametrize("op", pointwise.OPS)
def test_every_operation_compiles(op: str) -> None:
    """For floats and, where it has a meaning for them, integers of all widths."""
    place, sources = target("cuda:sm_80"), []
    integers = (
        () if op in pointwise.OPS[pointwise.OPS.index("sqrt") :] or op in ("div", "pow") else ("i64", "i32", "i8", "u8")
    )
    floats = () if op in ("remainder", "and", "or", "xor", "not") else ("f32",)
    for dtype in (*floats, *integers):
        logical = op in ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf")
        result = "bool" if logical else "i32" if op == "bitcast" else dtype
        divisor: Any = {"number": 7} if op in ("floor_divide", "remainder") else 0
        operands = [1, 0, 0] if op == "where" else [0, divisor][: 2 if op in BINARY_OPS else 1]
        params = {
            "dims": 1, "inputs": [[dtype, "unit"]], "outputs": [[result, "unit", 2]], "columns": 1024, "multiple": 4,
            "rows": [4, 4], "starts": [False, False], "ops": [["to", "bool", [0]], [op, result, operands]],
        }  # fmt: skip
        sources.append(templates.emit(KernelSpec("pointwise", params), place))
    assert all(built.object for built in toolchain.compile_sources(sources, place))


def test_parameters_out_of_range_are_refused() -> None:
    for wrong in ({"columns": 3}, {"multiple": 5}, {"rows": [4]}, {"starts": []}):
        with pytest.raises(ArtifactError, match="out of range"):
            templates.extents(KernelSpec("pointwise", POINTWISE | wrong))
    of = templates.extents(KernelSpec("row-norm", {"op": "softmax", "x": "f32", "y": "f32", **TILE}))
    assert [item.elements for item in of((3, 64), 1)] == [192, 192]
    for dims in ((3, 68), (3, 30), (2**31, 4)):
        with pytest.raises(ArtifactError):
            of(dims, 1)
