"""Constants, shared subexpressions, masks, regions, dead code."""

from __future__ import annotations

import torch
from tiny_programs import Call, apply, ops, program, reasons, run, same
from torch.nn import functional

from qcompile.backend import CpuBackend
from qcompile.passes.drop_dead_code import DropDeadCode
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.form_regions import FormRegions
from qcompile.passes.normalise import Normalise
from qcompile.passes.share_subexpressions import ShareSubexpressions
from qcompile.passes.simplify_masks import SimplifyMasks

X = torch.randn(3, 4)


def test_what_depends_on_stored_tensors_is_computed_once() -> None:
    made = program(Call(lambda x, w: x * (w.exp() + 1.0).cumsum(0), w=torch.randn(4)), X)
    ctx = same(made, [FoldConstants()], [X])
    assert ops(made) == ["aten.mul.Tensor"] and ctx.report.passes[-1] == ("fold-constants", 3)
    assert [name for name in made.tensors if name.startswith("constant.")] == ["constant.cumsum_default"]


def test_large_results_are_left_to_be_computed() -> None:
    made = program(Call(lambda x, w: x + w.expand(3, 4).neg(), w=torch.randn(1, 4)), X)
    ctx = same(made, [FoldConstants(largest=8)], [X])
    assert "aten.expand" in ops(made)
    assert "the result has 12 elements, its inputs have 4" in reasons(ctx)


def test_random_numbers_are_no_constants() -> None:
    made = program(Call(lambda x: x + torch.rand(4)), X)
    assert apply(made, FoldConstants(), ShareSubexpressions()).report.passes[0][1] == 0


def test_equal_subexpressions_are_one() -> None:
    made = program(Call(lambda x: x.exp() * x.exp() + x.log()), X.abs())
    ctx = same(made, [ShareSubexpressions()], [X.abs()])
    assert ops(made).count("aten.exp") == 1 and ctx.report.passes[-1] == ("share-subexpressions", 1)


def test_a_mask_gathered_in_order_is_a_view() -> None:
    def masked(x, mask):
        b, s = torch.arange(x.shape[0]), torch.arange(x.shape[1])
        picked = (mask > 0)[b[:, None, None], s[None, None, :]] & (s[None, :, None] >= 0)
        return functional.scaled_dot_product_attention(x, x, x, picked)

    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    made = program(Call(masked), x, mask, dynamic={0: "b", 1: "s"})
    ctx = same(made, [Normalise(), SimplifyMasks(), DropDeadCode()], [x, mask])
    assert not {"aten.index.Tensor", "aten.arange", "aten.__and__.Tensor"} & set(ops(made))
    assert ctx.report.passes[1] == ("simplify-masks", 2)


def test_a_gather_in_another_order_stays() -> None:
    def turned(mask):
        s = torch.arange(5)
        return mask[s[:, None], s[None, :]] + mask[s[None, :], s[:, None]]

    mask = torch.randn(5, 5)
    made = program(Call(turned), mask)
    same(made, [SimplifyMasks()], [mask])
    assert ops(made).count("aten.index.Tensor") == 1


def test_attention_under_a_mask_of_all_true_has_none() -> None:
    x = torch.randn(2, 5, 8)
    made = program(
        Call(lambda x: functional.scaled_dot_product_attention(x, x, x, torch.ones(5, 5, dtype=torch.bool))), x
    )
    same(made, [SimplifyMasks(), DropDeadCode()], [x])
    assert ops(made) == ["aten.scaled_dot_product_attention"]


def regions(function, *inputs, backend=None):
    made = program(Call(function), *inputs)
    ctx = same(made, [FormRegions()], inputs, backend=backend or CpuBackend())
    return made, ctx


def test_a_chain_is_one_region_with_all_its_results() -> None:
    def chain(x, y):
        z = (x + y).exp()
        return torch.stack([z.sum(0), (z * 2).sum(0)])

    made, ctx = regions(chain, X, X + 1)
    assert ops(made)[:3] == ["region_0", "<built-in function getitem>", "<built-in function getitem>"]
    inside = [n.target for n in made.graph.region_0.graph.nodes if n.op == "call_function"]
    assert inside == [torch.ops.aten.add.Tensor, torch.ops.aten.exp.default, torch.ops.aten.mul.Tensor]
    assert ctx.report.passes[-1] == ("form-regions", 1)


def test_regions_are_convex() -> None:
    def around(x):
        y = x.exp()
        return y * torch.softmax(y, -1)  # exp and mul may not be one kernel: softmax lies between

    made, ctx = regions(around, X)
    assert ctx.report.passes[-1] == ("form-regions", 2)
    assert [op for op in ops(made) if "getitem" not in op] == ["region_0", "aten.softmax.int", "region_1"]


def test_other_shapes_are_other_regions_unless_cheap() -> None:
    _, ctx = regions(lambda x, y: x * y.exp(), X, torch.randn(3, 1))
    assert ctx.report.passes[-1] == ("form-regions", 2)
    _, ctx = regions(lambda x, y: x * y.to(torch.float32), X, torch.ones(3, 1, dtype=torch.int64))
    assert ctx.report.passes[-1] == ("form-regions", 1)


def test_a_backend_without_regions_gets_none() -> None:
    from qcompile.backend import ReferenceBackend

    made, ctx = regions(lambda x: x.exp() + 1, X, backend=ReferenceBackend())
    assert ctx.report.passes[-1] == ("form-regions", 0) and ops(made) == ["aten.exp", "aten.add.Tensor"]


def test_dead_code_and_its_tensors_go() -> None:
    made = program(Call(lambda x, w: x + w, w=torch.randn(4)), X)
    graph = made.graph.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
        lost = graph.call_function(torch.ops.aten.exp.default, (next(iter(graph.nodes)),))
    before = run(made, X)
    ctx = apply(made, DropDeadCode())
    assert lost not in set(graph.nodes) and ctx.report.passes[-1] == ("drop-dead-code", 1)
    assert torch.equal(run(made, X), before)
