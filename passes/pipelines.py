"""The pipelines: which passes run in which order, and why there."""

from __future__ import annotations

import importlib
from typing import cast

from qcompile.errors import ConfigError, near
from qcompile.passes.base import Pass

PASSES: dict[str, str] = {
    "normalise": "qcompile.passes.normalise:Normalise",
    "quantize": "qcompile.passes.quantize:Quantize",
    "quantize-experts": "qcompile.passes.quantize_experts:QuantizeExperts",
    "read-parameters": "qcompile.passes.read_parameters:ReadParameters",
    "round-outputs": "qcompile.passes.round_outputs:RoundOutputs",
    "round-cache": "qcompile.passes.round_cache:RoundCache",
    "add-kv-cache": "qcompile.passes.add_kv_cache:AddKvCache",
    "convolutions": "qcompile.passes.convolutions:Convolutions",
    "fuse-dequantize": "qcompile.passes.fuse_dequantize:FuseDequantize",
    "choose-layout": "qcompile.passes.choose_layout:ChooseLayout",
    "layout-experts": "qcompile.passes.layout_experts:LayoutExperts",
    "share-subexpressions": "qcompile.passes.share_subexpressions:ShareSubexpressions",
    "decompose": "qcompile.passes.decompose:Decompose",
    "fuse-activation": "qcompile.passes.fuse_activation:FuseActivation",
    "fuse-rope": "qcompile.passes.fuse_rope:FuseRope",
    "fuse-norm": "qcompile.passes.fuse_norm:FuseNorm",
    "merge-linears": "qcompile.passes.merge_linears:MergeLinears",
    "fuse-experts": "qcompile.passes.fuse_experts:FuseExperts",
    "fuse-epilogue": "qcompile.passes.fuse_epilogue:FuseEpilogue",
    "fuse-rounding": "qcompile.passes.fuse_rounding:FuseRounding",
    "fuse-prologue": "qcompile.passes.fuse_prologue:FusePrologue",
    "fold-constants": "qcompile.passes.fold_constants:FoldConstants",
    "simplify-masks": "qcompile.passes.simplify_masks:SimplifyMasks",
    "form-regions": "qcompile.passes.form_regions:FormRegions",
    "drop-dead-code": "qcompile.passes.drop_dead_code:DropDeadCode",
    "account-for-weights": "qcompile.passes.account_for_weights:AccountForWeights",
}

FULL: tuple[str, ...] = (
    "normalise",  # the other passes look for one form of each thing
    "quantize",  # while each linear is still a layer of the model, with its path
    "quantize-experts",
    "read-parameters",  # everything below may look at values
    "round-outputs",  # while every module and every rounding is still there by itself
    "round-cache",  # while keys and values still go to one attention
    "add-kv-cache",  # before rope is fused, which looks for the attention that reads it
    "convolutions",  # after methods have looked at modules; below they are linears like all others
    "fuse-dequantize",
    "fuse-rounding",  # before transforms are taken apart
    "decompose",  # before layouts: a rotation holds a linear of its own
    "choose-layout",  # before merging: only layouts tell which weights can lie side by side
    "layout-experts",
    "share-subexpressions",  # so that equal inputs of linears are one node, which merging looks for
    "fuse-activation",  # before constants fold and epilogues look for activations
    "fuse-norm",  # before constants fold: 1 + weight is an offset of the norm
    "fuse-rope",
    "merge-linears",  # before epilogues: a gate is one only when its two halves are one linear
    "fuse-experts",  # before regions take in gates and shares
    "fuse-epilogue",
    "fuse-prologue",  # after merging: one linear then normalises once, not three
    "fold-constants",  # what is left of tables and masks
    "simplify-masks",  # after folding, which finds masks that are constants
    "share-subexpressions",
    "form-regions",  # what no other pass took in
    "drop-dead-code",
    "account-for-weights",
)

CHECKED: tuple[str, ...] = (
    "normalise",
    "quantize",
    "quantize-experts",
    "read-parameters",
    "round-outputs",
    "round-cache",
    "add-kv-cache",
    "drop-dead-code",
    "account-for-weights",
)
"""The shortest pipeline that gives a model that runs: nothing is fused, every operator is as the model wrote it."""


def make(name: str) -> Pass:
    """The pass called `name`, with its default options; ConfigError for an unknown name."""
    if name not in PASSES:
        raise ConfigError(f"unknown pass{near(name, PASSES)}", found=repr(name), expected=", ".join(PASSES))
    module, attribute = PASSES[name].split(":")
    return cast(Pass, getattr(importlib.import_module(module), attribute)())


def pipeline(names: tuple[str, ...] = FULL) -> tuple[Pass, ...]:
    """The passes of a pipeline, with their default options."""
    return tuple(make(name) for name in names)
