"""Where arrays lie in memory: aligned allocation, and one arena shared by temporaries that are never alive together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qcompile.errors import ArtifactError

Device = torch.device | str
ALIGNMENT = 64


def allocate(size: int, device: Device = "cpu") -> torch.Tensor:
    """A u8 tensor of `size` zero bytes that starts at a multiple of 64; ArtifactError when memory is short."""
    try:
        raw = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        # On a GPU any call may be told of what an earlier kernel did; for a CPU torch has no error of its own.
        if torch.device(device).type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
            raise
        found, remedy = f"{size} bytes wanted on {device}", "a smaller batch or length"
        raise ArtifactError("not enough memory", found=found, remedy=remedy) from error
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + size]


def empty(shape: Sequence[int], dtype: torch.dtype, device: Device = "cpu") -> torch.Tensor:
    """A contiguous zero tensor of `shape` and `dtype` on a 64-byte boundary."""
    count = 1
    for dim in shape:
        count *= dim
    return allocate(count * dtype.itemsize, device).view(dtype).view(*shape)


def is_aligned(tensor: torch.Tensor, device: Device = "cpu") -> bool:
    """Whether it is a contiguous tensor on `device` that starts on a 64-byte boundary."""
    return tensor.is_contiguous() and tensor.device == torch.device(device) and tensor.data_ptr() % ALIGNMENT == 0


def aligned(tensor: torch.Tensor, device: Device = "cpu") -> torch.Tensor:
    """`tensor` itself where it is aligned on `device`, else a copy that is."""
    return tensor if is_aligned(tensor, device) else empty(tensor.shape, tensor.dtype, device).copy_(tensor)


def round_up(size: int) -> int:
    """The least multiple of the alignment that holds `size` bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def assign(lives: Mapping[str, tuple[int, int, int]]) -> tuple[dict[str, int], int]:
    """The offset of each temporary in one arena, and the arena's size in bytes.

    `lives` maps a name to (first step, last step, bytes), steps inclusive. Two temporaries alive at the same step never
    overlap. The lowest free place is taken, in order of first use, so equal input gives equal offsets.

    >>> assign({"a": (0, 1, 64), "b": (1, 2, 64), "c": (2, 3, 64)})
    ({'a': 0, 'b': 64, 'c': 0}, 128)
    """
    offsets: dict[str, int] = {}
    live: list[tuple[int, int, int]] = []  # (offset, end, last step), by offset
    total = 0
    for name, (first, last, size) in sorted(lives.items(), key=lambda item: (item[1][0], -item[1][2], item[0])):
        live = [block for block in live if block[2] >= first]
        at = 0
        for begin, end, _ in live:
            if begin - at >= size:
                break
            at = max(at, end)
        offsets[name] = at
        live.append((at, at + round_up(size), last))
        live.sort()
        total = max(total, at + round_up(size))
    return offsets, total
