"""What the texts of attention kernels share: scores, and the running softmax over blocks of keys."""

from __future__ import annotations

import math
from typing import Any

from qcompile.lowering.triton.rope import pad
from qcompile.lowering.triton.text import cast, dot_operand, interpreted
from qcompile.target import Target

LOWEST = "-3.4028234663852886e38"  # finite, so that a row that has seen no key yet has differences that are numbers
LOW = "-1e30"  # the same where scores are multiplied before they are compared


def dot(left: str, right: str) -> str:
    """The text of a dot whose operands are used as they are: f32 ones are not rounded to fewer bits."""
    return f'tl.dot({left}, {right}, input_precision="ieee")'


def operand(name: str, dtype: str, compute: str, target: Target) -> str:
    """The tile `name`, loaded as `dtype`, as an operand of a dot in `compute`."""
    if dtype == compute:
        return f"{name}.to(tl.float32)" if interpreted(target) else name
    return dot_operand(f"{name}.to(tl.float32)", {"compute": compute}, target)


def scaled(score: str, scale: float, softcap: float, unit: float = 1.0) -> str:
    """The score of a dot product: times `scale`, kept inside of -softcap .. softcap if that is not 0, then times `unit`."""
    if not softcap:
        return f"{score} * {scale * unit!r}"
    square = (
        f"tl.exp2({score} * {2.0 * scale / softcap / math.log(2)!r})"  # of e to the power of the score over softcap
    )
    return f"{softcap * unit!r} - {2.0 * softcap * unit!r} / ({square} + 1.0)"


def block_keys(d: int, dv: int, most: int = 64) -> int:
    """Keys of one block: as many as registers and shared memory hold of this width, at most `most`."""
    return max(16, min(most, 128 * most // pad(max(d, dv))))


def softmax_step(compute: str, value: str, target: Target, factor: float | None = None) -> list[str]:
    """Statements: what a block of keys adds to `total` [rows] and `acc` [rows, columns], whose greatest score is `most`.

    `score` f32 and `seen` i1 are [rows, keys], `value` the operand [keys, columns] of a dot in `compute`. With a factor, a
    score's share is 2 to the power of score * factor; that of a key that is not seen is 0, as its score is `LOW`. Until one
    was seen nothing is taken off: LOW * factor less its own rounded value is no 0 where that is fused.
    """
    params: dict[str, Any] = {"compute": compute}
    if factor is None:
        keep, share = "tl.exp(most - new)", "tl.where(seen, tl.exp(score - new[:, None]), 0.0)"
    else:
        keep = f"tl.exp2((most - new) * {factor!r})"
        share = f"tl.exp2(score * {factor!r} - tl.where(new > {LOW}, new * {factor!r}, 0.0)[:, None])"
    return [
        f"score = tl.where(seen, score, {LOWEST if factor is None else LOW})",
        "new = tl.maximum(most, tl.max(score, 1))",
        f"keep = {keep}",
        f"share = {share}",
        "total = total * keep + tl.sum(share, 1)",
        f"acc = acc * keep[:, None] + {dot(dot_operand('share', params, target), value)}",
        "most = new",
    ]


def rounded(name: str, dtype: str, target: Target) -> str:
    """The f32 `name` rounded to `dtype`, as f32."""
    return name if dtype == "f32" else f"{cast(name, dtype, target)}.to(tl.float32)"
