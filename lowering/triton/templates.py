"""The kernel templates of the Triton backend, by name; `emit` of a module gives a Source, its extents hold for any GPU."""

from __future__ import annotations

from qcompile.artifact import Extents, KernelSpec
from qcompile.lowering.templates import Templates
from qcompile.lowering.triton.source import Source
from qcompile.target import Target

TEMPLATES: dict[str, str] = {
    "activation": "activation",
    "attention": "attention_prefill",
    "attention-combine": "combine",
    "attention-decode": "attention_decode",
    "cache-write": "cache_write",
    "dequantize": "dequantize",
    "embedding": "embedding",
    "experts-gather": "experts_gather",
    "experts-grouped": "experts_grouped",
    "experts-order": "experts_order",
    "cumsum": "cumsum",
    "gather": "gather",
    "linear-finish": "linear_dense",
    "linear-fragments": "linear_fragments",
    "linear-codebook": "linear_codebook",
    "linear-generic": "linear_generic",
    "linear-native": "linear_native",
    "outlier-columns": "outlier_columns",
    "pointwise": "pointwise",
    "reduce": "reduce",
    "rope": "rope",
    "row-norm": "norm",
    "sparse": "sparse",
    "topk": "topk",
}

_ALL = Templates("qcompile.lowering.triton", TEMPLATES)


def emit(spec: KernelSpec, target: Target) -> Source:
    """The source of a kernel for `target`, which has one capability; ArtifactError as `Templates.emit`."""
    source: Source = _ALL.emit(spec, target)
    return source


def extents(spec: KernelSpec) -> Extents:
    """As `Templates.extents`."""
    return _ALL.extents(spec)
