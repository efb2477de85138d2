"""Every real checkpoint, whole: compiled for each target, weights and logits against the real package."""

from __future__ import annotations

from pathlib import Path

import conformance
import pytest
from checkpoints import folders, parametrize


@pytest.mark.parametrize("target", conformance.TARGETS)
@parametrize("")
def test_a_real_checkpoint(folder: Path, target: str) -> None:
    row = conformance.measure(folder, target)
    assert row.within(conformance.bound(folder)), row


def test_the_page_lists_every_checkpoint() -> None:
    page = (Path(__file__).parent.parent / "docs" / "conformance.md").read_text()
    for folder in folders(""):
        for target in conformance.TARGETS:
            assert f"| {folder.name} |" in page and f"| {target} |" in page


def test_a_bound_that_is_not_the_usual_one_says_why() -> None:
    for pattern, limit in conformance.BOUNDS:
        assert bool(limit.reason) == (limit != conformance.Bound()), pattern
