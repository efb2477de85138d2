"""The kernel templates of the MLIR backend, by name: each module has `emit(params, target)`, the text of one kernel."""

from __future__ import annotations

from importlib import import_module

from qcompile.artifact import KernelSpec
from qcompile.errors import ArtifactError, near
from qcompile.target import Target

TEMPLATES: dict[str, str] = {
    "activation-int8": "activation_int8",
    "attention": "attention_kernel",
    "attention-combine": "attention_combine",
    "cache-write": "cache_write",
    "embedding": "embedding",
    "gather": "gather",
    "linear-gemm": "linear_gemm",
    "linear-gemv": "linear_gemv",
    "linear-int8-gemm": "linear_int8_gemm",
    "linear-int8-gemv": "linear_int8_gemv",
    "linear-pack": "linear_pack",
    "pointwise": "pointwise",
    "reduce": "reduce",
    "rope": "rope",
    "row-norm": "norm",
}


def emit(spec: KernelSpec, target: Target) -> str:
    """The MLIR text of a kernel, which defines one function called `entry(spec)`; ArtifactError for an unknown template."""
    if spec.template not in TEMPLATES:
        raise ArtifactError(
            "unknown kernel template",
            found=f"{spec.template!r}{near(spec.template, TEMPLATES)}",
            expected=", ".join(sorted(TEMPLATES)),
        )
    module = import_module(f"qcompile.lowering.mlir.{TEMPLATES[spec.template]}")
    text: str = module.emit(spec.params, target)
    return text


def entry(spec: KernelSpec) -> str:
    """The name of the function in the kernel's text."""
    return spec.template.replace("-", "_")
