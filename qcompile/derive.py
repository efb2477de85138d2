"""The config of a method that can hold what another has quantized: found from bits, groups and dense layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.errors import ConfigError
from qcompile.format import Names
from qcompile.formats.affine import Affine
from qcompile.simplify import interval

LARGEST = 4096  # a probe's side: whole rows are told from long groups


@dataclass(frozen=True)
class Facts:
    """What the weights of a checkpoint have in common; `group` -1 is the whole row. `dense` are linear layers left dense."""

    bits: int
    group: int
    symmetric: bool
    dense: tuple[str, ...]


def derived(method: str, formats: Mapping[str, Affine], dense: Sequence[str]) -> dict[str, Any]:
    """A config of `method` for weights in these formats (module path -> format).

    ConfigError where the weights have no one width and group, or the method has no such config.
    """
    if method not in CONFIGS:
        raise ConfigError(
            f"no config of {method} is found by itself",
            found=repr(method),
            expected=", ".join(CONFIGS),
            remedy="give the whole config of the method",
        )
    facts = {(_bits(f), _group(f), _symmetric(f)) for f in formats.values()}
    if len(facts) != 1:
        found = "; ".join(f"{bits} bits in groups of {group}" for bits, group, _ in sorted(facts)) or "no such weight"
        raise ConfigError(
            "the modules have no one width and group",
            found=found,
            expected="one for all of them",
            remedy="give a config that says each, where the method has one",
        )
    (bits, group, symmetric), *_ = facts
    return {"quant_method": method, **CONFIGS[method](Facts(bits, group, symmetric, tuple(dense)))}


def _terms(format_: Affine) -> Any:
    return format_.terms(Names(**format_.located(LARGEST, LARGEST)))


def _bits(format_: Affine) -> int:
    code = _terms(format_).code
    if code.dtype != "i32":
        raise ConfigError("the codes are no integers", found=format_.kind, expected="integer codes")
    low, high = interval(code)
    return (high - low).bit_length()


def _group(format_: Affine) -> int:
    group = format_.group_size(LARGEST, LARGEST)
    if group is None:
        group = getattr(format_, "group", getattr(format_, "columns", LARGEST))
    return -1 if group == LARGEST else group


def _symmetric(format_: Affine) -> bool:
    terms = _terms(format_)
    return terms.offset is None and (terms.zero is None or terms.zero.op == "const")


def _gptq(facts: Facts) -> dict[str, Any]:
    dense: dict[str, Any] = {f"-:^{re.escape(path)}$": {} for path in facts.dense if path != "lm_head"}
    return {"bits": facts.bits, "group_size": facts.group, "sym": facts.symmetric, "dynamic": dense or None}


def _awq(facts: Facts) -> dict[str, Any]:
    return {"bits": facts.bits, "group_size": facts.group, "modules_to_not_convert": list(facts.dense) or None}


def _auto_round(facts: Facts) -> dict[str, Any]:
    extra = {path: {"bits": 16} for path in facts.dense}
    return {"bits": facts.bits, "group_size": facts.group, "sym": facts.symmetric, "extra_config": extra or None}


def _compressed_tensors(facts: Facts) -> dict[str, Any]:
    weights = {
        "num_bits": facts.bits,
        "type": "int",
        "symmetric": facts.symmetric,
        "strategy": "channel" if facts.group == -1 else "group",
        "group_size": None if facts.group == -1 else facts.group,
    }
    return {
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "ignore": list(facts.dense),
    }


def _metal(facts: Facts) -> dict[str, Any]:
    return {"bits": facts.bits, "group_size": facts.group, "modules_to_not_convert": list(facts.dense) or None}


def _gguf(facts: Facts) -> dict[str, Any]:
    width = (
        facts.bits,
        facts.symmetric or facts.bits == 8,
    )  # no encoding of 8 bits has zeros: those must be the middle
    if facts.group != 32 or width not in ENCODINGS:
        raise ConfigError(
            "no GGUF encoding has such weights",
            found=f"{facts.bits} bits in groups of {facts.group}",
            expected="4, 5 or 8 bits in groups of 32",
        )
    return {"encoding": ENCODINGS[width]}


ENCODINGS = {(4, True): "q4_0", (4, False): "q4_1", (5, True): "q5_0", (5, False): "q5_1", (8, True): "q8_0"}
CONFIGS: dict[str, Callable[[Facts], dict[str, Any]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "metal": _metal,
    "gguf": _gguf,
}
