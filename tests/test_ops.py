"""qcompile's operators mean what their docstrings say, and their fake versions have the same types."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from qcompile.evaluate import dequantize
from qcompile.experts import ExpertsSpec
from qcompile.formats.dense import Dense
from qcompile.formats.gguf import Q4_1, Q8_0
from qcompile.ops import ACTIVATIONS, LinearSpec, Part, round_activations

qc = torch.ops.qcompile


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def blocks(format: Any, n: int, k: int) -> torch.Tensor:
    """Valid random blocks: random bytes whose scales are small halves."""
    (stored,) = format.stored(n, k)
    data = torch.randint(0, 256, stored.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(n + k))
    size = stored.shape[1] // (k // 32)
    scales = data.unflatten(1, (-1, size))
    scales[..., 1] = scales[..., 1] % 16 + 32
    if format.kind == "gguf-q4_1":
        scales[..., 3] = scales[..., 3] % 16 + 32
    return data


def spec_of(weights: list[tuple[Any, int, list[torch.Tensor]]], k: int, **more: Any) -> tuple[str, list[torch.Tensor]]:
    parts = tuple(Part(format.to_json(), n, len(tensors)) for format, n, tensors in weights)
    return LinearSpec(k, parts, **more).to_text(), [t for _, _, tensors in weights for t in tensors]


def attention_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: Any, softcap: float, sinks: Any
) -> torch.Tensor:
    """One query after another in float64; `seen(b, i, j)` says whether query i of batch b sees key j."""
    heads, out = (
        q.shape[1] // k.shape[1],
        torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64),
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if seen(b, i, j)]
                scores = [float(q[b, h, i].double() @ k[b, h // heads, j].double()) * scale for j in keys]
                if softcap:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                shares = [math.exp(score) for score in scores]
                total = sum(shares) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                for j, share in zip(keys, shares, strict=True):
                    out[b, i, h] += share / total * v[b, h // heads, j].double()
    return out.float()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap, with_sinks", [(0.0, False), (2.0, True)])
def test_attention(causal, window, softcap, with_sinks):
    q, k, v, sinks = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 2, 6, 5), random(4) if with_sinks else None
    found = qc.attention(q, k, v, 0.3, causal, window, softcap, sinks)

    def seen(b: int, i: int, j: int) -> bool:
        return (not causal or j <= i) and (not window or j > i - window)

    torch.testing.assert_close(found, attention_by_hand(q, k, v, 0.3, seen, softcap, sinks), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous() and found.shape == (2, 6, 4, 5)


def test_attention_is_that_of_torch():
    q, k, v = random(3, 6, 7, 16), random(3, 2, 7, 16), random(3, 2, 7, 16)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(qc.attention(q, k, v, 0.25, True, 0, 0.0, None), expected)
    halves = qc.attention(q.half(), k.half(), v.half(), 0.25, True, 0, 0.0, None)
    assert halves.dtype == torch.float16
    torch.testing.assert_close(halves.float(), expected, rtol=1e-2, atol=1e-2)


def test_attention_does_not_hide_a_nan():
    q, k, v = random(1, 1, 3, 4), random(1, 1, 3, 4), random(1, 1, 3, 4)
    k[0, 0, 1, 0] = math.nan
    found = qc.attention(q, k, v, 1.0, True, 0, 0.0, None)
    assert found[0, 0].isfinite().all() and found[0, 1:].isnan().all()


@pytest.mark.parametrize("steps", [(6,), (4, 1, 1), (1, 1, 1, 1, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("turned", [0, 4, 8])
def test_cached_attention_in_any_steps_is_attention(steps, window, turned):
    q, k, v = random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 2, 6, 8)
    cos, sin = (random(2, 6, turned), random(2, 6, turned) + 1) if turned else (None, None)
    start = torch.tensor([0, 2])
    k_cache, v_cache = torch.full((2, 2, 9, 8), math.nan), torch.full((2, 2, 9, 8), math.nan)
    found, at = [], 0
    for count in steps:
        part = slice(at, at + count)
        turn = (cos[:, part], sin[:, part]) if turned else (None, None)
        args = (q[:, :, part], k[:, :, part], v[:, :, part], *turn, k_cache, v_cache, torch.tensor([at]), start)
        found.append(qc.cached_attention(*args, 0.3, window, 0.0, None))
        at += count
    q, k = (qc.rope(q, cos, sin), qc.rope(k, cos, sin)) if turned else (q, k)

    def seen(b: int, i: int, j: int) -> bool:
        return int(start[b]) <= j <= i and (not window or j > i - window)

    expected = attention_by_hand(q, k, v, 0.3, seen, 0.0, None)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)
    assert (torch.cat(found, 1)[1, :2] == 0).all()
    torch.testing.assert_close(k_cache[:, :, :6], k)
    torch.testing.assert_close(v_cache[:, :, :6], v)
    assert k_cache[:, :, 6:].isnan().all()


def test_cached_attention_with_sinks_and_a_soft_cap():
    q, k, v, sinks = random(1, 2, 3, 4), random(1, 1, 3, 4), random(1, 1, 3, 4), random(2)
    caches = [torch.zeros(1, 1, 4, 4) for _ in range(2)]
    found = qc.cached_attention(q, k, v, None, None, *caches, torch.tensor([0]), torch.tensor([0]), 0.5, 0, 3.0, sinks)
    expected = attention_by_hand(q, k, v, 0.5, lambda b, i, j: j <= i, 3.0, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_full_cache_is_an_error():
    x, cache = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="the cache has 4 slots, 5 are needed"):
        qc.cached_attention(
            x, x, x, None, None, cache, cache.clone(), torch.tensor([2]), torch.tensor([0]), 1.0, 0, 0.0, None
        )


def test_rope_turns_pairs_of_halves():
    x, angle = random(2, 3, 5, 8), random(2, 5, 3)
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    found = qc.rope(x, cos, sin)
    whole = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = torch.complex(x[..., :3], x[..., 3:6]) * whole
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag, x[..., 6:]], -1))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    x, weight = random(2, 3, 8), random(8)
    expected = functional.rms_norm(x, (8,), weight + offset, 1e-5)
    torch.testing.assert_close(qc.rms_norm(x, weight, 1e-5, offset), expected)


@pytest.mark.parametrize("format", [Q4_1(), Q8_0(), Dense("f16")])
def test_dequantize_and_embedding(format):
    data = random(5, 64).half() if format.kind == "dense" else blocks(format, 5, 64)
    (stored,), text = format.stored(5, 64), json.dumps(format.to_json())
    weight = qc.dequantize([data], text, 5, 64)
    assert torch.equal(weight, dequantize(format, {stored.name: data}, 5, 64)) and weight.isfinite().all()
    ids = torch.tensor([[4, 0, 4], [1, 2, 2]])
    assert torch.equal(qc.embedding(ids, [data], text, 5, 64), weight[ids])


EPILOGUES = [
    ((), 6),
    (({"op": "gelu_tanh"},), 6),
    (({"op": "glu", "act": "silu"},), 3),
    (({"op": "add"}, {"op": "relu"}, {"op": "mul"}), 6),
]


@pytest.mark.parametrize(
    "epilogue, columns", EPILOGUES, ids=lambda e: "-".join(x["op"] for x in e) if isinstance(e, tuple) else ""
)
@pytest.mark.parametrize("prologue", [None, "rms_norm", "layer_norm"])
def test_linear(epilogue, columns, prologue):
    q, dense, x, bias = blocks(Q4_1(), 4, 64), random(2, 64).half(), random(3, 5, 64), random(6)
    norm = {"op": prologue, "eps": 1e-5, **({"offset": 1.0} if prologue == "rms_norm" else {})} if prologue else None
    text, stored = spec_of(
        [(Q4_1(), 4, [q]), (Dense("f16"), 2, [dense])], 64, bias=True, prologue=norm, epilogue=epilogue
    )
    norms = {None: [], "rms_norm": [random(64)], "layer_norm": [random(64), random(64) + 1]}[prologue]
    more = [random(3, 5, columns) + i for i, step in enumerate(epilogue) if step["op"] in ("add", "mul")]
    found = qc.linear(x, stored, [bias, *norms, *more], text)
    if prologue == "rms_norm":
        x = functional.rms_norm(x, (64,), norms[0] + 1, 1e-5)
    elif prologue:
        x = functional.layer_norm(x, (64,), *norms, 1e-5)
    weight = torch.cat([qc.dequantize([q], json.dumps(Q4_1().to_json()), 4, 64), dense.float()])
    expected = x @ weight.T + bias
    for step in epilogue:
        if step["op"] == "glu":
            expected = functional.silu(expected[..., :3]) * expected[..., 3:]
        elif step["op"] in ACTIVATIONS:
            expected = ACTIVATIONS[step["op"]](expected)
        else:
            expected = expected + more.pop(0) if step["op"] == "add" else expected * more.pop(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_int8_rounds_activations_by_group():
    x = random(4, 50)
    x[0] = 0
    rounded = round_activations(x, 16)
    for row, group in [(r, slice(g, min(g + 16, 50))) for r in range(4) for g in range(0, 50, 16)]:
        scale = float(x[row, group].abs().max()) / 127
        codes = rounded[row, group] / scale if scale else rounded[row, group]
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert (rounded[row, group] - x[row, group]).abs().max() <= scale * 0.5001
    weight = random(3, 64)
    y = random(2, 64)
    text, stored = spec_of([(Dense("f32"), 3, [weight])], 64, accuracy="int8", act_group=32)
    torch.testing.assert_close(qc.linear(y, stored, [], text), round_activations(y, 32) @ weight.T)
    assert not torch.allclose(y @ weight.T, qc.linear(y, stored, [], text), rtol=1e-6, atol=1e-6)


def test_a_spec_survives_its_text():
    part = Part(Q8_0().to_json(), 4, 1)
    norm = {"op": "rms_norm", "eps": 1e-6, "offset": 1.0}
    spec = LinearSpec(64, (part, part), True, norm, ({"op": "glu", "act": "silu"},), "int8", 64)
    assert LinearSpec.from_text(spec.to_text()) == spec and (spec.n, spec.n_out) == (8, 4)
    assert spec.to_text() == LinearSpec.from_text(spec.to_text()).to_text()


Q8 = json.dumps(Q8_0().to_json())
CASES: dict[str, tuple[Any, ...]] = {
    "dequantize": ([blocks(Q8_0(), 5, 64)], Q8, 5, 64),
    "embedding": (torch.tensor([[1, 2], [4, 4]]), [blocks(Q8_0(), 5, 64)], Q8, 5, 64),
    "linear": (random(2, 3, 64), [blocks(Q8_0(), 4, 64)], [random(4)], spec_of([(Q8_0(), 4, [Q8])], 64, bias=True)[0]),
    "matmul": (random(3, 16).bfloat16(), random(5, 16).bfloat16()),
    "attention": (random(2, 4, 6, 8), random(2, 2, 6, 8), random(2, 2, 6, 5), 0.3, True, 2, 1.0, random(4)),
    "experts_linear": (random(3, 8), torch.tensor([1, 0, 1]), random(2, 8, 5), random(2, 5), True),
    "experts": (
        *(random(3, 64), torch.tensor([1, 0, 1]), [blocks(Q8_0(), 8, 64)], random(2, 4)),
        ExpertsSpec(2, 4, 64, (Part(Q8_0().to_json(), 8, 1),)).to_text(),
    ),
    "transform": (random(2, 3, 8), [random(8)], '{"kind": "scale"}'),
    "rope": (random(2, 3, 5, 8), random(2, 5, 6), random(2, 5, 6)),
    "rms_norm": (random(2, 3, 8), random(8), 1e-5, 1.0),
    "cached_attention": (
        *(random(2, 4, 3, 8), random(2, 2, 3, 8), random(2, 2, 3, 8), random(2, 3, 8), random(2, 3, 8)),
        *(random(2, 2, 9, 8), random(2, 2, 9, 8), torch.tensor([4]), torch.tensor([0, 5]), 0.3, 0, 0.0, None),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fake_and_schema(name):
    """torch's own check: the schema tells what is written, and the fake version gives the real shapes and dtypes."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(qc, name).default, CASES[name], test_utils=checks)


def test_every_operator_has_a_case():
    ours = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("qcompile::")}
    assert ours == set(CASES)
