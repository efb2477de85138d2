"""What a method does to the input of a linear: a part of the linear where the backend's kernels can, else operators."""

from __future__ import annotations

import json

import torch
from tiny_programs import Call, ops, program, reasons, same
from torch.nn import functional

from qcompile.backend import CpuBackend, CudaBackend
from qcompile.passes.choose_layout import ChooseLayout
from qcompile.passes.decompose import Decompose
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.linears import linears
from qcompile.passes.merge_linears import MergeLinears
from qcompile.passes.normalise import Normalise
from qcompile.passes.quantize import Quantize
from qcompile.transforms.linear import Hadamard
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_int import RoundInt

PASSES = (Normalise(), Quantize(), FuseDequantize(), Decompose(), ChooseLayout(), MergeLinears())
X = torch.randn(2, 5, 32)
STATIC = json.dumps(RoundInt(per="tensor", scale="f32").to_json())


def treated(function, backend, **parameters):
    made = program(Call(function, **parameters), X)
    return made, same(made, PASSES, (X,), backend=backend)


def transform(x, each, *stored):
    return torch.ops.qcompile.transform(x, list(stored), each if isinstance(each, str) else json.dumps(each.to_json()))


def test_a_linear_takes_in_what_happens_to_its_input() -> None:
    def chain(x, w):
        return functional.linear(transform(transform(x, Hadamard(8)), RoundInt()), w)

    made, ctx = treated(chain, CudaBackend(), w=torch.randn(24, 32))
    assert dict(ctx.report.passes)["decompose"] == 2 and ops(made) == ["qcompile.linear"]
    assert [each["kind"] for each in linears(made)[0].spec.before] == ["hadamard", "round-int"]
    made, ctx = treated(chain, CpuBackend(), w=torch.randn(24, 32))
    assert not linears(made)[0].spec.before and "aten.round" in ops(made)
    assert reasons(ctx) == ["its weight is no integers times a scale"]


def test_the_first_transform_without_a_kernel_ends_the_chain() -> None:
    def chain(x, w):
        turned = transform(transform(x, LlmInt8(1.0)), Hadamard(16))
        return functional.linear(transform(turned, RoundInt()), w)

    made, ctx = treated(chain, CudaBackend(), w=torch.randn(24, 32))
    assert [each["kind"] for each in linears(made)[0].spec.before] == ["hadamard", "round-int"]
    (reason,) = reasons(ctx)
    assert reason == "'llm-int8', which depends on all rows of a call, in front of another transform"


def test_linears_that_treat_their_input_alike_become_one() -> None:
    def two(x, v, w, scale, other):
        left = functional.linear(transform(x, STATIC, scale), v)
        return torch.cat([left, functional.linear(transform(x, STATIC, other), w)], -1)

    given = {"v": torch.randn(16, 32), "w": torch.randn(16, 32), "scale": torch.tensor([0.1])}

    def alike(x, v, w, scale):
        return two(x, v, w, scale, scale)

    made, ctx = treated(alike, CudaBackend(), **given)
    assert dict(ctx.report.passes)["merge-linears"] == 1 and len(linears(made)) == 1
    made, ctx = treated(two, CudaBackend(), **given, other=torch.tensor([0.2]))
    assert dict(ctx.report.passes)["merge-linears"] == 0 and len(linears(made)) == 2
