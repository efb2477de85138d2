"""A module "fc" in memory, read by a method: what the tests of methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import config as model_config
from checkpoints import reference
from in_memory import InMemory, linear
from stored_modules import read as read_module
from stored_modules import same_bits, value

from qcompile.format import Packed
from qcompile.methods.base import Method, MethodConfig, Quantized
from qcompile.methods.index import parse_config
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder
from qcompile.transform import Applied, effective_weight

Tensors = dict[str, torch.Tensor]


def fc(n: int, k: int, dtype: str = "f16", **more: Any) -> Module:
    return linear("fc", n, k, dtype=dtype, **more)


def read(method: Method, config: MethodConfig, tensors: Tensors, module: Module) -> Packed:
    """The module from a checkpoint that holds `tensors`, all of which it must claim, but for a bias."""
    source = InMemory({f"fc.{name}": tensor for name, tensor in tensors.items()})
    selected = method.select(config, module, source, {"fc": module})
    assert isinstance(selected, Quantized)
    claimed = {name.removeprefix("fc.") for name in (*selected.names.values(), *selected.also_claims)}
    assert claimed | {"bias"} == tensors.keys() | {"bias"}
    return method.read(config, module, selected, source)


def weight(packed: Packed) -> torch.Tensor:
    """The weight that acts on the module's own input."""
    return effective_weight(value(packed), packed.before, packed.residual)


def _around(packed: Packed) -> list[Applied]:
    return [*packed.before, *packed.after, *([packed.residual] if packed.residual is not None else [])]


def same(a: Packed, b: Packed) -> bool:
    """True for the same format, tensors, transforms and bias."""
    left, right = _around(a), _around(b)
    alike = a.format == b.format and [x.transform for x in left] == [x.transform for x in right]
    biases = (a.bias is None) == (b.bias is None) and (a.bias is None or b.bias is None or torch.equal(a.bias, b.bias))
    pairs = [(a.tensors, b.tensors), *((x.tensors, y.tensors) for x, y in zip(left, right, strict=False))]
    return alike and biases and all(same_bits(x, y) for x, y in pairs)


def written_again(folder: Path) -> int:
    """How many modules of a real checkpoint were read, written and read again without a change of any bit."""
    source, seen = SafetensorsFolder(folder), 0
    found = parse_config(None, model_config(folder)["quantization_config"], source)  # type: ignore[arg-type]
    assert found is not None
    for path, expected in reference(folder).weights.items():
        module = linear(path, *expected.shape)
        packed = read_module(*found, module, source)
        written = {f"{path}.{name}": tensor for name, tensor in found[0].write(found[1], module, packed).items()}
        config = found[0].Config.from_dict(found[0].stored_config(found[1], {path: packed}), lenient=True)
        assert same(packed, read_module(found[0], config, module, InMemory(written))), path
        seen += 1
    return seen
