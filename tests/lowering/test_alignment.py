"""What is known of addresses before a run, against all that they can be."""

from __future__ import annotations

import doctest

import pytest

from qcompile.dims import evaluate
from qcompile.lowering import alignment


def test_the_examples_hold() -> None:
    assert doctest.testmod(alignment).failed == 0


@pytest.mark.parametrize("dim", ["b", "8*b", "b*s*4", "(2*b + 6)*s", "b*(b + 1)", "3*(s//2)", "16*s + 4", "b*s*t*8"])
def test_a_divisor_divides_whatever_the_sizes_are(dim: str) -> None:
    found = alignment.divisor(dim)
    values = [evaluate(dim, {"b": b, "s": s, "t": 3}) for b in range(1, 40) for s in range(1, 40)]
    assert all(value % found == 0 for value in values)
    assert found in (1, 16) or "t" in dim or any(value % (2 * found) for value in values)
