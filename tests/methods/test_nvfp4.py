"""NVFP4 on the fly: the codes and scales of the kernel's formula, a model, and which layers transformers takes."""

from __future__ import annotations

import pytest
import torch
from in_memory import InMemory, linear
from stored_modules import value
from torch import nn

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.methods.nvfp4 import Nvfp4, Nvfp4Config

METHOD, CONFIG = Nvfp4(), Nvfp4Config()
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def sample(n: int, k: int) -> torch.Tensor:
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.1
    made[0, :16], made[1, :16] = 0.0, 1e-9
    return made.bfloat16()


def test_blocks_are_those_of_the_kernel() -> None:
    weight = sample(32, 64)
    packed = METHOD.quantize(CONFIG, linear("fc", 32, 64), weight)
    whole = 448 * 6 / weight.abs().max().float()
    assert torch.allclose(packed.tensors["tensor_scale"], whole)
    blocks = weight.float().reshape(32, 4, 16)
    scale = (blocks.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    assert torch.equal(packed.tensors["scale"].float(), scale.float())
    step = scale.float()[..., None] / whole
    nearest = (blocks / step).abs()[..., None].sub(GRID).abs().argmin(-1)  # the smaller one at ties
    expected = GRID[nearest] * blocks.sign() * step
    got = value(packed).reshape(blocks.shape)
    ties = (blocks / step).abs()[..., None].sub((GRID[1:] + GRID[:-1]) / 2).abs().amin(-1) < 1e-4
    assert torch.allclose(got[~ties & (step > 0)], expected[~ties & (step > 0)]) and ties.float().mean() < 0.05
    assert got[0, 0].eq(0).all() and got[1, 0].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_model(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 24)).eval()
    x = torch.randn(3, 48)
    compiled = qcompile.compile(model, CONFIG, example_inputs=(x,), target=target)
    packed = METHOD.quantize(CONFIG, linear("0", 32, 48), model[0].weight)
    turned = packed.before[1](packed.before[0](x))
    assert (turned - x).norm() <= 0.15 * x.norm() and torch.equal(packed.before[0](x), x.bfloat16().float())
    expected = model[2]((turned @ value(packed).t()).bfloat16().float().relu())
    found = compiled(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected, rtol=1e-2, atol=1e-2)


def test_which_modules() -> None:
    modules = {
        m.path: m
        for m in (
            linear("fc", 32, 64), linear("head", 32, 64, output_embedding=True), linear("with_bias", 32, 64, bias="b"),
            linear("short", 32, 40), linear("narrow", 24, 64), linear("named", 32, 64), linear("f32", 32, 64, keep_f32=True),
        )
    }  # fmt: skip
    source = InMemory({})
    chosen = {p: METHOD.select(CONFIG, m, source, modules) for p, m in modules.items()}
    assert {p: c.reason for p, c in chosen.items() if isinstance(c, Skip)} == {
        "head": "it is the output embedding, and such modules stay dense by default",
        "with_bias": "nvfp4 converts layers without a bias only",
        "short": "its sizes [32, 40] are no multiples of 16",
        "narrow": "its sizes [24, 64] are no multiples of 16",
        "f32": "the architecture keeps it in float32",
    }
    config = Nvfp4Config(modules_to_not_convert=["named"])
    assert METHOD.select(config, modules["named"], source, modules) == Skip("modules_to_not_convert has 'named'")
    assert isinstance(METHOD.select(config, modules["head"], source, modules), Quantized)


def test_there_are_no_checkpoints() -> None:
    found = parse_config(pytest.importorskip("transformers").NVFP4Config(modules_to_not_convert=["a"]))
    assert found is not None and found[1] == Nvfp4Config(["a"])
    with pytest.raises(
        CheckpointError, match="the checkpoint says it is quantized with nvfp4, but holds no such weight"
    ):
        parse_config(None, {"quant_method": "nvfp4"}, InMemory({"fc.weight": sample(32, 64)}))
    packed = METHOD.quantize(CONFIG, linear("fc", 32, 64), sample(32, 64))
    with pytest.raises(ConfigError) as caught:
        METHOD.write(CONFIG, linear("fc", 32, 64), packed)
    assert str(caught.value) == (
        "transformers defines no checkpoint for nvfp4: it quantizes while it loads a float model\n"
        "  where:    fc\n"
        "  expected: a method with a checkpoint\n"
        "  try:      choose compressed-tensors (nvfp4-pack-quantized), torchao or fouroversix to write one"
    )


def test_wrong_values() -> None:
    with pytest.raises(ConfigError) as caught:
        Nvfp4Config.from_dict({"modules_to_not_convert": "lm_head"})
    assert str(caught.value) == (
        "the nvfp4 config has a value out of range\n"
        "  where:    field 'modules_to_not_convert'\n"
        "  found:    'lm_head'\n"
        "  expected: None or a list of module names"
    )
    with pytest.raises(ConfigError, match="unknown field in the nvfp4 config"):
        Nvfp4Config.from_dict({"group_size": 16})
    with pytest.raises(CheckpointError, match="a number that is not finite"):
        METHOD.quantize(CONFIG, linear("fc", 32, 64), sample(32, 64) * torch.nan)
