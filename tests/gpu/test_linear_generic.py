"""Generic linear kernels in Triton's interpreter: every format, few and many rows, prologues, epilogues, split K; their rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import format_cases
import pytest
import torch
from gpu.interpret import run
from gpu.triton_lowered import Interpreted
from linear_programs import decoded, embedding, linear
from tiny_programs import run as eager
from torch.nn import functional

from qcompile.artifact import KernelSpec
from qcompile.errors import ArtifactError
from qcompile.evaluate import dequantize
from qcompile.expr import bitcast, bits, cast, const, k, load, n, table, where
from qcompile.format import Format
from qcompile.formats.awq import Awq
from qcompile.formats.bitsandbytes import Bnb4
from qcompile.formats.bitstream import Bitstream
from qcompile.formats.codebook import Vptq
from qcompile.formats.dense import Dense
from qcompile.formats.fragments import Fragments
from qcompile.formats.gptq import Gptq
from qcompile.formats.integer import Int8
from qcompile.formats.minifloat import Fp8
from qcompile.formats.native import Native
from qcompile.lowering.triton import linear_dense, templates, text, toolchain
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.linear import Pointer, Shape, types
from qcompile.lowering.triton.render import Renderer
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.weights import Tables, Tile
from qcompile.ops import ACTIVATIONS
from qcompile.simplify import coordinates
from qcompile.target import INTERPRET, target

FOUR = Bitstream(4, 1, 16, zero="packed")
RMS, LAYER = {"op": "rms_norm", "eps": 1e-5, "offset": 1.0}, {"op": "layer_norm", "eps": 1e-5}
GLU = {"op": "glu", "act": "silu"}
LAYOUTS: list[tuple[Format, int, int]] = [
    (Fragments(4, 32, format_cases.NF4), 21, 96),
    (Fragments(3, 128, None, "f16", "f16"), 7, 256),
    (Native(bits=4, zero=8, block=128), 5, 144),
    (Native("f8e4m3", group=32, rows=4), 6, 64),
]
KINDS = [format.kind for format, _, _ in format_cases.CASES]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _marked() -> list[Any]:
    """Every case of every format; the first of each kind in a plain run."""
    return [
        pytest.param(*case, id=name, marks=() if KINDS.index(case[0].kind) == i else pytest.mark.full)
        for i, (case, name) in enumerate(zip(format_cases.CASES, format_cases.IDS, strict=True))
    ]


def decoder(format: Format, N: int, K: int) -> Source:
    """A kernel that decodes a weight some inputs at a time, as linear kernels do."""
    block, tables = 1 << (N - 1).bit_length(), Tables.of([(format, N, K)])
    step = 32 if K <= 128 else 128
    stored = [Pointer(f"w_{item.name}", item.dtype) for item in format.stored(N, K)]
    pointers = [Pointer("y", "f32"), *stored, *tables.pointers]
    tile = Tile(format, (N, K), step, n_in="n_in")
    render, value = tile.renderer(INTERPRET, stored, tables, {"n", "j", "k0", *(p.name for p in pointers)})
    start = "k0 + " if tile.looped else ""
    k_in, body = f"k_in = {start}j < {K}", [
        *render.lines,
        f"tl.store(y + n * {K} + ({start}j), tl.broadcast_to({value}, [{block}, {step}]), mask=n_in & k_in)",
    ]  # fmt: skip
    loop = [f"for k0 in range(0, {K}, {step}):", f"    {k_in}", *(f"    {line}" for line in body)]
    lines = [
        f"n = tl.arange(0, {block})[:, None]", f"n_in = n < {N}", f"j = tl.arange(0, {step})[None, :]",
        *([*render.once, *loop] if tile.looped else [k_in, *render.once, *body]),
    ]  # fmt: skip
    whole = "\n".join(lines)
    names = [pointer.name for pointer in pointers]
    made = text.module("decoder", "W", names, 0, whole, INTERPRET, functions(whole))
    return Source(made, "decoder", types(pointers), 0, (1, 1, 1), fusion=False)


@pytest.mark.parametrize(("format", "N", "K"), [*_marked(), *LAYOUTS])
def test_every_format_is_decoded_bit_for_bit(format: Format, N: int, K: int) -> None:
    tensors = format_cases.random_storage(format, N, K)
    y = torch.full((N, K), 7.0)
    tables = [torch.tensor(table) for table in Tables.of([(format, N, K)]).entries]
    run(decoder(format, N, K), [y, *tensors.values(), *tables])
    assert torch.equal(y.nan_to_num(), dequantize(format, tensors, N, K).nan_to_num())


# -- one kernel --


def close(made: Any, inputs: Sequence[torch.Tensor], tolerance: float) -> Interpreted:
    """Asserts that the kernels of a program give what it gives eagerly, to a part of the greatest number."""
    interpreted, expected = Interpreted(made), eager(made, *inputs)
    found = interpreted(*inputs)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    return interpreted


def weights(*parts: tuple[Format, int], k: int) -> list[tuple[Format, int, dict[str, torch.Tensor]]]:
    return [(format, n, format_cases.random_storage(format, n, k, seed)) for seed, (format, n) in enumerate(parts)]


@pytest.mark.parametrize(("m", "N"), [(1, 70), (2, 21), (3, 64), (4, 21)])
def test_few_rows_are_exact(m: int, N: int) -> None:
    made, inputs = linear(weights((FOUR, N), k=80), 80, m)
    assert close(made, inputs, 3e-6).kernels == ["linear-generic"]


def test_a_step_longer_than_k() -> None:
    format = Vptq(8, 512, 64, 2, 6, 4, 2**16)
    made, inputs = linear(weights((format, 11), k=30), 30, 2)
    close(made, inputs, 3e-6)


@pytest.mark.parametrize("m", [5, 17, pytest.param(20, marks=pytest.mark.full)])
def test_many_rows_round_x_and_weights_once(m: int) -> None:
    (part,) = weights((FOUR, 21), k=80)
    made, (x,) = linear([part], 80, m)
    w = dequantize(FOUR, part[2], 21, 80)
    expected = functional.linear(x.bfloat16().float(), w.bfloat16().float())
    torch.testing.assert_close(Interpreted(made)(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.full
@pytest.mark.parametrize("m", [2, 6])
@pytest.mark.parametrize(
    ("format", "N", "K"), [c for i, c in enumerate(format_cases.CASES) if KINDS.index(c[0].kind) == i]
)
def test_every_format_in_a_linear(format: Format, N: int, K: int, m: int) -> None:
    tensors = format_cases.random_storage(format, N, K)
    if not dequantize(format, tensors, N, K).isfinite().all():
        pytest.skip("random bits that are no finite weights")
    made, inputs = linear([(format, N, tensors)], K, m)
    close(made, inputs, 1e-5 if m == 2 else 2e-2)


@pytest.mark.parametrize(
    ("parts", "more"),
    [
        ([(FOUR, 21), (Dense("bf16"), 7), (Bnb4(), 3)], {"bias": True, "epilogue": ({"op": "gelu"}, {"op": "add"})}),
        ([(FOUR, 22)], {"bias": True, "prologue": RMS, "epilogue": (GLU, {"op": "mul"})}),
        ([(FOUR, 9), (Fp8(columns=16), 9)], {"prologue": LAYER, "epilogue": (GLU,), "bias": True}),
    ],
    ids=["parts", "gated", "gated-parts"],
)
@pytest.mark.parametrize("m", [3, 6])
def test_prologues_and_epilogues(parts: list[tuple[Format, int]], more: dict[str, Any], m: int) -> None:
    made, inputs = linear(weights(*parts, k=48), 48, m, **more)
    kernels = close(made, inputs, 1e-5 if m == 3 else 2e-2).kernels
    assert kernels == (["activation"] if m == 6 and "prologue" in more else []) + ["linear-generic"]


def emitted(shape: Shape, **more: Any) -> Source:
    return templates.emit(KernelSpec("linear-generic", shape.params(**more)), INTERPRET)


@pytest.mark.parametrize(("most", "m"), [(4, 3), (32, 5)])
def test_parts_of_k_are_added_in_order_and_counters_are_left_zero(most: int, m: int) -> None:
    (part,) = weights((FOUR, 22), k=256)
    tensors = list(part[2].values())
    shape = Shape((FOUR.to_json(),), (22,), 256, epilogue=(GLU,))
    x, results = torch.randn(m, 256), []
    for parts in (1, 2, 2):
        y, arrivals = torch.zeros(m, 11), torch.zeros(8, dtype=torch.int32)
        scratch = [torch.full((parts, m, 22), torch.nan), arrivals] if parts > 1 else []
        run(emitted(shape, most=most, split_k=parts), [x, y, *tensors, *scratch], [m])
        assert not arrivals.any()
        results.append(y)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5 * float(results[0].abs().max()))
    assert torch.equal(results[1], results[2])


def test_no_rows_touch_nothing() -> None:
    (part,) = weights((FOUR, 5), k=16)
    shape = Shape((FOUR.to_json(),), (5,), 16)
    run(emitted(shape, most=1, split_k=1), [torch.zeros(0), torch.zeros(0), *part[2].values()], [0])


@pytest.mark.parametrize("name", [*ACTIVATIONS, "glu", "mul"])
def test_steps_of_the_epilogue(name: str) -> None:
    step = {"op": name, "act": "tanh"} if name == "glu" else {"op": name}
    sums, bias, factor = torch.randn(3, 10) * 3, torch.randn(10), torch.randn(3, 10)
    columns = 5 if name == "glu" else 10
    y = torch.zeros(3, columns)
    source = templates.emit(
        KernelSpec("linear-finish", {"rows": [10], "bias": True, "epilogue": [step]}), INTERPRET
    )  # fmt: skip
    run(source, [sums, y, bias, *[factor] * (name == "mul")], [3])
    expected = sums + bias
    if name == "glu":
        expected = torch.tanh(expected[:, :5]) * expected[:, 5:]
    else:
        expected = expected * factor if name == "mul" else ACTIVATIONS[name](expected)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-6)


# -- the rule --


def test_the_rule_has_a_variant_for_each_range_of_rows() -> None:
    made, inputs = linear(weights((FOUR, 21), k=48), 48, 3, dynamic=True, bias=True)
    lowered = close(made, inputs, 3e-6)
    (step,) = lowered.executable.steps
    specs = lowered.executable.kernels
    found = [
        (variant.when, [specs[call.kernel].template if call.kernel in specs else call.kernel for call in variant.calls])
        for variant in step.variants
    ]
    generic, first = ["linear-generic"], ["dequantize", "activation", "qcompile.matmul.default", "linear-finish"]
    assert found == [
        (("m", 1), generic), (("m", 4), generic), (("m", 32), generic), (("m", 128), generic), (("m", 511), first),
        (None, first),
    ]  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"bias": True, "prologue": RMS, "epilogue": (GLU, {"op": "add"})}])
def test_many_rows_decode_the_weight_once(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    monkeypatch.setattr(linear_dense, "LEAST", 2)
    made, inputs = linear(weights((FOUR, 16), (Dense("f16"), 16), k=48), 48, 3, **more)
    kernels = close(made, inputs, 2e-2).kernels
    decoded = ["dequantize", "dequantize", "activation", "qcompile.matmul.default"]
    assert kernels == [*decoded, *["linear-finish"] * bool(more)]


def test_a_weight_in_the_compute_dtype_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_dense, "LEAST", 2)
    made, inputs = linear(weights((Dense("bf16"), 16), k=48), 48, 3)
    assert close(made, inputs, 2e-2).kernels == ["activation", "qcompile.matmul.default"]


def test_a_weight_too_large_to_decode_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_dense, "LEAST", 2)
    monkeypatch.setattr(linear_dense, "MOST", 100)
    made, _ = linear(weights((FOUR, 16), k=48), 48, 3)
    assert Interpreted(made).kernels == ["linear-generic"]


def test_float16_models_multiply_in_float16() -> None:
    made, inputs = linear(weights((Dense("f16"), 5), k=48), 48, 6)
    made = replace(made, model_config={"torch_dtype": "float16"})
    x, w = inputs[0], made.tensors[next(iter(made.tensors))]
    found = Interpreted(made)(x)
    torch.testing.assert_close(found, x.half().float() @ w.float().T, rtol=1e-5, atol=1e-5)


def test_parameters_out_of_range() -> None:
    good = Shape((FOUR.to_json(),), (6,), 48).params(most=4, split_k=1)
    for wrong, found in (
        ({"rows": [0]}, "rows = (0,)"),
        ({"rows": [5], "epilogue": [GLU]}, "rows = (5,)"),
        ({"formats": [Awq(4, 16).to_json()]}, "a awq weight [6, 48]"),
        ({"most": 0}, "most = 0"),
        ({"split_k": 3}, "split_k = 3"),
        ({"most": 32, "prologue": RMS}, "prologue = Norm(op='rms_norm', eps=1e-05, offset=1.0)"),
    ):
        with pytest.raises(ArtifactError) as error:
            templates.emit(KernelSpec("linear-generic", good | wrong), INTERPRET)
        assert error.value.found == found


def test_no_text_of_an_artifact_gets_out_of_the_docstring() -> None:
    evil = '"""; import os; os.abort(); """'
    for format in (Dense(evil), Bitstream(4, 1, 16, scale=evil)):
        with pytest.raises(ArtifactError, match="kernel's parameter"):
            templates.emit(
                KernelSpec("dequantize", {"format": format.to_json(), "n": 4, "k": 16, "y": "f32"}), INTERPRET
            )
    made = text.module("kernel", evil + "\\", ["x"], 0, "pass", INTERPRET)
    assert made.startswith("\"\"\"'''; import os; os.abort(); '''/\n\"\"\"\n\nimport triton\n")


# -- embeddings, weights decoded by themselves --


@pytest.mark.parametrize(
    ("format", "N", "K"), [(Gptq(3, 32, indirect=True), 32, 64), (Bnb4(nested=256), 19, 21), (Dense("bf16"), 5, 300)]
)
def test_embedding(format: Format, N: int, K: int) -> None:
    tensors, ids = format_cases.random_storage(format, N, K), torch.randint(N, (2, 5))
    made = embedding(format, N, K, tensors, ids)
    interpreted = Interpreted(made)
    assert torch.equal(interpreted(ids), eager(made, ids)) and interpreted.kernels == ["embedding"]
    ids[0, 0], ids[1, 1] = N, -1
    outside = torch.zeros(2, 5, dtype=torch.bool).index_put(
        (torch.tensor([0, 1]), torch.tensor([0, 1])), torch.tensor(True)
    )
    assert torch.equal(interpreted(ids).isnan().all(-1), outside)


def test_an_element_beyond_what_an_i32_counts() -> None:
    format, N, K = Int8(), (1 << 17) + 1, 1 << 14
    tensors = {s.name: torch.empty(s.shape, dtype=format_cases.DTYPES[s.dtype]) for s in format.stored(N, K)}
    for tensor in tensors.values():
        tensor[-1] = 3
    y = torch.zeros(1, K)
    source = templates.emit(KernelSpec("embedding", {"format": format.to_json(), "n": N, "k": K}), INTERPRET)
    source = replace(source, grid=(1, 1, 1))
    run(source, [torch.tensor([N - 1]), y, *tensors.values()], [1])
    assert (y[0, :256] == dequantize(format, tensors, N, K, torch.tensor([N - 1]))[0, :256]).all()


def test_dequantize() -> None:
    format, N, K = Bnb4(nested=256), 19, 300
    tensors = format_cases.random_storage(format, N, K)
    interpreted = Interpreted(decoded(format, N, K, tensors))
    assert interpreted.kernels[0] == "dequantize"
    assert torch.equal(interpreted(torch.zeros(1)), dequantize(format, tensors, N, K))


# -- text --


def rendered(expr: Any, N: int = 64, K: int = 64) -> str:
    render = Renderer(INTERPRET, {"t": "w_t", "g": "w_g"}, {"n": "n", "k": "k"}, coordinates(N, K))
    value = render(expr)
    return "; ".join([*render.once, *render.lines, value])


def test_expressions_as_text() -> None:
    word = load("t", "i32", (64, 8), n, k // 8)
    assert rendered(bits(word, k % 8 * 4, 4)) == "t = tl.load(w_t + n * 8 + (k >> 3)); ((t >> ((k & 7) * 4)) & 15)"
    assert "to(tl.uint32, bitcast=True) >> 4)" in rendered(bits(word, 4, 32))
    assert rendered(n // 3 + (k - 70) // 3) == "((n // 3) + (((k - 70) - (((k - 70) % 3 + 3) % 3)) // 3))"
    assert rendered(table((0, 4, 1, 5), k % 4)) == "((2656 >> ((k & 3) * 3)) & 7)"
    assert (
        rendered(cast("f32", bitcast("i8", word)))
        == "t = tl.load(w_t + n * 8 + (k >> 3)); ((t << 24) >> 24).to(tl.float32)"
    )
    assert rendered(where(n < k, const(1.0), 2.0)) == "tl.where(n < k, 1.0, 2.0)"


def test_an_index_that_is_data_stays_inside() -> None:
    index = load("g", "i32", (64,), k)
    assert "tl.minimum(tl.maximum(g, 0), 8191)" in rendered(load("t", "f16", (8192,), index))
    assert "tl.minimum" not in rendered(load("t", "f16", (64, 64), n, k))


# -- machine code --

COMPILED = {
    "few": Shape((FOUR.to_json(),), (150,), 256, prologue=RMS, epilogue=(GLU,)).params(most=1, split_k=2),
    "many": Shape((Bnb4().to_json(),), (64,), 256, bias=True).params(most=32, split_k=2),
    "parts": Shape((Fp8(columns=16).to_json(), Dense("bf16").to_json()), (67, 5), 80, compute="f16").params(
        most=2048, split_k=1
    ),
}


@pytest.mark.parametrize(
    ("name", "capability"),
    [("few", 90), ("many", 100), ("parts", 80)]
    + [pytest.param(name, each, marks=pytest.mark.full) for name in COMPILED for each in (80, 86, 89, 90, 100, 120)],
)
def test_compiles_without_a_gpu(name: str, capability: int) -> None:
    machine = target(f"cuda:sm_{capability}")
    source = templates.emit(KernelSpec("linear-generic", COMPILED[name]), machine)
    (built,) = toolchain.compile_sources([source], machine)
    assert built.launch is not None and built.object[:4] == b"\x7fELF"
    assert built.launch.spills == 0
    if name != "few":
        assert "tl.dot" in source.text
