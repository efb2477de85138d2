"""How transformers' models are called when nobody says: example inputs, and which of their sizes may change."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.export import Dim

from qcompile.capture.module import MOST
from qcompile.errors import CaptureError

MAX_BATCH = 65_536


def positions(config: Any) -> int:
    """The greatest number of positions that a model has been made for."""
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return most if isinstance(most, int) and most > 0 else MOST


def without_cache(shell: Any) -> None:
    """Makes every part of a model return no cache.

    The parts of a model may have configs of their own, as T5's decoder has.
    """
    for module in shell.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False


def usual_inputs(shell: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Example inputs of a model that is no decoder, by its main input, and their dynamic shapes."""
    config, accepted = shell.config, inspect.signature(shell.forward).parameters
    b, main = Dim("b", min=1, max=MAX_BATCH), shell.main_input_name
    inputs: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    size, bands = getattr(config, "image_size", None), getattr(config, "num_mel_bins", None)
    if main == "input_ids":
        s = Dim("s", min=1, max=positions(config))
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
        if getattr(config, "type_vocab_size", 1) < 1 and "token_type_ids" in names:
            names.remove("token_type_ids")
        inputs = {name: torch.ones(2, 7, dtype=torch.int64) for name in names}
        shapes = {name: {0: b, 1: s} for name in names}
    elif main == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        inputs, shapes = {main: torch.zeros(2, config.num_channels, height, width)}, {main: {0: b}}
    elif main == "input_features" and bands is not None and hasattr(config, "max_source_positions"):
        # Two steps of the spectrogram become one position.
        inputs, shapes = {main: torch.zeros(2, bands, 2 * config.max_source_positions)}, {main: {0: b}}
    else:
        raise CaptureError(
            f"the inputs of {type(shell).__name__} are not known",
            where=type(shell).__name__,
            found=f"main input {main}",
            expected="input_ids, pixel_values or input_features",
            remedy="load the model and pass example_inputs and dynamic_shapes",
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        most = getattr(config, "max_target_positions", None) or positions(config)
        inputs["decoder_input_ids"] = torch.ones(2, 5, dtype=torch.int64)
        shapes["decoder_input_ids"] = {0: b, 1: Dim("t", min=1, max=most)}
    return inputs, shapes
