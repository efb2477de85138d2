"""Compiled tiny models, made once a process, and the eager float models that hold exactly their weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import tiny_models
import torch

import qcompile
from qcompile.runtime.model import CompiledModel

CONFIGS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
}


@functools.cache
def compiled(name: str, config: str, target: str = "cpu", accuracy: str = "exact") -> CompiledModel:
    """The tiny decoder `name` under a config of CONFIGS."""
    return qcompile.compile(tiny_models.decoder(name), CONFIGS[config], target=target, accuracy=accuracy)


def with_weights_of(model: Any, q: CompiledModel) -> Any:
    """A float32 copy of `model` whose weights are those that `q` stores, dequantized."""
    model = torch.nn.Module.float(copy.deepcopy(model)).eval()  # models read from GGUF refuse their own float()
    layers = q.artifact.weights.keys() - {part for mixture in q.artifact.mixtures.values() for part in mixture.parts}
    for path in q.artifact.mixtures:
        owner, weight = model.get_submodule(path.rpartition(".")[0]), q.weight(path)
        model.get_parameter(path).data = weight.transpose(1, 2).contiguous() if owner.is_transposed else weight
    for path in q.artifact.weights:
        if path not in layers:
            continue
        module, weight = model.get_submodule(path), q.weight(path)
        # Conv1D keeps its weight as [K, N]. A new parameter: an embedding tied to the old one keeps its own values.
        module.weight = torch.nn.Parameter(weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight)
    return model


@functools.cache
def eager(name: str, config: str, target: str = "cpu") -> Any:
    """The eager model that `compiled(name, config, target)` must agree with."""
    return with_weights_of(tiny_models.decoder(name), compiled(name, config, target))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference, in parts of the greatest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 101, shape, generator=torch.Generator().manual_seed(seed))
