"""Every test here draws the same numbers whatever ran before it."""

from __future__ import annotations

import torch


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)
