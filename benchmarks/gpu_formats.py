"""Every format of the registry on a GPU: one small layer of random storage each, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_layers import BOUND, Opened, distance, rows_of
from benchmarks.gpu_weights import compiled
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed

Case = tuple[Format, int, int]


def cases(every: bool) -> list[Case]:
    """(format, N, K) as the tests have them, odd shapes among them; without `every`, the first of each kind."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from format_cases import CASES

    if every:
        return list(CASES)
    first: dict[str, Case] = {}
    for case in CASES:
        first.setdefault(case[0].kind, case)
    return list(first.values())


def check_formats(
    which: Sequence[Case], target: str, open_session: Opened, rows: Sequence[int]
) -> Iterator[tuple[str, float, float]]:
    """(layer, greatest error over `rows`, the bound) for each case."""
    from format_cases import random_storage

    for format, n, k in which:
        tensors = random_storage(format, n, k)
        dense = dequantize(format, tensors, n, k).double()
        if not bool(dense.isfinite().all()):
            continue  # random bits that stand for no number
        session = open_session(compiled(Packed(format, tensors, n, k), target))
        (name,) = (port.name for port in session.executable.inputs)
        worst = 0.0
        for m in rows:
            x = rows_of(m, k, torch.device("cpu"), m)
            (y,) = session({name: x.to(session.device)}).values()
            worst = max(worst, distance(y.cpu(), x.double() @ dense.T))
        yield f"{format.kind} {n}x{k}", worst, BOUND
