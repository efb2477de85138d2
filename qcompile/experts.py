"""The linear layers of a mixture of experts as graph operators: every row of x is multiplied by one expert's weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qcompile.ops import Part


@dataclass(frozen=True)
class ExpertsSpec:
    """Everything about a `qcompile.experts` node but its tensors.

    Rows e * n .. (e + 1) * n - 1 of the parts' weights, one below the other, are the weight [n, k] of expert e.
    """

    experts: int
    n: int
    k: int
    parts: tuple[Part, ...]

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> ExpertsSpec:
        data = json.loads(text)
        data["parts"] = tuple(Part(**part) for part in data["parts"])
        return ExpertsSpec(**data)

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
    schema="(Tensor x, Tensor expert, Tensor[] stored, Tensor? bias, str spec) -> Tensor",
)
def experts(x: Tensor, expert: Tensor, stored: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """`experts_linear` with a packed weight: what `ExpertsSpec` says, in float32. Only experts that are asked decode."""
    what = ExpertsSpec.from_text(spec)
    return _each(x, expert, bias, what.n, lambda e: what.weight(stored, e))


@experts.register_fake
def _(x: Tensor, expert: Tensor, stored: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty((x.shape[0], ExpertsSpec.from_text(spec).n))
