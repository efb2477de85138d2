"""Outliers of a weight on CUDA: numbers sorted by row, added in order."""

from __future__ import annotations

import json

import torch
from gpu.triton_lowered import Interpreted, program_of

from qcompile.backend import CudaBackend
from qcompile.passes.base import Context
from qcompile.passes.decompose import Decompose
from qcompile.transforms.sparse import Sparse


def test_a_sparse_part_is_one_kernel_whatever_the_order_of_its_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.where(torch.rand(19, 70, generator=generator) < 0.2, torch.randn(19, 70, generator=generator), 0.0)
    dense[4], dense[7] = 0, torch.arange(70) + 1
    places = dense.nonzero()[torch.randperm(int((dense != 0).sum()), generator=generator)]
    number = dense[places[:, 0], places[:, 1]].half()
    text = json.dumps(Sparse(19, len(number)).to_json())

    def function(x, row, column, number):
        return torch.ops.qcompile.transform.default(x, [row, column, number], text)

    x = torch.randn(2, 3, 70, generator=generator)
    program = program_of(function, x, places[:, 0].int(), places[:, 1].int(), number)
    names = ("row", "column", "number")
    for name, tensor in zip(names, (*places.T.int(), number), strict=True):
        (given,) = [node for node in program.graph.graph.find_nodes(op="placeholder") if node.name == name]
        with program.graph.graph.inserting_before(given):
            setattr(program.graph, f"{name}_tensor", tensor)
            held = program.graph.graph.get_attr(f"{name}_tensor")
        held.meta = {"val": given.meta["val"], "tensor": name}
        given.replace_all_uses_with(held)
        program.graph.graph.erase_node(given)
        program.tensors[name] = tensor
    program.inputs = program.inputs[:1]
    assert Decompose().run(program, Context(program.report, CudaBackend())) == 0
    made = Interpreted(program)
    expected = x @ torch.zeros(19, 70).index_put(tuple(places.T), number.float()).T
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-4)
    assert made.kernels == ["sparse"]
