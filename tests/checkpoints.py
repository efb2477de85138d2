"""The real checkpoints that tests read: where they lie, and what their reference files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
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


# What the logits of a folder are compared with: the first of these that its reference file holds.
EXACT = ("logits_dense_f32", "logits_dense_dequantized", "logits")
ROUNDED = ("logits", "logits_weight_only")
# Methods and variants that round activations: the package's own forward pass says what that gives.
ROUNDING = (
    "bitsandbytes-int8", "bitnet*", "compressed_tensors-float-fp8*", "compressed_tensors-int-w8a8",
    "compressed_tensors-nvfp4", "compressed_tensors-sparse24-fp8", "fbgemm_fp8*", "finegrained_fp8*", "fouroversix*",
    "fp_quant*", "quanto-int8-int8act", "quark-fp8", "quark-int8-w8a8", "quark-mxfp4", "torchao-float8da*",
    "torchao-int8da*", "torchao-mxfp8",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """`weights` float32 by module path (as they act on the module's own input), `input_ids`, and the `logits` that the
    reference file's entry `against` holds: a float32 model with these weights, or the package's own forward pass where
    activations are rounded too."""

    weights: dict[str, torch.Tensor]
    input_ids: torch.Tensor
    logits: torch.Tensor
    against: str


def reference(folder: Path) -> Reference:
    data = load_file(folder / "reference.safetensors")
    weights = {name.removesuffix(".weight"): value.float() for name, value in data.items() if name.endswith(".weight")}
    weights = {name: value for name, value in weights.items() if not name.startswith(("original.", "source."))}
    weights |= {
        name.removesuffix(".weight_unrotated"): value.float()
        for name, value in data.items()
        if name.endswith(".weight_unrotated")
    }
    rounded = any(fnmatch(folder.name, pattern) for pattern in ROUNDING)
    against = next(name for name in (ROUNDED if rounded else EXACT) if name in data)
    return Reference(weights, data["input_ids"], data[against].float(), against)


def config(folder: Path) -> dict[str, object]:
    data: dict[str, object] = json.loads((folder / "config.json").read_text())
    return data
