"""Which rule lowers which operator on CUDA: a table of operator -> "module:function", looked at when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch.fx import Node

from qcompile.lowering.base import Context

Rule = Callable[[Node, Context], None]

RULES: dict[str, str] = {}


def rule_for(node: Node) -> Rule | None:
    """The rule of a node: a line of the table; None where there is none."""
    place = RULES.get(str(node.target))
    if place is None:
        return None
    module, _, function = place.partition(":")
    found: Rule = getattr(import_module(f"qcompile.lowering.triton.{module}"), function)
    return found
