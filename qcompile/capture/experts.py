"""How transformers' mixtures of experts are made to call `qcompile.experts_linear`, and which tensors their weights are."""

from __future__ import annotations

from typing import Any

import torch

from qcompile import experts as _  # noqa: F401  (the operators must exist before a graph can hold them)
from qcompile.experts_source import PerExpert
from qcompile.program import Module
from qcompile.sources import TensorSource

IMPLEMENTATION = "qcompile"


def is_experts(module: Any) -> bool:
    """True for a module that keeps its experts' weights as parameters of three dimensions and lets us run them."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def weights(module: Any) -> tuple[str, str]:
    """The names of an experts module's two weights: up, and down."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _linear(module: Any, name: str, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    made: torch.Tensor = torch.ops.qcompile.experts_linear(
        x, expert, getattr(module, name), bias, bool(module.is_transposed)
    )
    return made


def _forward(module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """x [T, H], the k experts of each row and their shares [T, k] -> [T, H]."""
    rows, width = x.shape
    k = top_k_index.shape[-1]
    up, down = weights(module)
    expert = top_k_index.reshape(-1)
    each = x.unsqueeze(1).expand(rows, k, width).reshape(-1, width)
    hidden = _linear(module, up, each, expert)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    y = _linear(module, down, hidden, expert)
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.17 knows none
        y = module.post_expert_norm(y)
    return (y * top_k_weights.reshape(-1, 1)).reshape(rows, k, width).sum(1)


def use(model: Any) -> None:
    """Makes every mixture of experts of a transformers model call our operators; doing it again changes nothing."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # an older transformers, which keeps experts as linear layers
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    for module in model.modules():
        if is_experts(module):
            module.config._experts_implementation = IMPLEMENTATION


def expert_modules(model: Any, source: TensorSource) -> dict[str, Module]:
    """The weights of every mixture of experts in `model`, by the path of the parameter."""
    found, there = {}, source.names()
    for path, module in model.named_modules():
        for name in weights(module) if is_experts(module) else ():
            weight, full = getattr(module, name), f"{path}.{name}".lstrip(".")
            n, k = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
            found[full] = Module(
                full, "Experts", n, k, full, f"{full}_bias" if module.has_bias else None,
                source.info(full).dtype if full in there else "f32",
                experts=weight.shape[0], transposed=bool(module.is_transposed),
                parts=source.parts.get(full, ()) if isinstance(source, PerExpert) else (),
            )  # fmt: skip
    return found
