"""Each architecture is exported once a process: most tests compile the same few tiny models, and half of that is tracing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.capture import huggingface, module

_MADE: dict[str, ExportedProgram] = {}
_EXPORT = module.export


def install() -> None:
    huggingface.export = _once  # type: ignore[attr-defined]


def forget() -> None:
    """For tests of tracing itself."""
    _MADE.clear()


def _once(model: nn.Module, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """As `qcompile.capture.module.export`; a transformers model is traced again where anything differs that tracing sees."""
    key = _key(model, args, kwargs, dynamic_shapes)
    if key not in _MADE:
        _MADE[key] = _EXPORT(model, args, kwargs, dynamic_shapes)
    return _MADE[key]


def _key(model: nn.Module, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any) -> str:
    """A digest of the model's config, modules and tensors (names, sizes, sharing; values where there are any) and of the
    inputs' sizes."""
    inner: Any = model.model if isinstance(model, huggingface.CausalLanguageModel) else model
    hashed = hashlib.sha256()
    settings = (inner.config.to_dict(), inner.config._attn_implementation, dynamic_shapes, module.aliases(model))
    for part in (type(model), type(inner), model, *settings):
        hashed.update(repr(part).encode())
    for tensor in [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]:
        hashed.update(
            f"{tuple(tensor.shape)} {tensor.dtype}".encode() if isinstance(tensor, Tensor) else repr(tensor).encode()
        )
    for buffer in model.buffers():
        if buffer.untyped_storage().nbytes():
            hashed.update(buffer.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
