"""Methods that only read checkpoints, in a whole model of another architecture: biases, grouped heads, odd sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codebook_modules import OUTLIERS, aqlm, vptq
from safetensors.torch import save_file
from spqr_modules import csr, dense, outliers

import qcompile
from qcompile.methods.aqlm import AqlmConfig

IDS = torch.tensor([[3, 50, 8, 13, 21, 34], [11, 7, 7, 64, 98, 0]])
Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor, dict[str, Any]]  # stored tensors, the weight, an entry of the config


def small(weight: torch.Tensor) -> torch.Tensor:
    """What the stored numbers are multiplied by, so that activations stay of a usual size."""
    return 0.2 / weight.std()


def aqlm_module(n: int, k: int) -> Made:
    tensors, weight = aqlm(AqlmConfig(8, 1, 2, 7), n, k)
    factor = torch.exp2(small(weight).log2().round()).half()
    return tensors | {"scales": tensors["scales"] * factor}, weight * factor.float(), {}


def vptq_module(n: int, k: int) -> Made:
    layer, tensors, weight = vptq(OUTLIERS, n, k)
    factor = torch.exp2(small(weight).log2().round()).half()
    scaled = {name: tensors[name] * factor for name in ("weight_scale", "weight_bias")}
    return tensors | scaled, weight * factor.float(), layer


def spqr_module(n: int, k: int) -> Made:
    words, weight = dense(n, k)
    extra = outliers(n, k)
    empty = torch.zeros(0, dtype=torch.int32)
    tensors = {"dense_weights": words, "in_perm": empty, **csr(extra)}
    return tensors, (weight + extra).half().float(), {}


MAKERS: dict[str, tuple[Callable[[int, int], Made], float]] = {
    "aqlm": (aqlm_module, 1e-5),
    "vptq": (vptq_module, 1e-5),
    "spqr": (spqr_module, 1e-3),  # the reference rounds the sums with the outliers to float16
}


def config_of(method: str, entries: dict[str, Any]) -> dict[str, Any]:
    own = {
        "aqlm": {"num_codebooks": 2, "nbits_per_codebook": 7, "linear_weights_not_to_quantize": ["lm_head.weight"]},
        "vptq": {"config_for_layers": entries},
        "spqr": {"modules_to_not_convert": ["lm_head.weight"]},
    }
    return {"quant_method": method, **own[method]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """The folder of a model quantized with a method, and the logits of the float model with the same weights."""
    transformers = pytest.importorskip("transformers")

    def make(method: str) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(5)
        config = transformers.Qwen2Config(
            hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
            vocab_size=99, tie_word_embeddings=False, pad_token_id=0,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config).eval()
        stored, entries = dict[str, torch.Tensor](), {}
        for path, module in list(model.named_modules()):
            if not isinstance(module, torch.nn.Linear) or path == "lm_head":
                continue
            tensors, weight, entry = MAKERS[method][0](*module.weight.shape)
            module.weight.data = weight
            entries[path] = entry
            stored |= {f"{path}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.5)
        rest = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name.removesuffix(".weight") not in entries
        }
        folder = tmp_path_factory.mktemp(method)
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder)
        said = json.loads((folder / "config.json").read_text())
        said["quantization_config"] = config_of(method, entries)
        (folder / "config.json").write_text(json.dumps(said))
        save_file(stored | rest, folder / "model.safetensors")
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=IDS).logits
        return folder, logits

    return make


@pytest.mark.parametrize("method", MAKERS)
def test_a_model_with_biases(method: str, made: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    folder, expected = made(method)
    for target in ("reference",) if method == "aqlm" else ("reference", "cpu"):  # its kernels take long to build
        q = qcompile.compile(folder, target=target)
        assert [row.method for row in q.report.weights.values()].count(method) == 7
        error = (q(input_ids=IDS).logits - expected).norm() / expected.norm()
        assert error < MAKERS[method][1], (target, float(error))
        if target == "reference":
            q.export_checkpoint(tmp_path / "out")
            again = qcompile.compile(tmp_path / "out", target=target)
            assert torch.equal(again(input_ids=IDS).logits, q(input_ids=IDS).logits)
