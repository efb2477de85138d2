"""Inputs of every shape: names that Python has too, any number of them, and tensors inside of containers."""

from __future__ import annotations

import torch
from torch import nn

from qcompile.capture import capture

X, ROWS = torch.zeros(3, 8), {0: torch.export.Dim("m", min=1, max=64)}


class Each(nn.Module):
    """One linear layer on every input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, *inputs):
        return tuple(self.layer(x) for x in inputs)


class Inside(nn.Module):
    """Reads one tensor of a dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, input, batch):
        return self.layer(input + batch["x"])


def shapes(model, example, dynamic):
    program = capture(model, example_inputs=example, dynamic_shapes=dynamic)
    assert program.sizes == {"m": (1, 64)}
    return {item.name: item.shape for item in program.inputs}


def test_an_input_called_input():
    assert shapes(nn.Sequential(nn.Linear(8, 4)), (X,), (ROWS,)) == {"input": ("m", 8)}


def test_any_number_of_inputs():
    found = shapes(Each(), (X, X), {"inputs": (ROWS, ROWS)})
    assert found == {"inputs_0": ("m", 8), "inputs_1": ("m", 8)}


def test_a_tensor_in_a_dict():
    found = shapes(Inside(), (X, {"x": X}), {"input": ROWS, "batch": {"x": ROWS}})
    assert found == {"input": ("m", 8), "batch_x": ("m", 8)}
