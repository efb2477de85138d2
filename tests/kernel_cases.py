"""One kernel of every template and kind of parameters, as data: the spec, and dims that it is made for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qcompile.artifact import KernelSpec
from qcompile.formats.bitsandbytes import Bnb4
from qcompile.formats.gguf import Q6_K
from qcompile.formats.gptq import Gptq
from qcompile.formats.lanes import Lanes, LanesDense
from qcompile.lowering.mlir.attention_params import Attention
from qcompile.lowering.mlir.linear import Shape
from qcompile.lowering.mlir.linear_int8 import scheme
from qcompile.transforms.round_int import RoundInt

Case = tuple[KernelSpec, tuple[int, ...]]
CASES: dict[str, Case] = {}
RMS, LAYER = {"op": "rms_norm", "eps": 1e-5, "offset": 0.0}, {"op": "layer_norm", "eps": 1e-5}
GLU, ADD, MUL = ({"op": "glu", "act": "silu"}, {"op": "add"}, {"op": "mul"})
TABLE = tuple(i / 8 - 1.0 for i in range(16))
CACHE = {"causal": True, "cached": True, "rope": 8}


def _case(name: str, template: str, params: dict[str, Any], *dims: int) -> None:
    CASES[name] = KernelSpec(template, params), dims


def _linear(*formats: Any, sizes: Any = (), **more: Any) -> dict[str, Any]:
    """The JSON of a linear kernel's parameters."""
    shape = {field: more.pop(field) for field in ("ragged", "bias", "prologue", "epilogue") if field in more}
    return Shape(tuple(format.to_json() for format in formats), sizes=sizes, **shape).params(**more)


def _few() -> None:
    four, three = Lanes(4, 32, zero=8.0), Lanes(3, 16, zero="f16", scale="f16", offset="f32")
    _case("gemv", "linear-gemv", _linear(four, rows=1), 1, 64, 48)
    all_parts = _linear(three, three, three, rows=4, ragged=True, bias=True, prologue=RMS, epilogue=(ADD, MUL))
    _case("gemv-all", "linear-gemv", all_parts, 3, 48, 40, 16, 7)
    two = _linear(four, four, rows=4, bias=True, prologue=LAYER, epilogue=(GLU, ADD), ragged=True)
    _case("gemv-gated", "linear-gemv", two, 2, 64, 40, 40)
    _case("gemv-gated-one", "linear-gemv", _linear(Lanes(4, 64, TABLE), rows=4, epilogue=(GLU,)), 4, 64, 64)
    rounded = Lanes(5, 8, zero="bf16", scale="bf16", rounding="each-bf16")
    _case("gemv-rounded", "linear-gemv", _linear(rounded, rows=4, ragged=True), 2, 40, 19)
    _case("gemv-dense", "linear-gemv", _linear(LanesDense("f16"), rows=4, ragged=True), 2, 13, 19)
    _case("experts", "experts-gemv", _linear(four, rows=1, bias=True, experts=3, n=16), 5, 64, 48)
    _case("experts-sums", "experts-gemv", _linear(three, rows=1, experts=2, n=32), 3, 48, 64)
    whole = _linear(Gptq(3, 32), sizes=((48, 64),), rows=1, experts=3, n=16)
    _case("experts-gptq", "experts-gemv", whole, 2, 64, 48)
    for name, format, n, k in (
        ("gptq", Gptq(3, 32, indirect=True), 40, 64), ("bnb", Bnb4(nested=256), 19, 21), ("gguf", Q6_K(), 18, 256),
    ):  # fmt: skip
        _case(f"gemv-{name}", "linear-gemv", _linear(format, sizes=((n, k),), rows=4, ragged=True), 2, k, n)
        params = {"format": format.to_json(), "n": n, "k": k}
        _case(f"embedding-{name}", "embedding", params, 5)


def _many() -> None:
    three, four = Lanes(3, 16, zero="f16", scale="f16"), Lanes(4, 32, zero=8.0)
    for tile in (6, 12):
        _case(f"pack-{tile}", "linear-pack", {"tile": tile, "prologue": LAYER if tile == 6 else None}, 29, 40)
        two = _linear(three, LanesDense(), ragged=True, bias=True, epilogue=(ADD,), tile=tile)
        _case(f"gemm-{tile}", "linear-gemm", two, 29, 272, 40, 7)
        _case(f"gemm-gated-{tile}", "linear-gemm", _linear(four, four, epilogue=(GLU,), tile=tile), 13, 64, 48, 48)
    static = RoundInt(per="tensor", scale="f32", zero="u8", low=0, high=255, zero_first=False)
    for name, format, act, how in (
        ("start", four, 32, None), ("after", three, 48, None), ("none", Lanes(4, 96, TABLE), 32, None),
        ("static", four, 96, static.to_json()),
    ):  # fmt: skip
        common: dict[str, Any] = {"k": 96, "act_group": act, "rounding": how, "ragged": True}
        few = _linear(format, format, rows=4, blocks=2, bias=True, prologue=RMS, **common)
        _case(f"int8-gemv-{name}", "linear-int8-gemv", few, 3, 96, 40, 7)
        many = _linear(format, format, tile=8, side=3, m_block=16, epilogue=(GLU, MUL), **common)
        _case(f"int8-gemm-{name}", "linear-int8-gemm", many, 29, 96, 72, 72)
        _case(f"int8-{name}", "activation-int8", asdict(scheme(many).tile(8, LAYER)), 13)


def _strides(*sizes: int) -> tuple[int, ...]:
    """Of the first three dimensions of four that lie one behind the other."""
    return sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3]


def _attention() -> None:
    b, s, t, d, dv = 2, 5, 70, 20, 12
    strides = (*_strides(b, 6, s, d), *_strides(b, 3, t, d), *_strides(b, 3, t, dv))
    plain = Attention(2, 3, d, dv, 3, 0.2, window=9, softcap=2.0, sinks="f16")
    _case("attention", "attention", asdict(plain), b, s, t, *strides)
    for mask in ("bool", "f32"):
        masked = Attention(2, 3, d, dv, 3, 0.2, causal=False, mask=mask, k="bf16", v="f16")
        _case(f"attention-{mask}", "attention", asdict(masked), b, s, t, *strides, s * t, 0, t)
    turn, parts = (s * 8, 8), -(-t // 64)
    cached = Attention(2, 3, d, dv, 3, 0.2, **CACHE, sinks="f32")
    _case("attention-cached", "attention", asdict(cached), b, s, t, *strides, *turn)
    split = Attention(2, 3, d, dv, 1, 0.2, **CACHE, split=64, window=70)
    _case("attention-split", "attention", asdict(split), b, s, t, *strides, *turn, parts)
    joined = {"heads": 6, "dv": dv, "split": 64, "sinks": "f32", "y": "f16"}
    _case("combine", "attention-combine", joined, b, s, t, parts)
    write = {"heads": 3, "d": d, "dv": dv, "k": "f32", "v": "f16", "turn": "f32", "k_cache": "f32", "v_cache": "bf16"}
    steps = (*_strides(b, 3, s, d), *_strides(b, 3, s, dv))
    _case("cache-write", "cache-write", {**write, "width": 8}, b, s, t, *steps, *turn)
    _case("cache-write-plain", "cache-write", {**write, "width": 0}, b, s, t, *steps)
    rope = {"heads": 3, "d": d, "width": 8, "x": "f32", "turn": "f32", "y": "bf16"}
    _case("rope", "rope", rope, b, s, *_strides(b, 3, s, d), *turn)


def _others() -> None:
    floats = {"x": "bf16", "y": "f32"}
    rms = {"op": "rms_norm", "eps": 1e-5, "offset": 1.0, "weight": "f32", **floats}
    _case("rms-norm", "row-norm", rms, 3, 37)
    _case("layer-norm", "row-norm", {"op": "layer_norm", "eps": 1e-5, "weight": "f32", "bias": "f16", **floats}, 3, 37)
    _case("softmax", "row-norm", {"op": "log_softmax", **floats}, 3, 37)
    _case("sum", "reduce", {"op": "sum", "x": "i32", "y": "i64"}, 3, 37)
    _case("argmax", "reduce", {"op": "argmax", "x": "f32", "y": "i64"}, 3, 37)
    _case("topk", "topk", {"x": "bf16", "k": 3, "largest": False}, 3, 37)
    _case("cumsum", "cumsum", {"x": "u8", "y": "i64"}, 3, 37)
    _case("gather", "gather", {"x": "f16", "index": "i64", "y": "f32"}, 2, 5, 7, 19)
    ops = [
        ["gelu", "f32", [0]],
        ["mul", "f32", [2, 1]],
        ["to", "i32", [3]],
        ["floor_divide", "i32", [4, {"number": 3}]],
    ]
    inputs, outputs = [["f32", "apart"], ["bf16", "same"]], [["f32", "unit", 3], ["i32", "apart", 5]]
    params = {"dims": 3, "inputs": inputs, "outputs": outputs, "ops": ops}
    _case("pointwise", "pointwise", params, 3, 5, 21, 105, 21, 2, 5, 1, 105, 21, 21, 3, 15)
    _case("arange", "pointwise", {"dims": 1, "inputs": [], "outputs": [["i64", "unit", 0]],
                                  "ops": [["index", "i64", []]]}, 37)  # fmt: skip


_few()
_many()
_attention()
_others()
