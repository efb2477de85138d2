"""Which transforms of rows a kernel of a linear can make itself; `lowering/triton/transforms.py` has their text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompile.transform import Transform
from qcompile.transforms.cast import RoundTo
from qcompile.transforms.four_over_six import RoundFourOverSix
from qcompile.transforms.fp_quant import GROUP, RoundFpQuant
from qcompile.transforms.linear import Hadamard, Permute, Rotate, Scale
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.norm import RmsNorm
from qcompile.transforms.round_float import RoundFloat, RoundMx, RoundNvfp4
from qcompile.transforms.round_int import RoundInt

LONGEST = 1 << 15  # inputs of a row: one program holds a row in its registers
TOGETHER = 512  # neighbours that a kernel mixes which holds few of a row's inputs at once
LARGEST = 128  # rows of a matrix that blocks of inputs are multiplied by
_EACH = (Permute, RmsNorm, RoundTo, Scale)  # of each input alone, or with what is known of the whole row


def problem(transforms: Sequence[Transform], k: int, *, codes: bool = False) -> str:
    """Why there is no text for these transforms of a row of k inputs; empty when there is.

    `codes`: the last one may keep columns with outliers apart, since its codes are what is wanted.
    """
    if k > LONGEST:
        return f"rows of {k} inputs are longer than {LONGEST}"
    early = next((each for each in transforms[:-1] if reads_all_rows(each)), None)
    if early is not None:
        return f"'{early.kind}', which depends on all rows of a call, in front of another transform"
    turns = [at for at, each in enumerate(transforms) if isinstance(each, Rotate)]
    late = next((each for each in transforms[: max(turns, default=0)] if not isinstance(each, _EACH)), None)
    if late is not None:
        return f"'{late.kind}' in front of a rotation by a matrix"
    if turns and isinstance(transforms[-1], LlmInt8):
        return f"'{transforms[-1].kind}' behind a rotation by a matrix"
    last = len(transforms) - 1
    problems = (_problem(each, codes and at == last, at, k) for at, each in enumerate(transforms))
    return next(filter(None, problems), "")


def reads_all_rows(each: Transform) -> bool:
    """Whether what becomes of a row depends on the others of the call: on which columns hold outliers, or on the largest |x|."""
    match each:
        case LlmInt8():
            return each.threshold > 0
        case RoundInt() | RoundFloat():
            return each.per == "tensor" and not each.scale
        case RoundNvfp4():
            return not each.stored_scale
        case RoundFourOverSix():
            return True
    return False


def alone(transforms: Sequence[Transform]) -> str:
    """Why a kernel that holds few of a row's inputs at once cannot make these transforms; empty when it can.

    What it takes from all of a row are sums and largest numbers.
    """
    for each in transforms:
        if isinstance(each, LlmInt8) and reads_all_rows(each):
            return f"'{each.kind}' looks for columns with outliers in all rows"
        if neighbours(each) > TOGETHER:
            return f"'{each.kind}' of {neighbours(each)} inputs"
    return ""


def neighbours(each: Transform) -> int:
    """Inputs side by side that a transform mixes, or that share a scale which follows from them; 1: no fixed number."""
    match each:
        case RoundInt() | RoundFloat():
            return each.size if each.per == "group" and not each.scale else 1
        case RoundMx() | RoundNvfp4() | Hadamard() | Rotate():
            return each.size
        case RoundFpQuant():
            return GROUP[each.dtype]
        case RoundFourOverSix():
            return 16
    return 1


def _problem(each: Transform, codes: bool, at: int, k: int) -> str:
    numbers = [value for value in vars(each).values() if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        return f"'{each.kind}' with a number that is not finite"
    match each:
        case Permute():
            return "" if at == 0 else "a permutation behind another transform"
        case Hadamard():
            return (
                ""
                if _power(each.size, k) and k % each.size == 0
                else f"a Hadamard matrix of {each.size} over {k} inputs"
            )
        case Rotate():
            fits = k % each.size == 0 and 16 <= each.size <= LARGEST and _power(each.size, k)
            return "" if fits else f"a rotation of blocks of {each.size} of {k} inputs"
        case Scale() | RmsNorm() | RoundTo() | RoundFpQuant():
            return ""
        case RoundInt() | RoundFloat():
            zero = isinstance(each, RoundInt) and not each.symmetric
            if each.per not in ("token", "group", "tensor") or (reads_all_rows(each) and zero):
                return f"'{each.kind}' per {each.per}"
            if each.heads or (each.per == "group" and not each.scale and not _power(each.size, k)):
                return f"'{each.kind}' per {each.per} of {each.size}"
            large = isinstance(each, RoundInt) and max(abs(each.low), abs(each.high)) > 1 << 15
            return "integers of more than 16 bits" if large else ""
        case RoundMx():
            return "" if _power(each.size, k) else f"groups of {each.size}"
        case RoundNvfp4():
            return "" if _power(each.size, k) else f"groups of {each.size}"
        case RoundFourOverSix():
            return "" if _power(16, k) else f"rows of {k} inputs"
        case LlmInt8():
            return "" if codes else "columns with outliers, behind which no codes are wanted"
    return f"'{each.kind}' has no text"


def _power(size: int, k: int) -> bool:
    """Whether groups of this size are a power of two that a row's tensor holds."""
    return 2 <= size <= 1 << (k - 1).bit_length() and size & (size - 1) == 0
