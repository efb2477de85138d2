"""Every real checkpoint on every target that runs here: `PYTHONPATH=tests python -m conformance --write docs/conformance.md`.

Each folder is compiled and compared with what the real package made of it: weights, then logits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from checkpoints import folders, reference

import qcompile

TARGETS = ("reference", "cpu")


@dataclass(frozen=True)
class Bound:
    """How far a folder may be from its reference, and why: `weights` as a share of the largest weight (0: bit for bit),
    `logits` as a share of the reference's norm."""

    weights: float = 0.0
    logits: float = 1e-3
    reason: str = ""


BFLOAT = "the reference rounds to bf16 between layers, which flips codes of activations; single layers agree to 3e-3"

FOUR_BITS = (
    "the reference rounds to bf16 between layers, which flips codes of 4-bit activations (they move the logits by 0.13 to "
    "0.23); single layers agree to 3e-4, and a float32 model of such layers to 1e-4. Weights: the tensor's scale "
    "multiplies first in lanes, and FP-Quant's rotation back adds in float64"
)

# The first pattern that fits a folder's name holds.
BOUNDS: tuple[tuple[str, Bound], ...] = (
    ("awq-gemv_fast", Bound(1e-3, 2e-3, "the file stores scale * zero rounded to f16; the reference was made without")),
    ("bitsandbytes-int8", Bound(0.0, 1e-2, "activations are rounded to int8: single codes flip")),
    ("bitnet-autobitlinear-online", Bound(2e-7, 1e-3, "the mean of |W| is summed in another order")),
    ("finegrained_fp8*", Bound(0.0, 5e-2, BFLOAT)),
    ("fbgemm_fp8*", Bound(0.0, 5e-2, BFLOAT)),
    ("higgs-4bit-p1-bf16", Bound(1e-15, 1e-3, "the rotation back, in float64, adds in another order")),
    ("quark-fp8", Bound(0.0, 5e-2, BFLOAT)),
    ("compressed_tensors-float-fp8-[bd]*", Bound(0.0, 6e-2, BFLOAT)),
    ("compressed_tensors-nvfp4", Bound(0.0, 0.15, FOUR_BITS)),
    ("fouroversix*", Bound(1e-7, 0.2, f"scales are one float32 rounding apart on cpu; {FOUR_BITS}")),
    ("fp_quant*", Bound(2e-7, 0.2, f"undoing the rotation rounds to float32; {FOUR_BITS}")),
    ("fouroversix*", Bound(2e-7, 0.2, FOUR_BITS)),
    ("fp_quant*", Bound(2e-7, 0.2, FOUR_BITS)),
    ("torchao-float8da*", Bound(0.0, 6e-2, BFLOAT)),
    ("torchao-mxfp8", Bound(0.0, 6e-2, BFLOAT)),
    (
        "torchao-int8da-int8w",
        Bound(0.0, 2e-2, "a row's largest input, where negative, lies between two codes: its last bit takes one"),
    ),
    ("*", Bound()),
)


def bound(folder: Path) -> Bound:
    return next(found for pattern, found in BOUNDS if fnmatch(folder.name, pattern))


@dataclass(frozen=True)
class Row:
    """What came out: the largest difference of a weight and of the logits, and how many operators had no kernel."""

    folder: str
    method: str
    target: str
    modules: int
    weights: float
    logits: float
    against: str
    fallbacks: int

    def within(self, limit: Bound) -> bool:
        return self.weights <= limit.weights and self.logits <= limit.logits


def measure(folder: Path, target: str) -> Row:
    """Compile the folder for the target and compare it with its reference."""
    compiled = qcompile.compile(folder, target=target)
    expected = reference(folder)
    furthest = 0.0
    for path, weight in expected.weights.items():
        found = compiled.weight(path)
        if found.shape != weight.shape:
            raise AssertionError(f"{path} is {list(found.shape)}, the reference {list(weight.shape)}")
        if not torch.equal(found, weight):
            furthest = max(furthest, float((found - weight).abs().max() / weight.abs().max()))
    logits = compiled(input_ids=expected.input_ids).logits
    error = float((logits - expected.logits).norm() / expected.logits.norm())
    report = compiled.report
    return Row(
        folder.name, report.method, target, len(expected.weights), furthest, error, expected.against,
        len(report.fallbacks),
    )  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The rows as a page."""
    lines = [
        "# Conformance",
        "",
        "Every checkpoint that the real packages wrote for these tests, compiled for each target and compared with what the",
        "package itself makes of it. Weights: the largest difference as a share of the largest weight, or *exact* when every",
        "float32 bit is equal. Logits: the norm of the difference as a share of the reference's, against the reference file's",
        "entry named beside it. Made by `PYTHONPATH=tests python -m conformance --write docs/conformance.md`.",
        "",
        "| checkpoint | method | target | modules | weights | logits | against | no kernel | a bound of its own, and why |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for row in rows:
        limit = bound(Path(row.folder))
        why = f"{limit.reason} (weights {limit.weights:.0e}, logits {limit.logits:.0e})" if limit.reason else ""
        weights = f"{row.weights:.1e}" if row.weights else "exact"
        cells = (
            row.folder, row.method, row.target, str(row.modules), weights, f"{row.logits:.1e}", row.against,
            str(row.fallbacks), why,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="folders, such as gptq*")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page")
    options = parser.parse_args()
    rows = []
    for folder in folders(""):
        if not any(fnmatch(folder.name, pattern) for pattern in options.patterns):
            continue
        for target in TARGETS:
            try:
                rows.append(measure(folder, target))
            except Exception as error:
                if options.write is not None:
                    raise
                print(f"FAILED  {folder.name} {target}: {' '.join(str(error).split())[:160]}")
                continue
            verdict = "ok" if rows[-1].within(bound(folder)) else "TOO FAR"
            print(f"{verdict:8}{rows[-1]}")
    if options.write is not None:
        options.write.write_text(markdown(rows))


if __name__ == "__main__":
    main()
