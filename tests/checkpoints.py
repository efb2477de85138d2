"""The real checkpoints that tests read: where they lie, and what their reference files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent / "shared" / "checkpoints"


def folders(*methods: str) -> list[Path]:
    """The checkpoint folders of the given methods, in order; an empty list where there are none on this machine."""
    return sorted(path for method in methods for path in ROOT.glob(f"{method}*") if path.is_dir())


def parametrize(*methods: str) -> pytest.MarkDecorator:
    """Runs a test once a folder (argument `folder`), or skips it, saying so, where the checkpoints are absent."""
    found = folders(*methods)
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no checkpoints of {', '.join(methods)} at {ROOT.name}"))
    return pytest.mark.parametrize("folder", found or [absent], ids=lambda path: getattr(path, "name", "absent"))


@dataclass(frozen=True)
class Reference:
    """`weights` float32 by module path, `input_ids`, and the logits of a float32 model that holds these weights."""

    weights: dict[str, torch.Tensor]
    input_ids: torch.Tensor
    logits: torch.Tensor


def reference(folder: Path) -> Reference:
    data = load_file(folder / "reference.safetensors")
    weights = {name.removesuffix(".weight"): value.float() for name, value in data.items() if name.endswith(".weight")}
    weights = {name: value for name, value in weights.items() if not name.startswith(("original.", "source."))}
    name = next(name for name in ("logits_dense_dequantized", "logits_dense_f32") if name in data)
    return Reference(weights, data["input_ids"], data[name].float())


def config(folder: Path) -> dict[str, object]:
    data: dict[str, object] = json.loads((folder / "config.json").read_text())
    return data
