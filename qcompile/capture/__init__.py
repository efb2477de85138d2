"""From a model to a Program: torch.export of the float architecture, with no weight in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.capture.module import capture_module
from qcompile.errors import CheckpointError, ConfigError
from qcompile.program import Program

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def capture(
    model: nn.Module | str | os.PathLike[str],
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """The graph of `model` in float32, and where its tensors come from.

    `model` is a module, a transformers model, a folder with config.json and safetensors, the id of one on the Hub, or a
    .gguf file. `example_inputs` (positional or by name) and `dynamic_shapes` (as in torch.export; the names of its Dims
    become the names of the sizes) are needed for modules that are not transformers models; without `dynamic_shapes`
    every size is fixed. Causal language models take `input_ids` and `position_ids` [b, s] and `keep` [t], the positions
    whose logits [b, t, vocabulary] are wanted. The model is not changed, and code beside a checkpoint never runs.
    Errors: CaptureError when the model cannot be exported, CheckpointError when its files are damaged or incomplete.
    """
    if isinstance(example_inputs, torch.Tensor | str):
        raise ConfigError(
            "example_inputs are several inputs", where="example_inputs", found=type(example_inputs).__name__,
            expected="a tuple, or a dict by name", remedy="for a single input, pass example_inputs=(tensor,)",
        )  # fmt: skip
    if isinstance(model, nn.Module):
        if any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
            from qcompile.capture.huggingface import capture_model

            return capture_model(model, example_inputs, dynamic_shapes)
        if example_inputs is not None:
            return capture_module(model, example_inputs, dynamic_shapes)
        raise ConfigError(
            "example_inputs are needed to export a module",
            where=type(model).__name__,
            remedy="pass example_inputs=(tensor, ...) and dynamic_shapes, as for torch.export",
        )
    if not isinstance(model, str | os.PathLike):
        expected = "an nn.Module, a folder, a .gguf file, or the id of a model on the Hub"
        raise ConfigError("this is not a model", found=type(model).__name__, expected=expected)
    if example_inputs is not None or dynamic_shapes is not None:
        remedy = "leave them out: the inputs of a checkpoint's architecture are known"
        raise ConfigError("example_inputs and dynamic_shapes are for modules", where=str(model), remedy=remedy)
    path = Path(model)
    if path.suffix == ".gguf":
        from qcompile.capture.gguf import capture_gguf

        return capture_gguf(path)
    if path.is_file():
        raise CheckpointError(
            "a model is a folder, or a single .gguf file", where=str(path), found=f"a file {path.suffix}".strip(),
            expected="a folder with config.json and safetensors", remedy=f"pass the folder: {path.parent}",
        )  # fmt: skip
    from qcompile.capture.huggingface import capture_folder

    return capture_folder(path if str(model) and path.is_dir() else _from_hub(str(model)))


def _from_hub(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        expected = "a folder, a .gguf file, or the id of a model on the Hub"
        raise CheckpointError("there is no such model", found=name, expected=expected)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise CheckpointError(
            "the model is no folder here and cannot be downloaded",
            where=name,
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__,
            remedy="check the name and the network, or pass the path of a folder",
        ) from error
