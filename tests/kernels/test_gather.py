"""Embedding in float tables, index_select, indexing and concatenation against eager."""

from __future__ import annotations

import pytest
import torch
from glue_cases import parts_along
from lowered import Lowered, agrees

functional = torch.nn.functional


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 37])
def test_embedding(dtype: torch.dtype, width: int) -> None:
    ids = torch.tensor([[0, 4, 9], [9, 1, 0]])
    agrees(lambda ids, table: functional.embedding(ids, table), ids, rtol=0, atol=0, table=values(10, width).to(dtype))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_index_select(axis: int, dtype: torch.dtype) -> None:
    x = (values(3, 4, 19) * 5).to(dtype)
    agrees(lambda x, i: torch.index_select(x, axis, i), x, torch.tensor([2, 0, 1, 1, 2]), rtol=0, atol=0)


def test_rows_that_are_wanted() -> None:
    made = Lowered(lambda x, keep: x[:, keep, :] * 2.0, values(2, 5, 8), torch.tensor([4, 0]))
    x, keep = values(2, 5, 8, seed=1), torch.tensor([-1, 2])
    torch.testing.assert_close(made(x, keep), x[:, keep, :] * 2.0)


def test_an_index_out_of_range_reads_nothing_and_shows() -> None:
    made = Lowered(lambda x, i: torch.index_select(x, 0, i), values(3, 5), torch.tensor([0, 1]))
    y = made(values(3, 5), torch.tensor([2**40, 1]))
    assert y[0].isnan().all() and torch.equal(y[1], values(3, 5)[1])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cat(axis: int) -> None:
    agrees(lambda *parts: torch.cat(parts, axis), *parts_along(axis), rtol=0, atol=0)
    agrees(lambda a, b: torch.stack([a, b * 2], axis), values(4, 3), values(4, 3, seed=9))


def test_repeat_and_diff() -> None:
    agrees(lambda x: x.repeat(2, 1, 3), values(3, 5), rtol=0, atol=0)
    agrees(lambda x: x.repeat(3, 2), values(4, 3).t().contiguous().t()[1:], rtol=0, atol=0)
    agrees(lambda x: x.repeat_interleave(3, 1), values(2, 4, 5), rtol=0, atol=0)
    x, before, after = (values(2, n, 5, seed=n) for n in (7, 1, 2))
    agrees(lambda x: torch.diff(x), x, rtol=0, atol=0)
    agrees(lambda x, a, b: torch.diff(x, dim=1, prepend=a, append=b), x, before, after, rtol=0, atol=0)


def test_cat_of_sizes_known_when_it_runs() -> None:
    made = Lowered(lambda x: torch.cat([x * 2.0, x.expand(-1, -1, 6)], 1), values(2, 3, 6), dynamic={0: "b", 1: "s"})
    for b, s in ((2, 3), (1, 1), (3, 9)):
        x = values(b, s, 6, seed=s)
        assert torch.equal(made(x), torch.cat([x * 2.0, x], 1))
