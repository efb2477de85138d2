"""Times several ways of doing the same work in turns, so that a slow spell of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

PAUSE = 0.005
Work = Callable[[int], object]


def medians(work: Mapping[str, Work], seconds: float, least: int = 3, most: int = 200) -> dict[str, float]:
    """Median seconds of one call of each entry. An entry is called with a running number, so that it can rotate over
    weights; the first round is not counted. Rounds go on until about `seconds` were spent. A pause before each call lets
    the threads of the one before stop waiting for more work, which many do in a loop."""
    samples: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call(0)
    start, turn = time.perf_counter(), 1
    while turn <= least or (turn <= most and time.perf_counter() - start < seconds):
        for name, call in work.items():
            time.sleep(PAUSE)
            before = time.perf_counter()
            call(turn)
            samples[name].append(time.perf_counter() - before)
        turn += 1
    return {name: statistics.median(values) for name, values in samples.items()}
