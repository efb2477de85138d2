"""The kernel templates of the MLIR backend, by name; `emit` of a module gives a text."""

from __future__ import annotations

from qcompile.artifact import Extents, KernelSpec
from qcompile.lowering.templates import Templates
from qcompile.target import Target

TEMPLATES: dict[str, str] = {
    "activation-int8": "activation_int8",
    "attention": "attention_kernel",
    "attention-combine": "attention_combine",
    "cache-write": "cache_write",
    "cumsum": "cumsum",
    "embedding": "embedding",
    "experts-gemv": "experts_gemv",
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
    "topk": "topk",
}

_ALL = Templates("qcompile.lowering.mlir", TEMPLATES)


def emit(spec: KernelSpec, target: Target) -> str:
    """The MLIR text of a kernel, which defines one function called `entry(spec)`; ArtifactError as `Templates.emit`."""
    text: str = _ALL.emit(spec, target)
    return text


def extents(spec: KernelSpec) -> Extents:
    """As `Templates.extents`."""
    return _ALL.extents(spec)


def entry(spec: KernelSpec) -> str:
    """The name of the function in the kernel's text."""
    return spec.template.replace("-", "_")
