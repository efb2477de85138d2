"""qcompile inside of transformers' `from_pretrained`: importing this module registers the quant_method "qcompile"."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcompile.capture.module import weight_modules
from qcompile.errors import ConfigError
from qcompile.format import Packed
from qcompile.methods.base import Skip
from qcompile.methods.index import parse_config
from qcompile.ops import LinearSpec, Part
from qcompile.sources import ModuleState
from qcompile.transform import Applied

NAME = "qcompile"


class QuantizedLinear(nn.Module):
    """A linear layer whose weight stays packed: y = x W^T + bias by qcompile's operators, in x's dtype, on any device."""

    def __init__(self, packed: Packed, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = packed.K, packed.N
        for name, tensor in packed.tensors.items():
            self.register_buffer(f"packed_{name}", tensor)
        self._stored = [f"packed_{s.name}" for s in packed.format.stored(packed.N, packed.K)]
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        part = Part(packed.format.to_json(), packed.N, len(self._stored))
        self.spec = LinearSpec(packed.K, (part,), bias is not None).to_text()
        self._before = [self._hold("before", i, each) for i, each in enumerate(packed.before)]
        self._after = [self._hold("after", i, each) for i, each in enumerate(packed.after)]
        self._residual = None if packed.residual is None else self._hold("residual", 0, packed.residual)

    def _hold(self, place: str, number: int, applied: Applied) -> tuple[list[str], str]:
        names = [f"{place}_{number}_{name}" for name in applied.tensors]
        for name, tensor in zip(names, applied.tensors.values(), strict=True):
            self.register_buffer(name, tensor)
        return names, json.dumps(applied.transform.to_json())

    def _transform(self, x: Tensor, held: tuple[list[str], str]) -> Tensor:
        made: Tensor = torch.ops.qcompile.transform(x, [self.get_buffer(name) for name in held[0]], held[1])
        return made

    def forward(self, x: Tensor) -> Tensor:
        for each in self._before:
            x = self._transform(x, each)
        stored = [self.get_buffer(name) for name in self._stored]
        y: Tensor = torch.ops.qcompile.linear(x, stored, [] if self.bias is None else [self.bias], self.spec)
        if self._residual is not None:
            y = y + self._transform(x, self._residual)
        for each in self._after:
            y = self._transform(y, each)
        return y

    def extra_repr(self) -> str:
        parts = LinearSpec.from_text(self.spec).parts
        return f"in_features={self.in_features}, out_features={self.out_features}, format={parts[0].format}"


def quantize_(model: nn.Module, config: Any) -> list[str]:
    """Replace the linears of a float model that `config` quantizes by `QuantizedLinear`s, in place; their paths.

    ConfigError and CheckpointError as for `qcompile.compile`.
    """
    chosen = parse_config(config)
    if chosen is None:
        raise ConfigError("there is no quantization config", found="None", expected="a config of any method")
    method, parsed = chosen
    source = ModuleState(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = weight_modules(model, source, head)
    made = []
    for path, module in modules.items():
        selected = method.select(parsed, module, source, modules)
        layer = model.get_submodule(path)
        if isinstance(selected, Skip) or module.kind == "Embedding":
            continue
        weight = source.read(module.weight)
        weight = weight.t().contiguous() if module.kind == "Conv1D" else weight
        packed = method.quantize(parsed, module, weight)
        packed.check(path)
        bias = getattr(layer, "bias", None) if packed.bias is None else packed.bias
        model.set_submodule(path, QuantizedLinear(packed, None if bias is None else bias.detach()))
        made.append(path)
    return made


@register_quantization_config(NAME)
class QCompileConfig(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=QCompileConfig(config))` keeps the linears packed, computed by qcompile.

    `config` is the config of any method that quantizes on the fly: a transformers config, its dict or JSON, or ours.
    """

    def __init__(self, config: Any = None, **unknown: Any):
        self.quant_method: Any = NAME
        for name in unknown.keys() - {"quant_method"}:
            raise ConfigError("unknown field in the qcompile config", found=repr(name), expected="config")
        chosen = parse_config(config)
        if chosen is None:
            raise ConfigError("there is no quantization config", found="None", expected="a config of any method")
        self.config = chosen[1].to_dict()


@register_quantizer(NAME)
class QCompileQuantizer(HfQuantizer):
    """Replaces linears when the float weights are loaded."""

    requires_calibration = False

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = self.quantization_config
        quantize_(model, config.config)
        return model

    def is_serializable(self) -> bool:
        """No: `qcompile.compile` makes artifacts and checkpoints."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False
