"""convolutions: linear maps of windows of their input, and why some stay as they are."""

from __future__ import annotations

import pytest
import torch
from tiny_programs import Call, apply, ops, program, reasons, run, same
from torch import nn

from qcompile.passes.convolutions import Convolutions

CASES = {
    "patches": (nn.Conv2d(3, 5, 4, stride=4), (2, 3, 8, 12), {0: "b"}),
    "one axis": (nn.Conv1d(6, 4, 3, padding=1), (2, 6, 11), {0: "b", 2: "s"}),
    "one axis, strided": (nn.Conv1d(6, 4, 3, stride=2, padding=1, bias=False), (2, 6, 11), {0: "b"}),
    "rows and columns apart": (
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 2, 9, 8), {0: "b"},
    ),
    "one element": (nn.Conv2d(4, 3, 1), (2, 4, 3, 5), {2: "s"}),
    "three axes": (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (1, 2, 3, 4, 5), {}),
    "as many places as inputs": (nn.Conv1d(3, 2, 4, padding="same", dilation=3), (2, 3, 15), {0: "b"}),
    "no padding by name": (nn.Conv1d(3, 2, 4, padding="valid"), (2, 3, 15), {0: "b"}),
    "no batch": (nn.Conv2d(3, 2, 2), (3, 5, 6), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_is_a_linear(name: str) -> None:
    module, shape, dynamic = CASES[name]
    x = torch.randn(shape)
    made = program(nn.Sequential(module), x, dynamic=dynamic)
    same(made, [Convolutions()], [x])
    assert not [op for op in ops(made) if "conv" in op] and ops(made).count("aten.linear") == 1
    sizes = next(iter(made.graph.graph.nodes)).meta["val"].shape
    assert all(sizes[axis].node.expr.free_symbols for axis in dynamic)  # no rule of torch has fixed one
    if dynamic:
        x = torch.randn([size + 4 if axis in dynamic else size for axis, size in enumerate(shape)])
        torch.testing.assert_close(run(made, x), module(x), rtol=1e-5, atol=1e-5)


def test_its_weight_has_a_record() -> None:
    module = nn.Sequential(nn.Conv1d(6, 4, 3).half().float())
    made = program(module, torch.randn(2, 6, 9))
    apply(made, Convolutions())
    record = made.weights["0"]
    held = made.tensors[record.tensors["weight"]]
    assert record.origin is not None and (record.n, record.k) == tuple(held.shape) == (4, 18)
    assert torch.equal(record.origin.module.unflattened(held), module[0].weight)
    assert made.report.weights["0"].reason == "a convolution, which methods leave as it is"
    assert "0.weight" not in made.tensors


def test_an_activation_follows_the_linear() -> None:
    class Two(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(self[1](nn.functional.gelu(self[0](x), approximate="tanh"))).permute(0, 2, 1)

    made = program(Two(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3)), x := torch.randn(2, 3, 9))
    same(made, [Convolutions()], [x])
    found = ops(made)
    assert [found[i + 1] for i, op in enumerate(found) if op == "aten.linear"] == ["aten.gelu", "aten.gelu"]


def test_a_weight_that_two_calls_share_is_stored_once() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[0](self[0](x))

    made = program(Twice(nn.Conv1d(4, 4, 3)), x := torch.randn(2, 4, 9))
    same(made, [Convolutions()], [x])
    assert len(made.weights) == 1 and sorted(made.tensors) == ["0.bias", "0.packed"]


def test_what_stays_a_convolution_says_why() -> None:
    made = program(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), x := torch.randn(2, 4, 9))
    ctx = same(made, [Convolutions()], [x])
    assert "aten.conv1d" in ops(made) and reasons(ctx) == ["a convolution of 2 groups"]
    made = program(Call(lambda x, w: nn.functional.conv1d(x, w + 1), w=torch.randn(5, 4, 3)), x)
    ctx = same(made, [Convolutions()], [x])
    assert "aten.conv1d" in ops(made) and reasons(ctx) == ["the weight is not a tensor of the source"]
