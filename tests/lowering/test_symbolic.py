"""Symbolic strided views against torch's own views of the same data."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.dims import evaluate
from qcompile.lowering.symbolic import Strided, dim, size

B, S = sympy.Symbol("s0", positive=True, integer=True), sympy.Symbol("s1", positive=True, integer=True)
NAMES = {B: "b", S: "s"}
SIZES = {"b": 3, "s": 5}


def read(view: Strided, data: torch.Tensor) -> torch.Tensor:
    plain = view.to_view(NAMES)

    def numbers(items):
        return [evaluate(item, SIZES) for item in items]

    return data.as_strided(numbers(plain.shape), numbers(plain.strides), evaluate(plain.offset, SIZES))


def start() -> tuple[Strided, torch.Tensor]:
    view = Strided.contiguous_in("x", "f32", (B, S, 4, 6))
    return view, torch.arange(3 * 5 * 24, dtype=torch.float32).reshape(3, 5, 4, 6)


CASES = {
    "heads": (lambda v: v.transpose(1, 2), lambda t: t.transpose(1, 2)),
    "merge heads": (lambda v: v.reshape((B, S, 24)), lambda t: t.reshape(3, 5, 24)),
    "rows": (lambda v: v.reshape((B * S, 24)), lambda t: t.reshape(15, 24)),
    "minus one": (lambda v: v.reshape((B, S, -1)), lambda t: t.reshape(3, 5, -1)),
    "split last of a permuted": (
        lambda v: v.transpose(1, 2).reshape((B, 4, S, 2, 3)),
        lambda t: t.transpose(1, 2).reshape(3, 4, 5, 2, 3),
    ),
    "slice": (lambda v: v.slice(3, 2, 3), lambda t: t[..., 2:5]),
    "every second": (lambda v: v.slice(2, 1, 2, 2), lambda t: t[:, :, 1::2]),
    "select last": (lambda v: v.select(1, -1), lambda t: t.select(1, -1)),
    "expand": (lambda v: v.select(2, 0).unsqueeze(2).expand((B, S, 7, 6)), lambda t: t[:, :, :1].expand(3, 5, 7, 6)),
    "squeeze": (lambda v: v.slice(2, 1, 1).squeeze([2]), lambda t: t[:, :, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_view_reads_the_elements_that_torch_reads(case: str) -> None:
    ours, theirs = CASES[case]
    view, data = start()
    assert torch.equal(read(ours(view), data), theirs(data))


def test_a_reshape_across_a_gap_needs_a_copy() -> None:
    view, _ = start()
    assert view.transpose(1, 2).reshape((B, S * 4, 6)) is None
    assert not view.transpose(1, 2).is_contiguous


def test_dimensions_of_one_element_may_have_any_stride() -> None:
    view = Strided.contiguous_in("x", "f32", (B, 1, S)).transpose(0, 1)
    assert view.is_contiguous


@settings(max_examples=60)
@given(st.permutations(range(4)), st.integers(0, 3), st.integers(0, 2))
def test_reshape_after_permute_agrees_with_torch(order: list[int], axis: int, first: int) -> None:
    view, data = start()
    view, data = view.permute(order), data.permute(order)
    rest = [size(item) for item in view.shape]
    merged = [*rest[:first], rest[first] * rest[first + 1], *rest[first + 2 :]]
    numbers = [evaluate(dim(item, NAMES), SIZES) for item in map(sympy.expand, merged)]
    made = view.reshape(merged)
    try:
        expected = data.view(numbers)
    except RuntimeError:
        assert made is None
    else:
        assert made is not None and torch.equal(read(made, data), expected)
