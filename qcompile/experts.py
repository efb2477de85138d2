"""The linear layers of a mixture of experts as graph operators: every row of x is multiplied by one expert's weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qcompile.ops import ACTIVATIONS, Part


@dataclass(frozen=True)
class Gate:
    """act(gate) * (up + plus): gate and up are the first and the second half of a row, or take turns in it, gate first.

    `act` is one of `ops.ACTIVATIONS`; "silu" is x * sigmoid(alpha * x), the others have an alpha of 1. With a `limit` gate
    is at most that, and up from -limit to limit.
    """

    act: str
    turns: bool = False
    limit: float | None = None
    alpha: float = 1.0
    plus: float = 0.0

    def __call__(self, y: Tensor) -> Tensor:
        """[T, N / 2] from [T, N]."""
        gate, up = (y[:, ::2], y[:, 1::2]) if self.turns else y.chunk(2, 1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        made = ACTIVATIONS[self.act](gate) if self.alpha == 1.0 else gate * torch.sigmoid(gate * self.alpha)
        return made * (up + self.plus)


@dataclass(frozen=True)
class ExpertsSpec:
    """Everything about a `qcompile.experts` node but its tensors.

    Rows e * n .. (e + 1) * n - 1 of the parts' weights, one below the other, are the weight [n, k] of expert e. Each row of x
    is for `each` experts one after another. `gate`, if any, makes n / 2 columns of n. Each row of y is the sum of
    `summed` results one after another, each times its share; 0: each result is a row, and there are no shares.
    """

    experts: int
    n: int
    k: int
    parts: tuple[Part, ...]
    each: int = 1
    gate: Gate | None = None
    summed: int = 0

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> ExpertsSpec:
        data = json.loads(text)
        data["parts"] = tuple(Part(**part) for part in data["parts"])
        data["gate"] = data["gate"] and Gate(**data["gate"])
        return ExpertsSpec(**data)

    @property
    def n_out(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.gate else self.n

    def rows(self, expert: int) -> Iterator[tuple[int, range]]:
        """The places of an expert's weight: the number of a part and rows of it, in order."""
        begin, end, at = expert * self.n, (expert + 1) * self.n, 0
        for number, part in enumerate(self.parts):
            rows = range(max(begin, at) - at, min(end, at + part.n) - at)
            if rows:
                yield number, rows
            at += part.n

    def weight(self, stored: Sequence[Tensor], expert: int) -> Tensor:
        """The weight f32 [n, k] of one expert; `stored` holds the tensors of the parts, one part after another."""
        from qcompile.evaluate import dequantize
        from qcompile.format import format_from_json

        found = []
        for number, rows in self.rows(expert):
            part = self.parts[number]
            first = sum(other.tensors for other in self.parts[:number])
            format_ = format_from_json(part.format)
            names = [item.name for item in format_.stored(part.n, self.k)]
            tensors = dict(zip(names, stored[first : first + part.tensors], strict=True))
            wanted = torch.arange(rows.start, rows.stop, device=stored[0].device)
            found.append(dequantize(format_, tensors, part.n, self.k, wanted))
        return found[0] if len(found) == 1 else torch.cat(found)


def _each(x: Tensor, expert: Tensor, bias: Tensor | None, n: int, weight: object) -> Tensor:
    """y [T, n]: the rows of x of each expert that has any, times `weight(expert)`, plus the expert's bias."""
    assert callable(weight)
    y = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    for number in torch.unique(expert).tolist():
        mine = (expert == number).nonzero().flatten()
        made = x[mine].float() @ weight(number).float().t()
        y[mine] = made if bias is None else made + bias[number].float()
    return y.to(x.dtype)


@torch.library.custom_op(
    "qcompile::experts_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor expert, Tensor weight, Tensor? bias, bool transposed) -> Tensor",
)
def experts_linear(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """y [T, N] from x [T, K]: row t times weight[expert[t]] ([N, K], or [K, N] if `transposed`), plus bias[expert[t]].

    expert i64 [T]; weight [E, N, K] or [E, K, N]; bias [E, N].
    """
    n = weight.shape[2] if transposed else weight.shape[1]
    return _each(x, expert, bias, n, lambda e: weight[e].t() if transposed else weight[e])


@experts_linear.register_fake
def _(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2] if transposed else weight.shape[1]))


@torch.library.custom_op(
    "qcompile::experts",
    mutates_args=(),
    schema="(Tensor x, Tensor expert, Tensor[] stored, Tensor? bias, str spec, Tensor? share=None) -> Tensor",
)
def experts(
    x: Tensor, expert: Tensor, stored: Sequence[Tensor], bias: Tensor | None, spec: str, share: Tensor | None = None
) -> Tensor:
    """`experts_linear` with a packed weight: what `ExpertsSpec` says, in float32. Only experts that are asked decode.

    x [T, K], expert i64 [T * each], bias [E, N], share [T * each / summed, summed] where results are summed.
    """
    what = ExpertsSpec.from_text(spec)
    y = _each(x.repeat_interleave(what.each, 0), expert, bias, what.n, lambda e: what.weight(stored, e))
    y = what.gate(y) if what.gate else y
    return y if share is None else (y.reshape(*share.shape, -1) * share.unsqueeze(2)).sum(1)


@experts.register_fake
def _(
    x: Tensor, expert: Tensor, stored: Sequence[Tensor], bias: Tensor | None, spec: str, share: Tensor | None = None
) -> Tensor:
    rows = expert.shape[0] if share is None else share.shape[0]
    return x.new_empty((rows, ExpertsSpec.from_text(spec).n_out))
