"""normalise: one form of linear, casts and splits; nothing that does nothing."""

from __future__ import annotations

import torch
from tiny_programs import Call, ops, program, reasons, same
from torch import nn

from qcompile.passes.normalise import Normalise

W, B = torch.randn(8, 6), torch.randn(6)
X = torch.randn(3, 5, 8)


def test_addmm_between_views_is_one_linear() -> None:
    def conv1d(x, w, b):  # the body of transformers' Conv1D
        return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], 6)

    made = program(Call(conv1d, w=W, b=B), X, dynamic={0: "b", 1: "s"})
    ctx = same(made, [Normalise()], [X])
    assert [op for op in ops(made) if "sym_size" not in op] == ["aten.t", "aten.linear"]
    assert ctx.report.passes[0][1] >= 2


def test_mm_and_matmul_with_a_stored_weight_are_linears() -> None:
    made = program(Call(lambda x, w: torch.matmul(x, w) + torch.matmul(x[0], w), w=W), X)
    same(made, [Normalise()], [X])
    assert ops(made).count("aten.linear") == 2 and "aten.matmul" not in ops(made)


def test_a_transposed_weight_is_not_transposed_twice() -> None:
    made = program(Call(lambda x, w: torch.mm(x, w.t()), w=W.t().contiguous()), X[0])
    same(made, [Normalise()], [X[0]])
    assert ops(made) == ["aten.linear"]


def test_baddbmm_with_one_weight_is_a_linear() -> None:
    def batched(x, w, b):
        return torch.baddbmm(b, x, w.unsqueeze(0).expand(3, 8, 6))

    made = program(Call(batched, w=W, b=B), X)
    same(made, [Normalise()], [X])
    assert ops(made) == ["aten.t", "aten.linear"]


def test_matmul_of_two_activations_stays_with_a_reason() -> None:
    made = program(Call(lambda x: torch.matmul(x, x.transpose(1, 2))), X)
    ctx = same(made, [Normalise()], [X])
    assert "aten.matmul" in ops(made)
    assert "the second matrix is not a stored weight" in reasons(ctx)


def test_what_does_nothing_goes() -> None:
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            y = self.dropout(x).detach().to(torch.float32).clone()
            return (y + 0).reshape(3, 5, 8)[:, :, :] * 1

    made = program(Noise(), X)
    same(made, [Normalise()], [X])
    assert ops(made) == []


def test_splits_are_slices() -> None:
    def halves(x):
        a, b = x.chunk(2, dim=-1)
        c, d = x.split([2, 6], dim=-1)
        return a * b + c.sum(-1, keepdim=True) + d.sum(-1, keepdim=True) + x.unbind(0)[1][None, :, :4]

    made = program(Call(halves), X)
    same(made, [Normalise()], [X])
    assert not {"aten.split.Tensor", "aten.chunk", "aten.split_with_sizes", "aten.unbind.int"} & set(ops(made))
    assert ops(made).count("aten.slice.Tensor") == 5 and ops(made).count("aten.select.int") == 1


def test_a_product_over_one_element_is_a_multiplication() -> None:
    def angles(position, inv_freq):
        return (inv_freq[None, :, None] @ position[:, None, :]).transpose(1, 2)

    position = torch.rand(3, 5)
    made = program(Call(angles, inv_freq=torch.rand(4)), position, dynamic={0: "b", 1: "s"})
    same(made, [Normalise()], [position])
    assert "aten.matmul" not in ops(made) and ops(made)[-1] == "aten.mul.Tensor"
