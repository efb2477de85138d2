"""A real checkpoint compiled: its weights and logits against those that its reference file holds."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

import qcompile

LOGITS = ("logits_dense_dequantized", "logits_dense_f32", "logits_weight_only", "logits")
OTHERS = ("source.", "original.", "probe.")


def agrees(folder: Path, target: str, *, weights: float = 0.0, logits: float = 1e-3) -> None:
    """Asserts the weights within `weights` of the largest one (0: bit for bit), the logits within `logits` by norm."""
    compiled = qcompile.compile(folder, target=target)
    reference = load_file(folder / "reference.safetensors")
    held = [name for name in reference if name.endswith(".weight") and not name.startswith(OTHERS)]
    assert held
    for name in held:
        found, expected = compiled.weight(name.removesuffix(".weight")), reference[name].float()
        assert (found - expected).abs().max() <= weights * expected.abs().max(), name
    expected = reference[next(name for name in LOGITS if name in reference)].float()
    found = compiled(input_ids=reference["input_ids"]).logits
    assert (found - expected).norm() <= logits * expected.norm()
