"""Patterns: what matches, what is refused, and what a replacement leaves behind."""

from __future__ import annotations

import torch
from tiny_programs import Call, ops, program, run

from qcompile.passes.base import Context
from qcompile.passes.graph import infer
from qcompile.passes.pattern import Pattern, rewrite

aten = torch.ops.aten
X = torch.randn(4, 4)
SILU = Pattern(
    "silu", lambda x: aten.mul.Tensor(x, aten.sigmoid.default(x)), aten.silu.default, key=aten.sigmoid.default
)


def rewritten(function, pattern=SILU, **context):
    made = program(Call(function), X)
    ctx = Context(made.report, **context)
    before = run(made, X)
    count = rewrite(made, ctx, pattern)
    infer(made)
    torch.testing.assert_close(run(made, X), before)
    return count, ops(made), ctx.report.refusals


def test_both_orders_of_a_product_match() -> None:
    for function in (lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x):
        assert rewritten(function)[:2] == (1, ["aten.silu"])


def test_a_value_named_twice_must_be_one_value() -> None:
    count, left, refusals = rewritten(lambda x: torch.tanh(x) * torch.sigmoid(x))
    assert count == 0 and left == ["aten.tanh", "aten.sigmoid", "aten.mul.Tensor"]
    assert [r.reason for r in refusals] == ["x would have to be both tanh_default and inputs_0"]


def test_a_failure_that_never_met_the_key_is_no_refusal() -> None:
    assert rewritten(lambda x: x * torch.tanh(x))[::2] == (0, [])


def test_a_node_used_outside_is_a_refusal_that_names_the_user() -> None:
    def both(x):
        gate = torch.sigmoid(x)
        return x * gate + torch.neg(gate)

    count, _, refusals = rewritten(both)
    assert count == 0
    assert [(r.pattern, r.node, r.reason) for r in refusals] == [
        ("silu", "mul_tensor", "aten.sigmoid (sigmoid_default) is also used by neg_default")
    ]


def test_shared_nodes_stay_for_their_other_users() -> None:
    pattern = Pattern(SILU.name, SILU.find, SILU.replace, shared=frozenset({aten.sigmoid.default}))

    def both(x):
        gate = torch.sigmoid(x)
        return x * gate + torch.neg(gate)

    assert rewritten(both, pattern)[:2] == (1, ["aten.sigmoid", "aten.silu", "aten.neg", "aten.add.Tensor"])


def test_numbers_must_be_equal() -> None:
    scaled = Pattern("double", lambda x: aten.mul.Tensor(x, 2.0), lambda x: aten.add.Tensor(x, x), key=aten.mul.Tensor)
    assert rewritten(lambda x: x * 2.0, scaled)[0] == 1
    count, _, refusals = rewritten(lambda x: x * 3.0, scaled)
    assert count == 0 and refusals[0].reason == "expected 2.0, found 3.0"


def test_new_nodes_say_where_they_come_from() -> None:
    made = program(Call(lambda x: x * torch.sigmoid(x)), X)
    origin = next(n for n in made.graph.graph.nodes if n.target is aten.mul.Tensor).meta["stack_trace"]
    rewrite(made, Context(made.report), SILU)
    new = next(n for n in made.graph.graph.nodes if n.target is aten.silu.default)
    assert new.meta["made_by"] == "silu" and new.meta["stack_trace"] == origin


def test_fuel_stops_rewriting() -> None:
    def twice(x):
        y = x * torch.sigmoid(x)
        return y * torch.sigmoid(y)

    assert rewritten(twice, fuel=1)[0] == 1
    assert rewritten(twice, fuel=0)[0] == 0
