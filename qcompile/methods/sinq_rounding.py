"""SINQ's quantizer: tiles whose rows and columns are first brought to equal deviations, then rounded row by row.

Source: sinq 0.2.0, `sinkhorn_log`, `quantize_dual_scale_shift` and `rtn8`; every operation is in its order and dtype, since
the result is compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.formats.tables import NF3, NF4

ROUNDS = 16
HEAVY = 5.0  # from this kurtosis on the deviations of rows and columns are left as they are
CHUNK = 1 << 22  # weights worked on at a time


@dataclass(frozen=True)
class Rounded:
    """Codes f32 [T, rows, columns] of T tiles, and f16 numbers: scale and zero [T, rows, 1], scale2 [T, 1, columns].

    `zero` is a number where it is the same everywhere.
    """

    code: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | float
    scale2: torch.Tensor


def quantize(tiles: torch.Tensor, method: str, nbits: int) -> Rounded:
    """The codes of tiles f16 [T, rows, columns] by a method of the package ("sinq", "sinq_nf4", "sinq_noz" ...).

    For heavy tails under "sinq_nf4" and the like the package makes plain codes, and reads them as places in the table; here
    the table stays.
    """
    if "sinq" in method and _kurtosis(tiles) > HEAVY:
        method = method.replace("sinq", "rtn")
    step = max(1, CHUNK // (tiles.shape[1] * tiles.shape[2]))
    parts = [_tiles(part.float(), method, nbits) for part in torch.split(tiles, step)]
    zero = parts[0].zero
    return Rounded(
        torch.cat([part.code for part in parts]),
        torch.cat([part.scale for part in parts]),
        zero if isinstance(zero, float) else torch.cat([p.zero for p in parts if isinstance(p.zero, torch.Tensor)]),
        torch.cat([part.scale2 for part in parts]),
    )


def _kurtosis(tiles: torch.Tensor) -> float:
    flat = tiles.float().reshape(-1)
    off = flat - flat.mean()
    variance = (off * off).mean().clamp_min(1e-6)
    return float(off.pow(4).mean() / (variance * variance))


def _tiles(tiles: torch.Tensor, method: str, nbits: int) -> Rounded:
    even, columns, rows = _even_out(tiles)
    if "sinq" not in method:
        even = even * columns * rows
        columns, rows = torch.ones_like(columns), torch.ones_like(rows)
    top = 2**nbits - 1
    zero: torch.Tensor | float
    if "noz" in method:
        zero = float(top // 2)
        scale = even.abs().amax(2, keepdim=True).clamp(min=1e-5) / (top // 2 - 1)
        code = torch.round(even / scale).clip(-top // 2, top // 2 - 1) + zero
    elif "nf4" in method or "nf3" in method:
        mean = even.mean(2, keepdim=True)
        scale = (even - mean).abs().amax(2, keepdim=True).clamp_min(1e-4)
        shift = -mean / scale
        code, zero = _nearest(even / scale + shift, NF4 if "nf4" in method else NF3), shift.half()
    else:
        low = even.amin(2, keepdim=True)
        scale = (even.amax(2, keepdim=True) - low).clamp(min=1e-4) / top
        shift = -torch.round(low / scale)
        code, zero = torch.round(even / scale + shift).clamp(0, top), shift.half()
    return Rounded(code, (scale * rows).half(), zero, columns.half())


def _even_out(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tiles f32 over their column scales [T, 1, columns] and row scales [T, rows, 1], and these.

    In rounds each row and column is divided by its deviation, in logarithms and by small steps; the most even round counts,
    and a tile that gets worse is left alone.
    """
    if tiles.shape[1] == 1:  # a single row has no deviation within its columns: the package leaves it as it is
        return tiles, torch.ones_like(tiles[:, :1]), torch.ones_like(tiles[:, :, :1])
    least = torch.minimum(_bounded(tiles.std(2)).amin(1), _bounded(tiles.std(1)).amin(1)) + 1e-6
    target = least[:, None, None]
    log_columns, log_rows = torch.zeros_like(tiles[:, :1]), torch.zeros_like(tiles[:, :, :1])
    columns, rows = log_columns.exp(), log_rows.exp()
    best = _imbalance(tiles.std(2), tiles.std(1))
    moving = torch.ones_like(best)
    for _ in range(ROUNDS):
        now = tiles / log_columns.exp() / log_rows.exp()
        of_rows, of_columns = now.std(2), now.std(1)
        imbalance = _imbalance(of_rows, of_columns)
        better = (imbalance <= best)[:, None, None]
        best = torch.minimum(best, imbalance)
        columns = torch.where(better, log_columns.exp(), columns)
        rows = torch.where(better, log_rows.exp(), rows)
        moving = torch.where(imbalance > best, 0.0, moving)
        go = moving[:, None, None]
        step = (_bounded(of_columns)[:, None, :] / target).clamp(0.7, 2.0).log()
        log_columns = (log_columns + step * go).clip(-0.3, 10.0)
        step = (_bounded(of_rows)[:, :, None] / target).clamp(0.7, 2.0).log()
        log_rows = (log_rows + step * go).clip(-0.3, 10.0)
    return tiles / columns / rows, columns, rows


def _bounded(deviations: torch.Tensor) -> torch.Tensor:
    return deviations.clamp(1e-3, 1e3)


def _imbalance(of_rows: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
    """The greatest deviation over the least, [T]."""
    least = torch.minimum(of_rows.amin(1), of_columns.amin(1)).clamp_min(1e-12)
    return torch.maximum(of_rows.amax(1), of_columns.amax(1)) / least


def _nearest(values: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """The place of the entry of an ascending table that is nearest, the lower one of two."""
    entries = torch.tensor(table)
    above = torch.searchsorted(entries, values.contiguous()).clamp(1, len(table) - 1)
    lower = (values - entries[above - 1]).abs() <= (values - entries[above]).abs()
    return (above - lower.long()).float()


def eight_bits(numbers: torch.Tensor, ranges: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """f16 numbers as u8 codes [ranges, ...], and the step and least of each column: numbers ~ code * step + least."""
    numbers = numbers.reshape(ranges, -1)
    least = numbers.amin(0, keepdim=True)
    off = numbers - least
    step = off.amax(0, keepdim=True) / 255
    # A column of equal numbers has no step: 0 / 0 is not a number, and its code says nothing.
    return torch.round(off / step).nan_to_num(0).clip(0, 255).to(torch.uint8), step, least
