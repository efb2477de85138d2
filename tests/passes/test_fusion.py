"""Activations, norms, rope, merging, epilogues, prologues: count, result, numbers, and what is left alone and why."""

from __future__ import annotations

import torch
from tiny_programs import Call, ops, program, reasons, same
from torch import nn
from torch.nn import functional

from qcompile.backend import CpuBackend
from qcompile.passes.choose_layout import ChooseLayout
from qcompile.passes.fuse_activation import FuseActivation
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.fuse_epilogue import FuseEpilogue
from qcompile.passes.fuse_norm import FuseNorm
from qcompile.passes.fuse_prologue import FusePrologue
from qcompile.passes.fuse_rope import FuseRope
from qcompile.passes.linears import linears
from qcompile.passes.merge_linears import MergeLinears
from qcompile.passes.normalise import Normalise
from qcompile.passes.quantize import Quantize

PACK = (Normalise(), Quantize(), FuseDequantize(), ChooseLayout())
X = torch.randn(2, 5, 32)


def norm(x, weight, eps=1e-6):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def fused(function, *passes, inputs=(X,), backend=None, dynamic=None, **parameters):
    made = program(Call(function, **parameters), *inputs, dynamic=dynamic)
    ctx = same(made, [*PACK, *passes], inputs, backend=backend or CpuBackend())
    return made, ctx


# -- activations --


def test_activations_in_arithmetic_are_operators() -> None:
    def all_of_them(x):
        new = 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))
        erf = x * 0.5 * (1.0 + torch.erf(x / 2**0.5))
        return x * torch.sigmoid(x) + new + erf

    made, ctx = fused(all_of_them, FuseActivation())
    assert ctx.report.passes[-1] == ("fuse-activation", 3)
    assert sorted(ops(made)) == ["aten.add.Tensor", "aten.add.Tensor", "aten.gelu", "aten.gelu", "aten.silu"]


def test_another_constant_is_another_function() -> None:
    made, ctx = fused(lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.5)), FuseActivation())
    assert ctx.report.passes[-1] == ("fuse-activation", 0) and "aten.erf" in ops(made)
    assert any("expected 1.414" in reason for reason in reasons(ctx))


# -- norms --


def test_rms_norms_of_every_spelling() -> None:
    w = torch.rand(32)
    for function, offset in ((norm, 0.0), (lambda x, weight: norm(x, 1.0 + weight), 1.0)):
        made, ctx = fused(function, FuseNorm(), weight=w)
        assert ops(made) == ["qcompile.rms_norm"] and ctx.report.passes[-1] == ("fuse-norm", 1)
        node = next(n for n in made.graph.graph.nodes if n.op == "call_function")
        assert node.args[2:] == (1e-6, offset)
    made, _ = fused(lambda x, weight: functional.rms_norm(x, (32,), weight, 1e-5), FuseNorm(), weight=w)
    assert ops(made) == ["qcompile.rms_norm"]


def test_a_norm_of_a_norm_is_two_norms() -> None:
    made, ctx = fused(lambda x, one, two: norm(norm(x, one), two), FuseNorm(), one=torch.rand(32), two=torch.rand(32))
    assert ops(made) == ["qcompile.rms_norm", "qcompile.rms_norm"] and ctx.report.passes[-1] == ("fuse-norm", 2)


def test_a_norm_without_a_weight_gets_a_node_of_ones() -> None:
    made, _ = fused(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), FuseNorm())
    assert ops(made) == ["aten.ones", "qcompile.rms_norm"]


def test_a_norm_over_another_dimension_is_left_alone() -> None:
    made, ctx = fused(lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), FuseNorm())
    assert ctx.report.passes[-1] == ("fuse-norm", 0) and "aten.rsqrt" in ops(made)
    assert "the mean is over dimensions [1], not over the last" in reasons(ctx)


# -- rope --


def rotate(x):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([-second, first], dim=-1)


HEADS, ANGLES = torch.randn(2, 3, 5, 16), torch.randn(2, 5, 16)


def test_rotary_embeddings() -> None:
    def whole(x, a):
        return x * a.cos().unsqueeze(1) + rotate(x) * a.sin().unsqueeze(1)

    made, ctx = fused(whole, FuseRope(), inputs=(HEADS, ANGLES))
    assert ops(made)[-1] == "qcompile.rope" and ctx.report.passes[-1] == ("fuse-rope", 1)


def test_rotary_embeddings_of_the_first_columns() -> None:
    def partial(x, a):
        turned, rest = x[..., :8], x[..., 8:]
        turned = turned * a.cos().unsqueeze(1) + rotate(turned) * a.sin().unsqueeze(1)
        return torch.cat([turned, rest], dim=-1)

    made, ctx = fused(partial, FuseRope(), inputs=(HEADS, ANGLES[..., :8].contiguous()))
    assert [op for op in ops(made) if op not in ("aten.cos", "aten.sin")] == ["qcompile.rope"]
    assert ctx.report.passes[-1] == ("fuse-rope", 2)


def test_unequal_parts_are_no_rope() -> None:
    def uneven(x, a):
        turned = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
        return x * a.cos().unsqueeze(1) + turned * a.sin().unsqueeze(1)

    made, ctx = fused(uneven, FuseRope(), inputs=(HEADS, ANGLES))
    assert "qcompile.rope" not in ops(made)
    assert "the parts that trade places are not the halves of 16" in reasons(ctx)


# -- merging --


def weights(**shapes):
    torch.manual_seed(1)
    return {name: torch.randn(*shape) * 0.1 for name, shape in shapes.items()}


def qkv(x, q, k, v, kb):
    return torch.cat([functional.linear(x, q).neg(), functional.linear(x, k, kb).exp(), functional.linear(x, v)], -1)


def test_linears_of_one_input_are_merged_and_sliced() -> None:
    made, ctx = fused(qkv, MergeLinears(), **weights(q=(32, 32), k=(16, 32), v=(16, 32), kb=(16,)))
    assert ops(made)[:4] == ["qcompile.linear", *["aten.slice.Tensor"] * 3]
    assert ctx.report.passes[-1] == ("merge-linears", 1)
    assert {path: (r.row, r.rows, r.n) for path, r in made.weights.items()} == {
        "q": (0, 32, 64), "k": (32, 16, 64), "v": (48, 16, 64),
    }  # fmt: skip


def test_rows_that_do_not_fill_a_block_are_not_merged() -> None:
    made, ctx = fused(qkv, MergeLinears(), **weights(q=(24, 32), k=(16, 32), v=(16, 32), kb=(16,)))
    assert "24 rows are no multiple of 16" in reasons(ctx)
    assert ops(made).count("qcompile.linear") == 2  # k and v still fit


def test_options_bound_the_members() -> None:
    made, _ = fused(qkv, MergeLinears(max_members=2), **weights(q=(32, 32), k=(16, 32), v=(16, 32), kb=(16,)))
    assert ops(made).count("qcompile.linear") == 2


def test_a_gate_comes_first_whatever_the_order_in_the_model() -> None:
    def gated(x, up, gate):
        up_ = functional.linear(x, up)
        return up_ * functional.silu(functional.linear(x, gate))

    made, _ = fused(gated, MergeLinears(), FuseEpilogue(), **weights(up=(48, 32), gate=(48, 32)))
    assert ops(made) == ["qcompile.linear"]
    assert (made.weights["gate"].row, made.weights["up"].row) == (0, 48)
    assert linears(made)[0].spec.epilogue == ({"op": "glu", "act": "silu"},)


# -- epilogues --


def test_bias_activation_and_residual_are_taken_in() -> None:
    def block(x, w, b, v):
        return functional.linear(functional.gelu(functional.linear(x, w) + b), v) + x

    made, ctx = fused(block, FuseEpilogue(), **weights(w=(48, 32), b=(48,), v=(32, 48)))
    assert ops(made) == ["qcompile.linear", "qcompile.linear"]
    assert ctx.report.passes[-1] == ("fuse-epilogue", 3)
    first, second = (linear.spec for linear in linears(made))
    assert first.bias and first.epilogue == ({"op": "gelu"},) and second.epilogue == ({"op": "add"},)


def test_a_result_with_two_readers_stays() -> None:
    def twice(x, w):
        y = functional.linear(x, w)
        return functional.relu(y) + y.neg() + y.exp()

    made, ctx = fused(twice, FuseEpilogue(), **weights(w=(32, 32)))
    assert ctx.report.passes[-1] == ("fuse-epilogue", 0) and reasons(ctx) == ["it has 3 readers"]
    assert "aten.relu" in ops(made)


def test_an_operand_of_another_shape_is_refused_by_its_shape() -> None:
    made, ctx = fused(lambda x, w: functional.linear(x, w) * x[:, :, :1], FuseEpilogue(), **weights(w=(32, 32)))
    assert reasons(ctx) == ["the other operand of mul has shape [2, 5, 1], the linear's is [2, 5, 32]"]
    assert "aten.mul.Tensor" in ops(made)


# -- prologues --


def test_a_norm_goes_into_its_only_readers() -> None:
    made, ctx = fused(
        lambda x, w, weight: functional.linear(norm(x, weight), w), FuseNorm(), FusePrologue(),
        **weights(w=(16, 32), weight=(32,)),
    )  # fmt: skip
    assert ops(made) == ["qcompile.linear"] and ctx.report.passes[-1] == ("fuse-prologue", 1)
    assert linears(made)[0].spec.prologue == {"op": "rms_norm", "eps": 1e-6, "offset": 0.0}


def test_a_layer_norm_that_is_also_the_residual_stays() -> None:
    def post_norm(x, w, weight, bias):
        y = functional.layer_norm(x, (32,), weight, bias)
        return functional.linear(y, w) + y

    made, ctx = fused(post_norm, FuseEpilogue(), FusePrologue(), **weights(w=(32, 32), weight=(32,), bias=(32,)))
    assert ops(made) == ["aten.layer_norm", "qcompile.linear"]
    assert reasons(ctx) == ["qcompile.linear (linear_default_4) reads it too"]


def test_rows_are_selected_before_they_are_normalised() -> None:
    keep = torch.tensor([1, 3])
    made, _ = fused(
        lambda x, keep, w, weight: functional.linear(norm(x, weight)[:, keep], w), FuseNorm(), FusePrologue(),
        inputs=(X, keep), **weights(w=(16, 32), weight=(32,)),
    )  # fmt: skip
    assert ops(made) == ["aten.index.Tensor", "qcompile.linear"]


def test_a_reordered_norm_reorders_its_weight() -> None:
    order = torch.randperm(32)
    made, _ = fused(
        lambda x, order, w, weight: functional.linear(torch.index_select(norm(x, weight), 2, order), w),
        FuseNorm(), FusePrologue(), inputs=(X, order), **weights(w=(16, 32), weight=(32,)),
    )  # fmt: skip
    assert ops(made) == ["aten.index_select", "aten.index_select", "qcompile.linear"]


def test_modules_without_linears_are_left_alone() -> None:
    made = program(nn.Sequential(nn.LayerNorm(32), nn.ReLU()), X)
    ctx = same(made, [*PACK, MergeLinears(), FuseEpilogue(), FusePrologue()], [X])
    assert ops(made) == ["aten.layer_norm", "aten.relu"] and not ctx.report.refusals
