"""A small artifact in every respect complete, for tests that write, damage and load one."""

from __future__ import annotations

import dataclasses

import small_programs as small
import torch

from qcompile.artifact import Artifact, Buffer, Graph, GraphNode, WeightRecord
from qcompile.runtime.store import Contents

N, K = 2, 4


def arithmetic_graph() -> Graph:
    """The same function as `small_programs.arithmetic`."""
    return Graph(
        inputs=(Buffer("x", "f32", ("b", K), "input"),),
        states=(),
        nodes=(
            GraphNode("t1", "aten.add.Tensor", ({"node": "x"}, {"tensor": "w"})),
            GraphNode("t2", "aten.mul.Tensor", ({"node": "t1"}, {"node": "x"})),
            GraphNode("t3", "aten.add.Tensor", ({"node": "t2"}, {"node": "t1"}), {"alpha": 1}),
        ),
        outputs={"y": {"node": "t3"}},
    )


def contents(**changes) -> Contents:
    program = small.arithmetic()
    w = torch.arange(8.0).view(N, K)
    artifact = Artifact(
        target="cpu:test",
        kind="module",
        executable=program,
        graph=arithmetic_graph(),
        sizes={"b": (1, 8)},
        weights={"lin": WeightRecord({"kind": "dense", "dtype": "f32"}, {"weight": "w"}, N, K, 0, N)},
    )
    built = small.kernels()
    made = Contents(
        artifact=dataclasses.replace(artifact, **changes),
        tensors={"w": w},
        kernels={name: built[name] for name in program.kernels},
        report={"notes": ["one", 2, None]},
        snapshots={"quantize": "graph one\n", "fuse-dequantize": "graph two\n"},
    )
    return made
