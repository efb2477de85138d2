"""Layouts that compressed-tensors wrote before 0.15: bit masks of what is not 0, and Marlin's 2:4 tiles."""

from __future__ import annotations

import torch

from qcompile.errors import CheckpointError
from qcompile.program import Module

_LANE = torch.arange(32)


def _damaged(what: str, found: object, expected: object, module: Module) -> CheckpointError:
    return CheckpointError(
        what, where=module.path, found=found, expected=expected, remedy="the file is damaged: write it again"
    )


def expand(kept: torch.Tensor, mask: torch.Tensor, module: Module) -> torch.Tensor:
    """The weight [N, K], in its stored dtype, from what is kept, row by row, and the mask u8 [N, ceil(K / 8)]."""
    places = (mask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    where = places.flatten(1)[:, : module.k].bool()
    if int(where.sum()) != kept.numel():
        raise _damaged("a bit mask does not fit what is kept", f"{int(where.sum())} bits", kept.numel(), module)
    made = torch.zeros(module.n, module.k, dtype=torch.uint8 if kept.itemsize == 1 else torch.int16)
    if kept.itemsize == 4:
        made = made.to(torch.int32)
    made[where] = kept.flatten().view(made.dtype)
    return made.view(kept.dtype)


def marlin24(packed: torch.Tensor, meta: torch.Tensor, bits: int, module: Module) -> torch.Tensor:
    """The codes i32 [N, K], less their middle, of Marlin's 2:4 layout: packed i32 [K / 32, N * bits / 2], meta i16.

    The kept half of each row, [K / 2, N], lies in tiles of 16 x 16, each permuted for the registers of a tensor core;
    four bits of `meta` say which two of four inputs are kept.
    """
    kept = module.k // 2
    per = 32 // bits
    codes = (packed.long()[..., None] >> (bits * torch.arange(per))) & ((1 << bits) - 1)
    tiles = torch.empty(kept * module.n // 1024, 1024, dtype=torch.long)
    tiles[:, _order(bits)] = codes.reshape(-1, 1024)
    halves = tiles.reshape(kept // 16, module.n // 16, 16, 16).transpose(1, 2).reshape(kept, module.n).t()
    fours = _fours(meta, module)
    places = torch.stack([fours & 3, fours >> 2], -1) + 4 * torch.arange(module.k // 4)[:, None]
    out = torch.zeros(module.n, module.k, dtype=torch.long)
    return out.scatter_(1, places.reshape(module.n, -1), halves - (1 << (bits - 1))).to(torch.int32)


def _order(bits: int) -> torch.Tensor:
    """The place in four tiles of each code of their 1024, as a warp's threads hold them."""
    column = _LANE // 4
    rows = 2 * (_LANE % 4)[:, None] + torch.tensor([0, 1, 8, 9])
    first = 16 * rows + (column // 2 * 256 + column % 2 * 8)[:, None]
    thread = torch.cat([first, first + 4], 1)
    places = (thread[:, None, :] + torch.arange(4)[:, None]).reshape(-1)
    swap = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3])
    return places.reshape(-1, len(swap))[:, swap].reshape(-1)


def _fours(meta: torch.Tensor, module: Module) -> torch.Tensor:
    """Four bits for each four inputs, [N, K / 4], from CUTLASS' order of the 16-bit words [N, K / 16]."""
    words = module.k // 16
    row, word = torch.meshgrid(torch.arange(module.n), torch.arange(words), indexing="ij")
    block, row = row // 64 * 64, row % 64
    row = block + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row // 8 * 4
    shift = ((row % 2 == 0) & (word % 2 == 1)).long() - ((row % 2 == 1) & (word % 2 == 0)).long()
    row, word = row + shift, word - shift
    found = meta.flatten()[word // 2 * module.n * 2 + row * 2 + word % 2].long()
    return torch.stack([(found >> (4 * i)) & 15 for i in range(4)], -1).reshape(module.n, -1)


def marlin_scales(scale: torch.Tensor, columns: int, module: Module) -> torch.Tensor:
    """Scales [N, groups] from Marlin's [groups, N], which are permuted by 64 where a group is shorter than a kept row."""
    if columns < module.k // 2:
        order = (8 * torch.arange(8)[:, None] + torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])).flatten()
        plain = torch.empty_like(scale.reshape(-1, 64))
        plain[:, order] = scale.reshape(-1, 64)
        scale = plain.reshape(scale.shape)
    return scale.t().contiguous()
