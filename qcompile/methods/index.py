"""The table of methods, and the way from whatever a caller calls a config to a method and its typed config."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcompile.errors import CheckpointError, ConfigError, near
from qcompile.format import FORMATS, Format
from qcompile.methods.base import Method, MethodConfig
from qcompile.registry import Registry
from qcompile.transform import TRANSFORMS, Transform

if TYPE_CHECKING:
    from qcompile.sources import TensorSource

METHODS = Registry(
    "quantization method",
    {
        "gptq": "qcompile.methods.gptq:Gptq",
        "awq": "qcompile.methods.awq:Awq",
        "bitsandbytes": "qcompile.methods.bitsandbytes:Bnb",
        "hqq": "qcompile.methods.hqq:Hqq",
        "eetq": "qcompile.methods.eetq:Eetq",
        "compressed-tensors": "qcompile.methods.compressed_tensors:CompressedTensors",
        "mxfp4": "qcompile.methods.mxfp4:Mxfp4",
        "gguf": "qcompile.methods.gguf:Gguf",
        "quanto": "qcompile.methods.quanto:Quanto",
        "torchao": "qcompile.methods.torchao:TorchAo",
        "fouroversix": "qcompile.methods.fouroversix:FourOverSix",
        "fp_quant": "qcompile.methods.fp_quant:FpQuant",
        "nvfp4": "qcompile.methods.nvfp4:Nvfp4",
        "gemma": "qcompile.methods.gemma:Gemma",
        "bitnet": "qcompile.methods.bitnet:BitNet",
        "spqr": "qcompile.methods.spqr:Spqr",
        "aqlm": "qcompile.methods.aqlm:Aqlm",
        "vptq": "qcompile.methods.vptq:Vptq",
        "higgs": "qcompile.methods.higgs:Higgs",
        "fbgemm_fp8": "qcompile.methods.fbgemm_fp8:FbgemmFp8",
        "fp8": "qcompile.methods.fp8:FineGrainedFp8",
        "mxfp8": "qcompile.methods.fp8:Mxfp8",
        "quark": "qcompile.methods.quark:Quark",
        "metal": "qcompile.methods.metal:Metal",
        "auto-round": "qcompile.methods.auto_round:AutoRound",
        "sinq": "qcompile.methods.sinq:Sinq",
    },
)


def method(name: str) -> Method:
    """The method of a `quant_method` name; ConfigError for an unknown one."""
    if not METHODS.has(name):
        raise ConfigError(
            "unknown quantization method",
            where="field 'quant_method'",
            found=f"{name!r}{near(str(name), METHODS)}",
            expected=", ".join(METHODS),
        )
    found: Method = METHODS.load(name)()
    return found


def register_method(
    method: type[Method], *, formats: Sequence[type[Format]] = (), transforms: Sequence[type[Transform]] = ()
) -> None:
    """Add a method that lives outside of qcompile, with the formats and transforms of its own.

    Registering the same classes again changes nothing; ConfigError when a name belongs to somebody else. A package adds
    its method for every process by an entry point of the group "qcompile.methods": a function that calls this one.
    Artifacts name formats and transforms, so a process that loads one must have them registered as well.
    """
    METHODS.add(method.name, method)
    for format in formats:
        FORMATS.add(format.kind, format)
    for transform in transforms:
        TRANSFORMS.add(transform.kind, transform)


def parse_config(
    config: Any,
    stored: Mapping[str, Any] | None = None,
    source: TensorSource | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> tuple[Method, MethodConfig] | None:
    """The method and typed config that a caller asks for; None when nothing is to be quantized.

    `config` is one of our configs, a transformers config object (anything with `to_dict()`), a dict, JSON text, or
    None: then `stored`, the `quantization_config` that came with the checkpoint, holds. A config beside a stored one
    must say the same, but for how to load, and `source` must hold the quantized weights that `stored` promises
    (CheckpointError). Only the blocks of a GGUF file may be quantized again by another method. A checkpoint that names no
    method, by its `model_config`, is one of those that methods recognise, or a float model.
    """
    if source is not None and model_config is not None and (stored is None or "quant_method" not in stored):
        stored = next(filter(None, (method(name).recognise(model_config, source) for name in METHODS)), stored)
    own = _parse(stored, lenient=True) if stored is not None else None
    if own is not None and source is not None and not own[0].prequantized(own[1], source):
        raise CheckpointError(
            f"the checkpoint says it is quantized with {own[0].name}, but holds no such weight",
            where=source.describe(),
            found=", ".join(source.names()[:5]) or "no tensor",
            expected=f"tensors as {own[0].name} stores them",
            remedy="complete the checkpoint, or take quantization_config out of its config.json to quantize it anew",
        )
    if config is None:
        return own
    asked = _parse(config, lenient=False)
    if own is None:
        return asked
    if asked[0].name != own[0].name and own[0].name == "gguf":
        return asked
    if asked[0].name != own[0].name:
        raise ConfigError(
            "the checkpoint is already quantized with another method",
            found=f"config: {asked[0].name}, checkpoint: {own[0].name}",
            expected="no config, or the checkpoint's own",
            remedy="leave the config out, or start from the float model",
        )
    differ = _differences(asked[1], own[1])
    if differ:
        raise ConfigError(
            f"the config differs from the {own[0].name} config that the checkpoint was quantized with",
            found="; ".join(differ),
            expected="no config, or the checkpoint's own",
            remedy="leave the config out, or start from the float model",
        )
    return own[0], replace(own[1], **{name: getattr(asked[1], name) for name in own[1].loading})


def _parse(config: Any, *, lenient: bool) -> tuple[Method, MethodConfig]:
    if isinstance(config, MethodConfig):
        return method(config.method), config
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                "a quantization config is not JSON",
                where=reprlib.repr(config),
                found=str(error),
                expected='{"quant_method": ...}',
            ) from None
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise ConfigError(
            "this is not a quantization config",
            found=type(config).__name__,
            expected="a config object, a dict, JSON text or None",
        )
    found = method(_name(config))
    return found, found.Config.from_dict(config, lenient=lenient)


def _name(config: Mapping[str, Any]) -> str:
    """The config's `quant_method`; old bitsandbytes configs have only its flags."""
    name = config.get("quant_method")
    if name is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        return "bitsandbytes"
    if name is None:
        raise ConfigError(
            "a quantization config does not name its method",
            found=", ".join(config) or "no field",
            expected=f"the field 'quant_method': {', '.join(METHODS)}",
        )
    return str(getattr(name, "value", name))  # transformers names methods by an enum


def _differences(asked: MethodConfig, own: MethodConfig) -> list[str]:
    left, right = asked.to_dict(), own.to_dict()
    matter = [name for name in left if name not in asked.steering and name not in asked.loading]
    return [
        f"{name}: {reprlib.repr(left[name])}, checkpoint {reprlib.repr(right.get(name))}"
        for name in matter
        if left[name] != right.get(name)
    ]
