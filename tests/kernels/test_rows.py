"""topk and cumsum of rows against eager."""

from __future__ import annotations

import pytest
import torch
from glue_cases import rows_in_disorder, values
from lowered import Lowered, agrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_topk(dtype: torch.dtype) -> None:
    x = rows_in_disorder(dtype)
    for largest, part in ((True, 0), (False, 1)):
        agrees(lambda x, part=part, big=largest: torch.topk(x, 5, largest=big)[part], x, rtol=0, atol=0)


def test_topk_takes_the_first_of_equals_and_all_there_are() -> None:
    x = torch.zeros(3, 37)
    x[:, 1::2] = -0.0
    assert torch.equal(Lowered(lambda x: torch.topk(x, 37)[1], x)(x), torch.arange(37).expand(3, -1))
    agrees(lambda x: torch.topk(x, 1)[0], values(4, 1), rtol=0, atol=0)


def test_cumsum() -> None:
    agrees(lambda x: x.cumsum(-1), values(2, 3, 37), rtol=1e-5, atol=1e-5)
    agrees(lambda x: x.cumsum(1), values(2, 50) > 0, dynamic={1: "n"}, rtol=0, atol=0)
    agrees(lambda x: x.cumsum(0), (values(900) * 5).to(torch.int32), rtol=0, atol=0)
