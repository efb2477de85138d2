"""How long GPU work takes: recorded once, run again and again, over weights that are not in the cache any more."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qcompile.artifact import Built, Extent
from qcompile.dims import evaluate
from qcompile.dtypes import DTYPES
from qcompile.runtime.cuda import Device, Start

COLD = 256 * 2**20
"""Bytes to go over before anything is read again: more than the cache of any GPU that we know."""

MOST_COPIES = 64


def seconds(device: Device, calls: Sequence[Callable[[], object]], least: float = 0.02, rounds: int = 5) -> float:
    """Seconds of one of `calls`, which are recorded as one graph: the median of `rounds` that take about `least` each.

    Each is called once before, for what only a first call does and a graph cannot record.
    """

    def run() -> None:
        for call in calls:
            call()

    run()
    replay = device.capture(run)

    def taken(times: int) -> float:
        device.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            replay()
        device.synchronize()
        return time.perf_counter() - start

    times = max(1, math.ceil(least / max(taken(2) / 2, 1e-6)))
    return statistics.median(taken(times) for _ in range(rounds)) / times / len(calls)


def copies(bytes_each: int) -> int:
    """How many different weights to go over so that each comes from memory."""
    return min(max(2, math.ceil(COLD / max(bytes_each, 1))), MOST_COPIES)


def kernel_seconds(
    device: Device,
    kernel: Built,
    dims: Sequence[int],
    extents: Sequence[Extent],
    given: Sequence[torch.Tensor | None],
    least: float = 0.02,
) -> float:
    """Seconds of one run of `kernel`, with weights that come from memory.

    `given` are its arguments as contiguous tensors anywhere; None is what runs make, of the size in `extents`: random
    numbers for floats, zeros for integers.
    """
    launch = kernel.launch
    assert launch is not None
    (loaded,) = device.load({kernel.entry: kernel})
    grid = tuple(evaluate(dim, {f"d{i}": value for i, value in enumerate(dims)}) for dim in launch.grid)
    shared = [
        _made(extent, device.torch) if tensor is None else None for extent, tensor in zip(extents, given, strict=True)
    ]
    size = sum(tensor.nbytes for tensor in given if tensor is not None)
    numbers = np.array(dims, dtype=np.int64)
    kept, starts = [shared], []
    for _ in range(copies(size)):
        own = [tensor.to(device.torch, copy=True) if tensor is not None else None for tensor in given]
        both = [mine if mine is not None else made for mine, made in zip(own, shared, strict=True)]
        pointers = np.array([tensor.data_ptr() for tensor in both if tensor is not None], dtype=np.int64)
        starts.append(device.launcher(loaded, (grid[0], grid[1], grid[2]), pointers, numbers))
        kept.append(own)
    return seconds(device, [functools.partial(_start, device, start) for start in starts], least)


def _start(device: Device, start: Start) -> None:
    start(device.stream())


def _made(extent: Extent, where: torch.device) -> torch.Tensor:
    dtype = DTYPES[extent.dtype]
    if dtype.is_floating_point:
        return torch.randn(extent.elements, device=where).to(dtype)
    return torch.zeros(extent.elements, dtype=dtype, device=where)
