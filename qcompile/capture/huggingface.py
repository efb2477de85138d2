"""Capture of transformers models: a live object, or a folder with config.json and safetensors."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from qcompile.capture.attention import IMPLEMENTATION, register
from qcompile.capture.experts import use as use_experts
from qcompile.capture.inputs import MAX_BATCH, positions, usual_inputs, without_cache
from qcompile.capture.module import aliases, export, from_examples, hollow_or_error, make_program
from qcompile.errors import CaptureError, CheckpointError
from qcompile.experts_source import per_expert
from qcompile.program import Program
from qcompile.safetensors_folder import SafetensorsFolder
from qcompile.sources import ModuleState, Renamed, TensorSource, listing

MAX_CONFIG = 10_000_000
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModel",
)
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")


class CausalLanguageModel(nn.Module):
    """A language model as a function of a whole sequence, without a cache: logits [b, t, vocabulary] at `keep`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.slices = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        # With an explicit mask, transformers looks neither for padding nor for packed sequences.
        whole = torch.ones_like(input_ids)
        more = {"logits_to_keep": keep} if self.slices else {}
        out = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=whole,
            use_cache=False,
            return_dict=True,
            **more,
        )
        logits: torch.Tensor = out.logits
        return logits if self.slices else logits[:, keep]


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return type(model).__name__ in names and not getattr(model.config, "is_encoder_decoder", False)


def program_of(
    shell: nn.Module, source: TensorSource, model_config: dict[str, Any], quantization: dict[str, Any] | None
) -> Program:
    """The Program of a hollow transformers model."""
    facts = _Facts(shell)
    use_experts(shell)
    if _is_causal(shell):
        program = _causal(shell, source, model_config, quantization)
    else:
        program = _plain(shell, source, model_config, quantization)
    facts.apply(program)
    for name in unexpected(shell, program.ledger.unclaimed()):
        program.ledger.ignore(name, "the architecture has no use for it")
    for name in _empty_biases(program):
        program.ledger.ignore(name, "a bias of zeros, which the architecture does not have")
    _check_present(program, quantization is not None)
    return program


def _causal(
    shell: Any, source: TensorSource, model_config: dict[str, Any], quantization: dict[str, Any] | None
) -> Program:
    if "position_ids" not in inspect.signature(shell.forward).parameters:
        raise CaptureError(
            f"{type(shell).__name__} takes no position_ids",
            where=type(shell).__name__,
            expected="a decoder with rotary or learned positions",
            remedy="pass example_inputs to export it as a plain module, without a cache",
        )
    register()
    shell.set_attn_implementation(IMPLEMENTATION)
    ids, keep = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    most = positions(shell.config)
    b, s, t = Dim("b", min=1, max=MAX_BATCH), Dim("s", min=1, max=most), Dim("t", min=1, max=most)
    shapes = {"input_ids": {0: b, 1: s}, "position_ids": {0: b, 1: s}, "keep": {0: t}}
    exported = export(CausalLanguageModel(shell), (ids, ids.clone(), keep), None, shapes)
    return make_program(
        shell,
        exported,
        source,
        dynamic_shapes=shapes,
        kind="causal-lm",
        prefix="model.",
        outputs=("logits",),
        head=shell.get_output_embeddings(),
        model_config=model_config,
        quantization_config=quantization,
    )


def _plain(
    shell: Any, source: TensorSource, model_config: dict[str, Any], quantization: dict[str, Any] | None
) -> Program:
    without_cache(shell)
    shell.set_attn_implementation("sdpa" if getattr(shell, "_supports_sdpa", False) else "eager")
    inputs, shapes = usual_inputs(shell)
    exported = export(shell, (), inputs, shapes)
    return make_program(
        shell,
        exported,
        source,
        dynamic_shapes=shapes,
        head=shell.get_output_embeddings(),
        model_config=model_config,
        quantization_config=quantization,
    )


class _Facts:
    """What methods ask about modules and only transformers knows."""

    def __init__(self, shell: Any):
        last = [name for name, _ in shell.named_parameters()][-1:]
        self.last = last[0].removesuffix(".weight") if last and last[0].endswith(".weight") else None

    def apply(self, program: Program) -> None:
        for path, module in program.modules.items():
            program.modules[path] = replace(module, last_parameter=path == self.last)


def _empty_biases(program: Program) -> Iterator[str]:
    """The biases of zeros that old GPTQ checkpoints hold for layers that have none."""
    unclaimed = set(program.ledger.unclaimed())
    for module in program.modules.values():
        name = f"{module.weight.removesuffix('weight')}bias"
        if module.bias is None and name in unclaimed and not program.source.read(name).any():
            yield name


def _check_present(program: Program, quantized: bool) -> None:
    """CheckpointError unless every tensor that the graph reads is in the source with the right shape.

    Weights that the checkpoint may store in another form are left to its method.
    """
    weights, there = {module.weight for module in program.modules.values()}, set(program.source.names())
    others = there - set(program.tensors)
    absent = []
    for name, tensor in program.tensors.items():
        if not tensor.is_meta or (quantized and name in weights):
            continue
        if name not in there:
            stem = name.removesuffix("weight")
            absent += [] if any(other.startswith(stem) for other in others) else [name]
        elif not program.source.info(name).encoding and program.source.info(name).shape != tuple(tensor.shape):
            raise CheckpointError(
                f"tensor '{name}' has another shape than the architecture",
                where=program.source.describe(),
                found=list(program.source.info(name).shape),
                expected=list(tensor.shape),
                remedy="check that the checkpoint belongs to this config.json",
            )
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors of the architecture are not in the checkpoint",
            where=program.source.describe(),
            found=f"{len(there)} tensors",
            expected=", ".join(absent[:8]) + (", ..." if len(absent) > 8 else ""),
            remedy="check that the checkpoint is complete and belongs to this config.json",
        )


def capture_model(model: Any, example_inputs: Any = None, dynamic_shapes: Any = None) -> Program:
    """The Program of a live transformers model; with `example_inputs` as a plain module, without a cache.

    CaptureError when its weights are quantized already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise CaptureError(
            "the model object is quantized already",
            where=type(model).__name__,
            found=str(getattr(model.config, "quantization_config", "an unknown config"))[:200],
            remedy="pass the folder of the quantized checkpoint, or the float model and a config",
        )
    shell: Any = hollow_or_error(model)
    source, config = ModuleState(model), model.config.to_dict()
    config["architectures"] = [type(model).__name__]  # which only save_pretrained says
    if example_inputs is None:
        return program_of(shell, source, config, None)
    facts = _Facts(shell)
    use_experts(shell)
    without_cache(shell)
    program = from_examples(shell, source, example_inputs, dynamic_shapes, config)
    facts.apply(program)
    return program


def capture_folder(folder: Path) -> Program:
    """The Program of a Hugging Face folder, quantized or not; tensors stay in their files until a pass reads them."""
    config = _read_config(folder / "config.json")
    quantization = config.get("quantization_config")
    for name in _QUANTIZATION_FILES if quantization is None else ():
        if (folder / name).is_file():
            quantization = config["quantization_config"] = _read_config(folder / name)
            break
    source = SafetensorsFolder(folder)
    check_layers(config, source)
    shell = build(folder, config)
    return program_of(shell, per_expert(renamed(source, shell), shell), config, quantization)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"there is no {path.name}",
            where=str(path.parent),
            found=listing(path.parent),
            expected="a folder as save_pretrained writes it",
        )
    if path.stat().st_size > MAX_CONFIG:
        raise CheckpointError(
            f"{path.name} is too large", where=str(path), found=path.stat().st_size, expected=MAX_CONFIG
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON", where=str(path), found=str(error)[:200]) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=str(path), found=type(data).__name__)
    return data


def architecture(config: Any, raw: Mapping[str, Any], where: str) -> type:
    """The transformers class that `config.json` names; only classes that transformers has for this config count."""
    import transformers

    known: dict[str, type] = {}
    for auto in _AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            classes = mapping[type(config)]
            for cls in classes if isinstance(classes, (tuple, list)) else (classes,):
                known.setdefault(cls.__name__, cls)
    named = raw.get("architectures") or []
    if not named and known:
        return next(iter(known.values()))
    for name in named:
        if name in known:
            return known[name]
    raise CaptureError(
        "the architecture is not known",
        where=where,
        found=", ".join(map(str, named)) or f"model_type {raw.get('model_type')}",
        expected=", ".join(known) or "a model that the installed transformers has",
        remedy="update transformers; models that bring their own code are not supported",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def build(folder: Path, raw: Mapping[str, Any]) -> nn.Module:
    """The float32 model of a config.json: parameters have no memory, buffers that no checkpoint holds have values."""
    where = str(folder / "config.json")
    if "model_type" not in raw:
        raise CaptureError(
            "config.json names no model_type", where=str(folder), expected="a config.json as transformers writes it"
        )
    plain = {key: value for key, value in raw.items() if key not in ("quantization_config", "auto_map")}
    config = transformers_config(plain, where)
    return instantiate(architecture(config, raw, where), config)


def transformers_config(fields: Mapping[str, Any], where: str) -> Any:
    """The transformers object of a config's fields; CaptureError for fields that transformers refuses."""
    from transformers import AutoConfig

    try:
        with _quiet():
            return AutoConfig.for_model(**fields)
    except Exception as error:
        raise CaptureError(
            "the config is not one that transformers reads",
            where=where,
            found=f"{type(error).__name__}: {' '.join(str(error).split())}"[:400],
            expected="a model_type of the installed transformers",
            remedy="update transformers; models that bring their own code are not supported",
        ) from error


def check_layers(config: Mapping[str, Any], source: TensorSource) -> None:
    """CheckpointError for more layers than tensors: layers are built one by one, which takes time and memory."""
    most = len(source.names())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in _LAYERS:
            count = part.get(name)
            if isinstance(count, int) and count > most:
                raise CheckpointError(
                    "the config has more layers than the checkpoint has tensors",
                    where=source.describe(),
                    found=f"{name} = {count}",
                    expected=f"at most {most}",
                    remedy="check that the checkpoint is complete and belongs to this config",
                )


@contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters of modules that are made meanwhile go to the meta device as soon as they are registered."""
    register = nn.Module.register_parameter

    def forget(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = forget  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def instantiate(cls: Any, config: Any) -> nn.Module:
    """A hollow model of class `cls`, made without initialising any weight."""
    from transformers.initialization import no_init_weights

    try:
        with _quiet(), no_init_weights(), _without_memory(), torch.no_grad():
            model = cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")
            model.tie_weights()
    except Exception as error:
        raise CaptureError(
            f"{cls.__name__} cannot be built from its config.json",
            where=cls.__name__,
            found=f"{type(error).__name__}: {' '.join(str(error).split())}"[:400],
            remedy="check config.json against the model's documentation",
        ) from error
    return hollow_or_error(model)


def renamed(source: TensorSource, shell: Any) -> TensorSource:
    """`source` with the names that the architecture uses, where the checkpoint is older or of another head."""
    paths = {path for path, _ in shell.named_modules()}
    state, first = set(shell.state_dict()), aliases(shell)
    conversions = _conversions(shell)
    prefix = f"{shell.base_model_prefix}." if shell.base_model_prefix else ""
    to: dict[str, str] = {}
    for old in source.names():
        name = old
        for conversion in conversions:
            name = conversion.rename_source_key(name)[0]
        candidates = [name, prefix + name, name.removeprefix(prefix)]
        name = max(candidates, key=lambda n: (n in state, _depth(n, paths)))
        if name in to:
            raise CheckpointError(
                f"two tensors of the checkpoint are '{name}' of the architecture",
                where=source.describe(),
                found=f"{to[name]}, {old}",
                expected="one",
            )
        to[name] = old
    for name, canonical in first.items():
        if canonical not in to and name in to:
            to[canonical] = to.pop(name)
    return source if all(new == old for new, old in to.items()) else Renamed(source, to)


def _depth(name: str, paths: set[str]) -> int:
    """How many parts of `name` are the path of a module."""
    parts = name.split(".")
    return next((i for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in paths), 0)


def _conversions(shell: Any) -> list[Any]:
    """transformers' renamings of old checkpoint names; conversions that also change tensors are left out."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [c for c in get_model_conversion_mapping(shell) if isinstance(c, WeightRenaming)]


def unexpected(shell: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` that are not the architecture's, and of which it says that checkpoints may hold them in vain."""
    patterns = [re.compile(p) for p in getattr(shell, "_keys_to_ignore_on_load_unexpected", None) or ()]
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in shell.named_buffers()):
        patterns.append(re.compile(r"rotary_emb\.inv_freq"))  # old checkpoints have it in each layer
    own = aliases(shell)
    return [name for name in names if name not in own and any(p.search(name) for p in patterns)]
