"""Every real checkpoint, whole: compiled for each target, weights and logits against the real package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import conformance
import pytest
from checkpoints import folders


def _cases() -> list[Any]:
    """Every checkpoint on every target; those on a CPU beside the last of a method are marked "full"."""
    cases, every = [], folders("")
    methods = [folder.name.split("-")[0] for folder in every]
    for i, folder in enumerate(every):
        more = i < len(every) - 1 and methods[i] == methods[i + 1]
        cases.append(pytest.param(folder, "reference", id=f"{folder.name}-reference"))
        cases.append(pytest.param(folder, "cpu", id=f"{folder.name}-cpu", marks=[pytest.mark.full] if more else []))
    return cases or [pytest.param(None, "", marks=pytest.mark.skip(reason="no checkpoints on this machine"))]


@pytest.mark.parametrize(("folder", "target"), _cases())
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
