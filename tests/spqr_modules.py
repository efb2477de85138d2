"""Random tiles and outliers as SpQR stores them, bit by bit, with the weights that its published formulas give."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def dense(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of a random weight, row by row of each tile, and what they are worth: f32 [N, K]."""
    generator = torch.Generator().manual_seed(0)
    words, made = [], torch.zeros(N, K)
    for row in range(N // 16):
        for column in range(K // 16):
            second = (torch.rand(4, generator=generator) + 0.5).half()
            ss, zs, sz, zz = second
            whole = sum(int(x) << 16 * i for i, x in enumerate(second.view(torch.int16).tolist()))
            for r in range(16):
                scale, zero = torch.randint(0, 8, (2,), generator=generator).tolist()
                codes = torch.randint(0, 8, (16,), generator=generator)
                word = scale | zero << 3 | (whole >> 8 * (r // 2) & 0xFF) << 54
                words.append(word | sum(int(code) << 6 + 3 * j for j, code in enumerate(codes)))
                s, z = ss * (torch.tensor(scale).half() - sz), zs * (torch.tensor(zero).half() - zz)
                made[row * 16 + r, column * 16 : column * 16 + 16] = (s * (codes.half() - z)).float()
    return torch.tensor(words), made


def outliers(N: int, K: int) -> torch.Tensor:
    """A sparse f32 [N, K] of float16 numbers; one row has none, one has many."""
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(N, K, generator=generator).half().float()
    chance = torch.rand(N, K, generator=generator)
    chance[3], chance[4, 10:] = 1.0, 0.0
    return torch.where(chance < 0.05, made, 0.0)


def word(column: int, number: float) -> int:
    bits = int(torch.tensor(number).half().view(torch.int16)) & 0xFFFF
    value = bits << 16 | column
    return value - 2**32 if value >= 2**31 else value


def csr(extra: torch.Tensor) -> Tensors:
    rows = [[word(int(k), float(row[k])) for k in row.nonzero()[:, 0]] for row in extra]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return {"row_offsets": offsets.int(), "col_vals": torch.tensor([w for row in rows for w in row]).int()}


def ptcsr(extra: torch.Tensor) -> Tensors:
    """Sixteen rows beside each other, zero words behind the shorter ones."""
    rows = [[word(int(k), float(row[k])) for k in row.nonzero()[:, 0]] for row in extra]
    words, offsets = [], [0]
    for at in range(0, len(rows), 16):
        tile = rows[at : at + 16]
        for i in range(max(map(len, tile))):
            words += [row[i] if i < len(row) else 0 for row in tile]
        offsets.append(len(words))
    return {"row_offsets": torch.tensor(offsets).int(), "col_vals": torch.tensor(words, dtype=torch.int32)}
