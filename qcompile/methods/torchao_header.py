"""What the header of a safetensors file says of a torchao weight, as one of the tensor classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcompile.errors import CheckpointError, ConfigError, near
from qcompile.methods import stored
from qcompile.methods.torchao_floats import Float8Act, Float8Tensor, MXTensor, NVFP4Tensor
from qcompile.methods.torchao_integers import Int4Tensor, Int4TilePackedTo4dTensor, Int8Tensor, IntxUnpackedToInt8Tensor
from qcompile.methods.torchao_recipes import ROW, TENSOR, Per, plain
from qcompile.methods.torchao_tensors import SHORT, AoTensor

if TYPE_CHECKING:
    from qcompile.program import Module
    from qcompile.sources import TensorSource

Data = Mapping[str, Any]


def tensor_of(module: Module, source: TensorSource) -> AoTensor:
    """The class, with its attributes, of a module's stored weight; CheckpointError when the header does not say it."""
    said = _entry(source.header(), module.weight)
    if said is None:
        raise CheckpointError(
            "the header does not say how a torchao weight is stored",
            where=f"{module.path}, {source.describe()}",
            found=f"no entry {module.weight!r}",
            expected=f'{module.weight!r}: {{"_type": a torchao class, "_data": ...}} in the metadata of the safetensors file',
            remedy="save the model with safetensors metadata, as transformers' save_pretrained does",
        )
    try:
        entry = json.loads(said)
        kind, data = entry["_type"], plain(entry["_data"])
        if kind not in _CLASSES:
            raise _wrong(module, f"{kind!r}{near(str(kind), _CLASSES)}", ", ".join(_CLASSES))
        found: AoTensor = _CLASSES[kind](module, data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ConfigError) as error:
        text = f"{said[:200]} ({type(error).__name__}: {error})"
        raise _wrong(module, text, "a torchao class with its attributes") from None
    if isinstance(found, Float8Tensor):  # the header leaves the codes' own type to the tensor
        name = stored.tensors(source, module).get("_weight_qdata")
        return replace(found, element="f8e5m2" if name and source.info(name).dtype == "f8e5m2" else "f8e4m3")
    return found


def _entry(header: Mapping[str, str], name: str) -> str | None:
    """The header's text about a tensor; the architecture may call it with another prefix than the file."""
    if name in header:
        return header[name]
    near_by = [key for key in header if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return header[near_by[0]] if len(near_by) == 1 else None


def _wrong(module: Module, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the header describes a weight in a way that is not supported",
        where=f"{module.weight} (module {module.path}, {module.n} outputs, {module.k} inputs)",
        found=found,
        expected=expected,
    )


def _need(ok: bool, module: Module, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise _wrong(module, f"{name}: {value}", f"{name}: {expected}")


def _block(module: Module, data: Data) -> tuple[int, int]:
    """`block_size`; nothing, or an empty list, is the whole weight."""
    said = data.get("block_size") or (module.n, module.k)
    ok = len(said) == 2 and all(type(size) is int and size > 0 for size in said)
    ok = ok and module.n % said[0] == 0 and module.k % said[1] == 0
    _need(ok, module, "block_size", list(said), "two numbers that divide the weight's shape")
    return said[0], said[1]


def _group(module: Module, data: Data) -> int:
    """The group of a 4-bit weight, whose shape the header says too."""
    _need(
        tuple(data["shape"]) == (module.n, module.k), module, "shape", list(data["shape"]), f"[{module.n}, {module.k}]"
    )
    rows, group = _block(module, data)
    _need(rows == 1 and group % 8 == 0, module, "block_size", [rows, group], "[1, a multiple of 8]")
    return group


def _floating(module: Module, data: Data, name: str = "dtype") -> str:
    said = SHORT.get(str(data.get(name) or "bfloat16"), "")
    _need(said in ("f32", "f16", "bf16"), module, name, data.get(name), "float32, float16 or bfloat16")
    return said


def _small(module: Module, name: str, value: Any, *more: str) -> Any:
    _need(SHORT.get(value, "") in ("f8e4m3", "f8e5m2", *more), module, name, value, "a small float that is supported")
    return SHORT[value]


def _int8(module: Module, data: Data) -> AoTensor:
    kwargs, act = data.get("act_quant_kwargs"), None
    if kwargs is not None:
        per, mapping = kwargs["granularity"], kwargs.get("mapping_type", "SYMMETRIC")
        _need(per in (ROW, TENSOR), module, "granularity of x", per, "PerRow(-1) or PerTensor()")
        _need(mapping in ("SYMMETRIC", "ASYMMETRIC"), module, "mapping_type", mapping, "SYMMETRIC or ASYMMETRIC")
        act = (per, mapping, bool(kwargs.get("reduce_range")))
    dtype, reduced = _floating(module, data), bool(data.get("reduce_range"))
    return Int8Tensor(module.n, module.k, dtype, _block(module, data), act, reduced)


def _intx(module: Module, data: Data) -> AoTensor:
    target, act = str(data["target_dtype"]), data.get("activation_quantization")
    _need(target in {f"int{bits}" for bits in range(1, 9)}, module, "target_dtype", target, "int1 to int8")
    _need(act in (None, "int8_asym_per_token"), module, "activation_quantization", act, "None or int8_asym_per_token")
    block, dtype = _block(module, data), _floating(module, data)
    return IntxUnpackedToInt8Tensor(module.n, module.k, dtype, block, int(target[3:]), act is not None)


def _int4(module: Module, data: Data) -> AoTensor:
    act = data.get("activation_dtype") or "bfloat16"
    _need(act in ("bfloat16", "float8_e4m3fn"), module, "activation_dtype", act, "bfloat16 or float8_e4m3fn")
    return Int4Tensor(module.n, module.k, "bf16", _group(module, data), act != "bfloat16")


def _tiles(module: Module, data: Data) -> AoTensor:
    return Int4TilePackedTo4dTensor(module.n, module.k, "bf16", _group(module, data))


def _float8(module: Module, data: Data) -> AoTensor:
    kwargs, act = data.get("act_quant_kwargs"), None
    if kwargs is not None:
        per = kwargs["granularity"]
        known = isinstance(per, Per) and (per in (ROW, TENSOR) or (per.kind == "PerBlock" and per.sizes[0] == 1))
        _need(known, module, "granularity of x", per, "PerRow(-1), PerTensor() or PerBlock(1, size)")
        element = _small(module, "float8_dtype", kwargs.get("float8_dtype", "float8_e4m3fn"))
        act = Float8Act(per, element, kwargs.get("hp_value_lb"), kwargs.get("hp_value_ub"))
    return Float8Tensor(module.n, module.k, _floating(module, data), _block(module, data), "f8e4m3", act)


def _mx(module: Module, data: Data) -> AoTensor:
    element = _small(module, "elem_dtype", data["elem_dtype"], "e2m1")
    _need(
        data["block_size"] == 32 and module.k % 32 == 0, module, "block_size", data["block_size"], "32, which divides K"
    )
    kwargs = data.get("act_quant_kwargs")
    mode = "FLOOR" if kwargs is None else kwargs.get("scaling_mode", "FLOOR")
    _need(mode in ("FLOOR", "CEIL", "EVEN", "RCEIL"), module, "scaling_mode", mode, "FLOOR, CEIL, EVEN or RCEIL")
    if kwargs is not None:
        said = kwargs.get("elem_dtype", "float8_e4m3fn"), kwargs.get("block_size", 32)
        _need(said == (data["elem_dtype"], 32), module, "x as", said, "the weight's type in blocks of 32")
    dtype, swizzled = _floating(module, data, "orig_dtype"), bool(data.get("is_swizzled_scales"))
    return MXTensor(module.n, module.k, dtype, element, swizzled, mode, kwargs is not None)


def _nvfp4(module: Module, data: Data) -> AoTensor:
    _need(
        data["block_size"] == 16 and module.k % 16 == 0, module, "block_size", data["block_size"], "16, which divides K"
    )
    kwargs = data.get("act_quant_kwargs")
    act = None if kwargs is None else bool(kwargs.get("use_dynamic_per_tensor_scale"))
    dtype, swizzled = _floating(module, data, "orig_dtype"), bool(data.get("is_swizzled_scales"))
    return NVFP4Tensor(module.n, module.k, dtype, swizzled, act=act)


_CLASSES = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tiles,
    "Float8Tensor": _float8,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
}
