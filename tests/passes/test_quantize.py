"""quantize, read-parameters, fuse-dequantize and choose-layout: the way of a weight through the graph."""

from __future__ import annotations

import pytest
import torch
from tiny_programs import Call, apply, ops, program, reasons, run, same
from torch import nn

from qcompile.backend import CpuBackend
from qcompile.errors import CheckpointError
from qcompile.evaluate import dequantize
from qcompile.format import Packed, format_from_json
from qcompile.formats.dense import Dense
from qcompile.methods.base import Quantized
from qcompile.methods.eetq import Eetq
from qcompile.methods.index import parse_config
from qcompile.passes.account_for_weights import AccountForWeights
from qcompile.passes.base import Context
from qcompile.passes.choose_layout import ChooseLayout
from qcompile.passes.fuse_dequantize import FuseDequantize
from qcompile.passes.linears import linears
from qcompile.passes.normalise import Normalise
from qcompile.passes.quantize import Quantize
from qcompile.passes.read_parameters import ReadParameters
from qcompile.transform import Applied
from qcompile.transforms.round_int import RoundInt

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
IDS = torch.randint(0, 32, (2, 5))


class Tiny(nn.Module):
    """An embedding, a layer and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(self.embed(ids))))


def with_config(made, config) -> Context:
    ctx = Context(made.report, CpuBackend())
    found = parse_config(config)
    assert found is not None
    ctx.method, ctx.config = found
    return ctx


def module_weight(made, path: str) -> torch.Tensor:
    record = made.weights[path]
    tensors = {name: made.tensors[tensor] for name, tensor in record.tensors.items()}
    weight = dequantize(format_from_json(record.format), tensors, record.n, record.k)
    weight = weight[record.row : record.row + record.rows]
    if record.order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, made.tensors[record.order], weight)


def test_without_a_config_every_weight_is_dense_and_says_why() -> None:
    made = program(Tiny(), IDS)
    ctx = same(made, [Normalise(), Quantize()], [IDS])
    assert ops(made) == [
        "qcompile.embedding", "qcompile.dequantize", "aten.linear", "aten.tanh", "qcompile.dequantize", "aten.linear",
    ]  # fmt: skip
    assert [row.reason for row in ctx.report.weights.values()] == [
        "no quantization was asked for", "no quantization was asked for",
        "no quantization was asked for; stored once, with embed",
    ]  # fmt: skip
    assert ctx.report.passes[-1] == ("quantize", 3)


def test_a_shared_weight_is_stored_once() -> None:
    made = program(Tiny(), IDS)
    apply(made, Normalise(), Quantize())
    assert made.weights["embed"].tensors == made.weights["head"].tensors
    assert sum(t.shape == (32, 64) for t in made.tensors.values()) == 1


def test_a_method_decides_for_each_module() -> None:
    made = program(Tiny(), IDS)
    model = Tiny()
    ctx = apply(made, Normalise(), Quantize(), ctx=with_config(made, NF4))
    rows = ctx.report.weights
    assert rows["layer"].format == "bnb4" and rows["layer"].method == "bitsandbytes" and rows["layer"].reason == ""
    assert rows["embed"].method == "none" and rows["embed"].reason
    error = (module_weight(made, "layer") - model.layer.weight).abs().max()
    assert 0 < error < 0.02


def test_the_packed_weight_is_read_inside_the_linear() -> None:
    made = program(Tiny(), IDS)
    ctx = with_config(made, NF4)
    apply(made, Normalise(), Quantize(), ctx=ctx)
    before = run(made, IDS)
    apply(made, FuseDequantize(), ctx=ctx)
    assert ops(made) == ["qcompile.embedding", "qcompile.linear", "aten.tanh", "qcompile.linear"]
    assert ctx.report.passes[-1] == ("fuse-dequantize", 2)
    torch.testing.assert_close(run(made, IDS), before)


def test_a_linear_of_a_computed_weight_is_refused_with_its_reason() -> None:
    made = program(Call(lambda x, w: nn.functional.linear(x, torch.tanh(w)), w=torch.randn(4, 8)), torch.randn(3, 8))
    ctx = apply(made, Normalise(), Quantize(), FuseDequantize())
    assert ops(made) == ["aten.tanh", "aten.linear"]
    assert reasons(ctx) == ["expected qcompile.dequantize, found aten.tanh (tanh_default)"]


@pytest.mark.parametrize("backend", [CpuBackend("exact"), CpuBackend("int8")])
def test_layouts_keep_every_value(backend: CpuBackend) -> None:
    made = program(Tiny(), IDS)
    ctx = with_config(made, NF4)
    ctx.backend = backend
    apply(made, Normalise(), Quantize(), FuseDequantize(), ctx=ctx)
    before, weights = run(made, IDS), {path: module_weight(made, path) for path in made.weights}
    apply(made, ChooseLayout(), ctx=ctx)
    assert ctx.report.passes[-1] == ("choose-layout", 2)
    assert {path: row.layout for path, row in ctx.report.weights.items()} == {
        "embed": "lanes-dense", "layer": "lanes", "head": "lanes-dense",
    }  # fmt: skip
    for path, weight in weights.items():
        assert torch.equal(module_weight(made, path), weight), path
    assert [linear.spec.accuracy for linear in linears(made)] == [backend.wanted, "exact"]
    if backend.wanted == "exact":
        torch.testing.assert_close(run(made, IDS), before)
    else:
        assert 0 < (run(made, IDS) - before).pow(2).mean() < 1e-4 * before.pow(2).mean()
    assert ctx.report.weights["layer"].bytes == 64 * 64 // 2 + 64 * 4
    assert ctx.report.weights["head"].bytes == 0 and "stored once, with embed" in ctx.report.weights["head"].reason


def test_a_layout_that_is_declined_says_why() -> None:
    made = program(nn.Sequential(nn.Linear(64, 48)), torch.randn(2, 64))
    ctx = with_config(made, {"quant_method": "hqq", "quant_config": {"weight_quant_params": {
        "nbits": 4, "group_size": 16, "axis": 0, "channel_wise": True, "optimize": False, "view_as_float": False, "round_zero": True}}})  # fmt: skip  # noqa: E501
    apply(made, Normalise(), Quantize(), FuseDequantize(), ChooseLayout(), ctx=ctx)
    row = ctx.report.weights["0"]
    assert row.format == row.layout == "hqq" and "share a scale" in row.reason


def test_parameters_are_read_from_the_source() -> None:
    made = program(Tiny(), IDS)
    held = made.tensors["layer.bias"].clone()
    made.tensors["layer.bias"] = held.to("meta")
    ctx = apply(made, ReadParameters())
    assert ctx.report.passes[-1] == ("read-parameters", 1)
    assert torch.equal(made.tensors["layer.bias"], held)
    assert "layer.bias" in made.ledger.claims


def test_a_tensor_that_nothing_uses_is_an_error_by_name() -> None:
    model = Tiny()
    model.register_buffer("stray", torch.zeros(3))
    made = program(model, IDS)
    apply(made, Normalise(), Quantize())
    for name in ("layer.bias",):
        made.ledger.claim(name, name)
    with pytest.raises(CheckpointError, match="stray: not used"):
        apply(made, AccountForWeights())


class Halves(Eetq):
    """A method that stores every weight as float16, and rounds the inputs of linears alone."""

    def select(self, config, module, source, modules):
        return Quantized(Dense("f16"))

    def quantize(self, config, module, weight):
        before = () if module.kind == "Embedding" else (Applied(RoundInt()),)
        return Packed(Dense("f16"), {"weight": weight.half()}, module.n, module.k, before)


def test_what_happens_around_a_tied_weight_is_each_modules_own() -> None:
    made = program(Tiny(), IDS)
    ctx = Context(made.report, CpuBackend(), Halves(), Halves.Config())
    apply(made, Normalise(), Quantize(), ctx=ctx)
    assert ops(made).count("qcompile.transform") == 2
    assert [row.around for row in ctx.report.weights.values()] == ["", "int8 per token", "int8 per token"]
