"""Linear kernels over weights in fragment order against float64, interpreted: each value class in each kind of kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.interpret import run

from qcompile.artifact import KernelSpec
from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError
from qcompile.evaluate import dequantize
from qcompile.formats.coded import Content
from qcompile.formats.fragments import Fragments, pack_fragments
from qcompile.formats.minifloat import E2M1
from qcompile.formats.tables import NF4
from qcompile.lowering.triton import templates
from qcompile.lowering.triton.linear import Shape
from qcompile.lowering.triton.source import Source
from qcompile.target import target

INTERPRETED = target("cuda:interpret")
INT4 = Fragments(4, 128, zero=8.0, scale="bf16")
CLASSES = {
    "int4": INT4,
    "int4-zeros": Fragments(4, 32, zero="u8", scale="bf16"),
    "int4-float-zeros": Fragments(4, 64, zero="f16", scale="f16"),
    "int4-offset": Fragments(4, 64, scale="f16", offset="f16"),
    "int4-half-zero": Fragments(4, 64, zero=7.5, scale="bf16"),
    "int2": Fragments(2, 256, zero="u8", scale="f16"),
    "int3": Fragments(3, 64, zero=3.0, scale="f16", rounding="product-f16"),
    "int8": Fragments(8, 256, zero=128.0, scale="f32"),
    "int8-zeros": Fragments(8, 128, zero="u8", scale="f32"),
    "nf4": Fragments(4, 64, NF4, scale="f32"),
    "mxfp4": Fragments(4, 32, E2M1, scale="f8e8m0"),
    "nvfp4": Fragments(4, 16, E2M1, scale="f8e4m3", tensor=True),
    "fp8": Fragments(8, 128, scale="f32", code="f8e4m3"),
    "fp8-channel": Fragments(8, 256, scale="f32", code="f8e5m2", factor=0.5),
}
KINDS = {"skinny": 16, "mid": 128, "large": 2048}
# Beyond 32 rows only the scales come in elsewhere: one case for each way there is.
MORE = [
    ("int4-zeros", "mid"),
    ("int4-offset", "mid"),
    ("nf4", "mid"),
    ("mxfp4", "mid"),
    ("int3", "large"),
    ("fp8-channel", "large"),
]
CASES = [(name, "skinny") for name in CLASSES] + MORE
REST = [(name, kind) for name in CLASSES for kind in KINDS if (name, kind) not in CASES]


def weight(format: Fragments, N: int, K: int, seed: int) -> list[torch.Tensor]:
    """Random stored tensors in the order of the format."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << format.bits, (N, K), generator=random).to(torch.uint8)
    if format.code != "int":
        codes[~codes.view(DTYPES[format.code]).float().isfinite()] = 0
    groups = (N, K // format.group)
    scale = 2.0 ** torch.randint(-3, 3, groups, generator=random)
    if format.scale != "f8e8m0":
        scale = scale * (torch.rand(groups, generator=random) + 0.5)
    scale = scale.to(DTYPES[format.scale])
    zero = offset = None
    if isinstance(format.zero, str):
        zero = torch.randint(0, 1 << format.bits, groups, generator=random) + (0 if format.zero == "u8" else 0.25)
        zero = zero.to(DTYPES[format.zero])
    if format.offset is not None:
        offset = torch.randn(groups, generator=random).to(DTYPES[format.offset])
    tensor = torch.rand(1, generator=random) if format.tensor else None
    made = pack_fragments(format, Content({}, codes, scale, zero, offset, None), scale, tensor)
    return [made[stored.name] for stored in format.stored(N, K)]


def values(format: Fragments, stored: list[torch.Tensor], N: int, K: int) -> torch.Tensor:
    """W f64, without the format's own rounding of each weight, which kernels leave out."""
    exact = replace(format, rounding="none")
    return dequantize(exact, {s.name: t for s, t in zip(format.stored(N, K), stored, strict=True)}, N, K).double()


def source(shape: Shape, most: int, split_k: int = 1) -> Source:
    return templates.emit(KernelSpec("linear-fragments", shape.params(most=most, split_k=split_k)), INTERPRETED)


def close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, weights_rounded: bool, compute: str) -> None:
    """Within f32 sums of exact products of x as rounded, and one rounding of each weight where they are rounded."""
    rounded = x.to(DTYPES[compute]).double()
    want, size = rounded @ w.T, rounded.abs() @ w.T.abs()
    unit = {"bf16": 2.0**-9, "f16": 2.0**-12}[compute] if weights_rounded else 2.0**-20
    assert got.isfinite().all() and ((got - want).abs() <= size * unit + 1e-6).all()


def rounds(format: Fragments, most: int, k: int) -> bool:
    """Whether each weight may be rounded; the PTX for all GPUs has no kernel of its own for 5 to 32 rows."""
    tables = format.table is not None and format.table != E2M1
    return tables or (most > (4 if INTERPRETED.portable else 32) and format.group != k)


@pytest.mark.parametrize(("name", "kind"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)])
def test_every_value_class_in_every_kind(name: str, kind: str) -> None:
    format, N, K, M = CLASSES[name], 19, 256, 5
    stored, x = weight(format, N, K, 1), torch.randn(M, K, generator=torch.Generator().manual_seed(2))
    compute = "f16" if format.scale == "f16" else "bf16"
    shape = Shape((format.to_json(),), (N,), K, compute=compute)  # type: ignore[arg-type]
    y = torch.full((M, N), torch.nan)
    run(source(shape, KINDS[kind]), [x, y, *stored], [M])
    close(y, x, values(format, stored, N, K), rounds(format, KINDS[kind], K), compute)


@pytest.mark.parametrize("format", [INT4, CLASSES["mxfp4"], CLASSES["int8"]], ids=["int4", "mxfp4", "int8"])
def test_inputs_that_fill_no_block(format: Fragments) -> None:
    N, K, M = 43, 160, 3
    format = replace(format, group=32 if format.group == 32 else K)
    stored, x = weight(format, N, K, 3), torch.randn(M, K)
    y = torch.full((M, N), torch.nan)
    run(source(Shape((format.to_json(),), (N,), K), 16), [x, y, *stored], [M])
    close(y, x, values(format, stored, N, K), False, "bf16")


def test_k_in_parts_gives_the_same_bits_in_any_order_and_leaves_its_counters_zero() -> None:
    N, K, M = 33, 512, 2
    stored, x = weight(INT4, N, K, 4), torch.randn(M, K)
    made = source(Shape((INT4.to_json(),), (N,), K), 4, split_k=2)
    results = []
    for _ in range(2):
        y, arrivals = torch.full((M, N), torch.nan), torch.zeros(16, dtype=torch.int32)
        run(made, [x, y, *stored, torch.full((2, M, N), torch.nan), arrivals], [M])
        assert not arrivals.any()
        results.append(y)
    assert torch.equal(*results)
    close(results[0], x, values(INT4, stored, N, K), False, "bf16")


@pytest.mark.parametrize("compute", ["bf16", "f16"])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norm_gate_bias_and_residual_around_a_few_rows(op: str, compute: str) -> None:
    N, K, M = 64, 192, 3
    format = Fragments(4, 64, zero="u8", scale="f16")
    stored, x = weight(format, N, K, 5), torch.randn(M, K) + 0.5
    norms = [torch.rand(K) + 0.5, torch.randn(K)][: 1 + (op == "layer_norm")]
    bias, residual = torch.randn(N), torch.randn(M, N // 2)
    shape = Shape(
        (format.to_json(),), (N,), K, True, {"op": op, "eps": 1e-5},
        ({"op": "glu", "act": "silu"}, {"op": "add"}), compute=compute,  # type: ignore[arg-type]
    )  # fmt: skip
    y = torch.full((M, N // 2), torch.nan)
    run(source(shape, 4), [x, y, *stored, bias, *norms, residual], [M])
    if op == "rms_norm":
        normed = torch.nn.functional.rms_norm(x.double(), (K,), norms[0].double(), 1e-5)
    else:
        normed = torch.nn.functional.layer_norm(x.double(), (K,), norms[0].double(), norms[1].double(), 1e-5)
    sums = normed @ values(format, stored, N, K).T + bias.double()
    want = torch.nn.functional.silu(sums[:, : N // 2]) * sums[:, N // 2 :] + residual
    torch.testing.assert_close(y.double(), want, rtol=0, atol=float(want.abs().max()) * 0.02)


def test_parts_of_different_formats_and_an_x_in_the_compute_dtype() -> None:
    K, M, rows = 128, 18, (21, 16)
    formats = (INT4, CLASSES["fp8"])
    parts = [weight(format, n, K, 6) for format, n in zip(formats, rows, strict=True)]
    x = torch.randn(M, K).bfloat16()
    shape = Shape(tuple(format.to_json() for format in formats), rows, K, x="bf16")
    y = torch.full((M, sum(rows)), torch.nan)
    run(source(shape, 32), [x, y, *parts[0], *parts[1]], [M])
    w = torch.cat([values(f, part, n, K) for f, part, n in zip(formats, parts, rows, strict=True)])
    close(y, x.float(), w, False, "bf16")


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Fragments(4, 256, zero="f16"), {}, "zeros that are no whole numbers, or offsets, for all inputs at once"),
    (INT4, {"epilogue": ({"op": "glu", "act": "silu"},)}, "a gated unit over halves of 24 rows, no whole blocks of 16"),
]


@pytest.mark.parametrize(("format", "more", "reason"), REFUSED, ids=["zeros", "halves"])
def test_what_has_no_kernel_says_why(format: Fragments, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError) as raised:
        source(Shape((format.to_json(),), (48,), 256, **more), 16)
    assert reason in str(raised.value)
