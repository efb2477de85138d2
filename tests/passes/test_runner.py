"""The runner: checks after each pass, reproducers, snapshots, fuel; pipelines as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_programs import Call, apply, program

from qcompile.errors import ConfigError, InternalError
from qcompile.passes.base import Context
from qcompile.passes.graph import call, substitute
from qcompile.passes.pipelines import CHECKED, FULL, PASSES, make, pipeline

X = torch.randn(3, 4)
SQUARES = Call(lambda x: x * torch.sigmoid(x) + (x + 1) * torch.sigmoid(x + 1))


@dataclass(frozen=True)
class Transposer:
    """A pass with a fault: it changes the type of a value."""

    name: ClassVar[str] = "transposer"

    def run(self, made, ctx):
        node = next(n for n in made.graph.graph.nodes if n.target is torch.ops.aten.sigmoid.default)
        substitute(node, call(node, torch.ops.aten.t.default, (node.args[0],), self.name))
        return 1


@dataclass(frozen=True)
class Crasher:
    """A pass that fails with an exception of its own."""

    name: ClassVar[str] = "crasher"

    def run(self, made, ctx):
        raise ZeroDivisionError("in a pass")


def test_a_changed_type_is_found_at_once(tmp_path) -> None:
    made = program(SQUARES, X)
    with pytest.raises(InternalError) as error:
        apply(made, Transposer(), ctx=Context(made.report, reproducers=tmp_path))
    assert error.value.summary == "the pass 'transposer' failed" and error.value.where == str(tmp_path)
    assert "a rewrite changed the type of a value" in error.value.found


def test_an_exception_leaves_a_reproducer(tmp_path) -> None:
    made = program(SQUARES, X)
    with pytest.raises(InternalError, match="ZeroDivisionError: in a pass"):
        apply(made, Crasher(), ctx=Context(made.report, reproducers=tmp_path))
    assert (tmp_path / "pass.txt").read_text() == "Crasher()\n"
    assert "aten.sigmoid" in (tmp_path / "before.py.txt").read_text()
    assert "in a pass" in (tmp_path / "error.txt").read_text()
    assert "aten.sigmoid" in (tmp_path / "after.py.txt").read_text()


def test_graphs_are_kept_where_asked_and_shown_when_changed() -> None:
    made, shown = program(SQUARES, X), []
    names = ("normalise", "share-subexpressions", "fuse-activation")
    ctx = Context(
        made.report,
        keep=frozenset({"normalise", "fuse-activation"}),
        show=lambda name, text: shown.append((name, text)),
    )
    apply(made, *pipeline(names), ctx=ctx)
    assert list(ctx.snapshots) == ["normalise", "fuse-activation"]
    assert [name for name, _ in shown] == ["fuse-activation"] and "aten.silu" in shown[0][1]
    assert [name for name, _ in made.report.passes] == list(names)


@pytest.mark.parametrize("fuel", [0, 1, 2, 3])
def test_fuel_counts_rewrites_over_the_pipeline(fuel: int) -> None:
    made = program(SQUARES, X)
    apply(made, *pipeline(("share-subexpressions", "fuse-activation")), ctx=Context(made.report, fuel=fuel))
    assert sum(count for _, count in made.report.passes) == fuel


def test_every_pass_is_registered_by_its_own_name() -> None:
    for name in PASSES:
        assert make(name).name == name
    assert set(FULL) == set(PASSES) and set(CHECKED) < set(PASSES)


def test_an_unknown_pass() -> None:
    with pytest.raises(ConfigError) as error:
        make("normalize")
    text = "unknown pass, did you mean 'normalise'?\n  found:    'normalize'\n  expected: normalise, quantize"
    assert str(error.value).startswith(text)
