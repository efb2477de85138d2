"""Every format of the registry on a GPU: one small layer of random storage each, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sample:
    """Random storage of a case, and what it is worth: f64 [N, K]."""

    packed: Packed
    dense: torch.Tensor

    @property
    def name(self) -> str:
        return f"{self.packed.format.kind} {self.packed.N}x{self.packed.K}"


def samples(which: Sequence[Case]) -> list[Sample]:
    """Those whose random bits stand for numbers."""
    from format_cases import random_storage

    made = []
    for format, n, k in which:
        tensors = random_storage(format, n, k)
        made.append(Sample(Packed(format, tensors, n, k), dequantize(format, tensors, n, k).double()))
    return [sample for sample in made if bool(sample.dense.isfinite().all())]


def check_formats(
    which: Sequence[Sample], target: str, open_session: Opened, rows: Sequence[int]
) -> Iterator[tuple[str, float, float]]:
    """(layer, greatest error over `rows`, the bound) for each sample; they are compiled and run as one model."""
    session = open_session(compiled([sample.packed for sample in which], target))
    names = [port.name for port in session.executable.inputs]
    worst = [0.0] * len(which)
    for m in rows:
        xs = [rows_of(m, sample.packed.K, torch.device("cpu"), m) for sample in which]
        ys = session(dict(zip(names, (x.to(session.device) for x in xs), strict=True))).values()
        for at, (sample, x, y) in enumerate(zip(which, xs, ys, strict=True)):
            worst[at] = max(worst[at], distance(y.cpu(), x.double() @ sample.dense.T))
    for sample, error in zip(which, worst, strict=True):
        yield sample.name, error, BOUND
