"""Arena offsets never overlap while alive, are the same each time, and memory is aligned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import ArtifactError
from qcompile.runtime.memory import ALIGNMENT, aligned, allocate, assign, empty

LIVES = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 400)).map(lambda t: (t[0], t[0] + t[1], t[2])),
    max_size=24,
)


@given(LIVES)
def test_no_two_live_temporaries_overlap(lives):
    offsets, total = assign(lives)
    assert offsets.keys() == lives.keys()
    for a, (first, last, size) in lives.items():
        assert offsets[a] % ALIGNMENT == 0 and offsets[a] + size <= total
        for b, (other_first, other_last, other_size) in lives.items():
            if a < b and first <= other_last and other_first <= last and size and other_size:
                assert offsets[a] + size <= offsets[b] or offsets[b] + other_size <= offsets[a]


@given(LIVES)
def test_order_of_insertion_does_not_matter(lives):
    assert assign(lives) == assign(dict(reversed(list(lives.items()))))


def test_a_chain_needs_two_places():
    lives = {f"t{i:02}": (i, i + 1, 1000) for i in range(50)}
    assert assign(lives)[1] == 2 * 1024


def test_memory_is_aligned():
    for size in (0, 1, 63, 64, 1000):
        assert allocate(size).data_ptr() % ALIGNMENT == 0 and allocate(size).numel() == size
    assert empty((3, 5), torch.float16).data_ptr() % ALIGNMENT == 0
    whole = empty((4, 16), torch.float32)
    assert aligned(whole) is whole
    for part in (whole.view(-1)[1:], whole.T):
        copy = aligned(part)
        assert copy.data_ptr() % ALIGNMENT == 0 and torch.equal(copy, part) and copy.is_contiguous()


def test_what_an_earlier_kernel_did_is_not_taken_for_a_lack_of_memory(monkeypatch):
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]

    def fails(*args, **options):
        raise errors.pop(0)

    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(ArtifactError, match="not enough memory"):
        allocate(64, "cuda")
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        allocate(64, "cuda")
