"""bitsandbytes: nf4 and fp4 tables with block scales (plain or themselves quantized), and int8 rows; data-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import CheckpointError
from qcompile.formats.bitsandbytes import Bnb4, BnbInt8
from qcompile.formats.tables import entries
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip, without_effect
from qcompile.transform import Applied
from qcompile.transforms.llm_int8 import LlmInt8

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

STORAGE = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")
STATE = "weight.quant_state.bitsandbytes__"
TABLES = ("fp4", "nf4")
BLOCK, NESTED_BLOCK = 64, 256
_CHUNK = 1 << 22  # weights quantized at a time: bounds the float32 temporaries to some tens of megabytes


@dataclass(frozen=True)
class BnbConfig(MethodConfig):
    """The fields of transformers' BitsAndBytesConfig; dtypes are names ("bfloat16") or torch dtypes."""

    method: ClassVar[str] = "bitsandbytes"
    steering: ClassVar[Mapping[str, str]] = {
        "llm_int8_enable_fp32_cpu_offload": "modules are not spread over devices",
        "bnb_4bit_quant_storage": "codes are kept as bytes: the same bits",
    }

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: str = "float32"
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: str = "uint8"

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        for name in ("load_in_8bit", "load_in_4bit"):  # transformers saves both spellings
            doubled = data.pop(f"_{name}", None)
            if doubled is not None:
                data.setdefault(name, doubled)
        return data

    def __post_init__(self) -> None:
        for name, default in (("bnb_4bit_compute_dtype", "float32"), ("bnb_4bit_quant_storage", "uint8")):
            value = getattr(self, name)
            value = default if value is None else str(value).removeprefix("torch.")
            object.__setattr__(self, name, value)
        self.require_bools(
            "load_in_8bit", "load_in_4bit", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
            "bnb_4bit_use_double_quant",
        )  # fmt: skip
        self.require(
            self.load_in_8bit != self.load_in_4bit,
            "load_in_4bit",
            "exactly one of load_in_4bit and load_in_8bit is True",
        )
        self.require(isinstance(self.llm_int8_threshold, float), "llm_int8_threshold", "a float, such as 6.0")
        self.require_patterns("llm_int8_skip_modules")
        self.require(self.bnb_4bit_quant_type in TABLES, "bnb_4bit_quant_type", "'fp4' or 'nf4'")
        computes = ("float32", "float16", "bfloat16", "float64")
        self.require(self.bnb_4bit_compute_dtype in computes, "bnb_4bit_compute_dtype", ", ".join(computes))
        self.require(self.bnb_4bit_quant_storage in STORAGE, "bnb_4bit_quant_storage", ", ".join(STORAGE))
        self.require(
            not (self.llm_int8_has_fp16_weight and self.load_in_8bit),
            "llm_int8_has_fp16_weight",
            "False: weights that are quantized again at every call are for training",
        )


def nearest(weight: torch.Tensor, table: tuple[float, ...], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes u8 [n] and block scales f32 of a flat f32 weight [n]: the entry of `table` nearest to weight / absmax.

    Source: bitsandbytes 0.50, `quantize_4bit` for CPUs: full blocks are multiplied by the reciprocal of absmax, a short
    last block is divided by it, and a tie goes to the lower entry.
    """
    values = torch.tensor(table, dtype=torch.float32)
    order = torch.argsort(values, stable=True)  # fp4 has two zeros: 0, then 8
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    to_code = order.to(torch.uint8)
    codes, scales = torch.empty(weight.numel(), dtype=torch.uint8), []

    def encode(scaled: torch.Tensor) -> torch.Tensor:
        return to_code[torch.bucketize(scaled.clamp_(-1, 1), midpoints, out_int32=True)]

    full = weight.numel() // block * block
    for start in range(0, full, _CHUNK):
        blocks = weight[start : min(start + _CHUNK, full)].view(-1, block)
        absmax = blocks.abs().amax(1)
        codes[start : start + blocks.numel()] = encode(blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
        scales.append(absmax)
    if full < weight.numel():
        absmax = weight[full:].abs().amax().clamp(min=1e-38)
        codes[full:] = encode(weight[full:] / absmax)
        scales.append(absmax[None])
    return codes, torch.cat(scales)


def quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Double quantization of block scales f32 [n]: codes u8 [n] of the "dynamic" table, their scales f32, the offset.

    Source: bitsandbytes 0.50, the compiled `quantize_blockwise` for CPUs: a value is first moved to the nearest of
    65536 points of [-1, 1], and that point's nearest entry is taken.
    """
    offset = scales.mean()
    table = torch.tensor(entries("dynamic"), dtype=torch.float32)
    centred = torch.nn.functional.pad(scales - offset, (0, -scales.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = centred.abs().amax(1, keepdim=True)
    point = ((centred * (1.0 / absmax)).clamp_(-1, 1) + 1.0) * 32767.5 + 0.5
    codes = torch.bucketize(point.floor_() / 32767.5 - 1.0, (table[:-1] + table[1:]) / 2, out_int32=True)
    codes = torch.where(absmax > 0, codes, 0)  # equal scales leave nothing to divide by
    return codes.to(torch.uint8).view(-1)[: scales.numel()], absmax.view(-1), float(offset)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LLM.int8()'s weight: codes i8 [N, K] and row scales f32 [N] (the absmax), always by way of float16."""
    half = weight.half().float()
    scale = half.abs().amax(1)
    return torch.nan_to_num(torch.round(half * (127.0 / scale)[:, None])).to(torch.int8), scale


class Bnb(Method):
    """quant_method "bitsandbytes".

    4-bit weights are worth their float32 product, which the package rounds to the dtype that it computes in.
    """

    name = "bitsandbytes"
    source = "https://arxiv.org/abs/2208.07339 and https://arxiv.org/abs/2305.14314"
    Config = BnbConfig
    formats = ("bnb4", "bnb-int8")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".SCB") or name == "SCB" or STATE in name for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(BnbConfig, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        patterns = config.llm_int8_skip_modules
        skip.check("llm_int8_skip_modules", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "llm_int8_skip_modules", patterns, kinds=("Linear", "Conv1D"))
        if dense:
            return Skip(dense)
        return Quantized(self._format(config))

    def _format(self, config: BnbConfig) -> Bnb4 | BnbInt8:
        """The format to quantize to; the offset of nested scales depends on the weight."""
        if config.load_in_8bit:
            return BnbInt8()
        return Bnb4(config.bnb_4bit_quant_type, BLOCK, NESTED_BLOCK if config.bnb_4bit_use_double_quant else 0)

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        stored.require(names, ("weight",), module, self.name)
        if "SCB" in names:
            return self._stored_int8(module, names, source)
        if not any(name.startswith(STATE) for name in names):
            return Skip("the checkpoint stores its weight dense")
        return self._stored_4bit(module, names, source)

    def _stored_int8(self, module: Module, names: dict[str, str], source: TensorSource) -> Quantized:
        layout = names.get("weight_format")
        if layout is not None and int(source.read(layout)) != 0:
            raise CheckpointError(
                "an int8 weight is stored in an unknown order",
                where=layout,
                found=int(source.read(layout)),
                expected="0, which is row-major",
                remedy="save the model again with a current bitsandbytes",
            )
        fmt = BnbInt8()
        used = {s.name: names[s.name] for s in fmt.stored(module.n, module.k)}
        stored.expect_all(fmt, used, source, module)
        return Quantized(fmt, used, (layout,) if layout else ())

    def _stored_4bit(self, module: Module, names: dict[str, str], source: TensorSource) -> Quantized:
        at = next(name for name in names if name.startswith(STATE))
        state = read_state(source.read(names[at]), names[at], module)
        nested = "nested_offset" in state
        fmt = Bnb4(
            state["quant_type"], state["blocksize"], state["nested_blocksize"] if nested else 0,
            state["nested_offset"] if nested else 0.0,
        )  # fmt: skip
        maps = {"weight.quant_map": fmt.table} | ({"weight.nested_quant_map": "dynamic"} if nested else {})
        inner = {"weight": "weight", "absmax": "weight.absmax", "nested_absmax": "weight.nested_absmax"}
        shapes = {s.name: s for s in fmt.stored(module.n, module.k)}
        stored.require(names, [*maps, *(inner[name] for name in shapes)], module, self.name)
        for name, table in maps.items():
            self._expect_table(names[name], table, module, source)
        used = {name: names[inner[name]] for name in shapes}
        self._expect_bytes(used["weight"], shapes["weight"].shape[0], module, source)
        for name in shapes.keys() - {"weight"}:
            stored.expect(used[name], source, (shapes[name].dtype,), shapes[name].shape, module)
        return Quantized(fmt, used, tuple(names[name] for name in (at, *maps)))

    def _expect_table(self, name: str, table: str, module: Module, source: TensorSource) -> None:
        """The table in the file must be the one that its name stands for, or the weight would mean something else."""
        known = torch.tensor(entries(table), dtype=torch.float32)
        stored.expect(name, source, ("f32",), tuple(known.shape), module)
        if not torch.equal(source.read(name), known):
            raise CheckpointError(
                f"a stored table is not the {table} table",
                where=f"{name} (module {module.path})",
                found=str(source.read(name).tolist()[:4])[:-1] + ", ...]",
                expected=str(known.tolist()[:4])[:-1] + ", ...]",
                remedy="the file is damaged, or was made with a table of its own, which is not supported",
            )

    def _expect_bytes(self, name: str, count: int, module: Module, source: TensorSource) -> None:
        """The packed weight may be labelled with any dtype: only its bytes count."""
        labels = {"u8": 1, "i8": 1, "f16": 2, "bf16": 2, "f32": 4, "float64": 8}
        size = labels.get(source.info(name).dtype, 1)
        stored.expect(name, source, tuple(labels), (-(-count // size), 1), module)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        tensors = {}
        for s in selected.format.stored(module.n, module.k):
            tensor = source.read(selected.names[s.name])
            if s.name == "weight" and s.dtype == "u8":  # a label: float16 "numbers" here are pairs of bytes
                tensors[s.name] = tensor.contiguous().view(torch.uint8).reshape(-1, 1)[: s.shape[0]]
            else:
                tensors[s.name] = stored.finite(tensor, selected.names[s.name], module)
        return self._whole(cast(BnbConfig, config), stored.packed(selected.format, tensors, module))

    def _whole(self, config: BnbConfig, packed: Packed) -> Packed:
        """The packed weight with what LLM.int8() does to its input."""
        if isinstance(packed.format, BnbInt8):
            packed.before = (Applied(LlmInt8(config.llm_int8_threshold)),)
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """The codes and scales that bitsandbytes' CPU path gives, from the weight in float32 (int8: in float16)."""
        config = cast(BnbConfig, config)
        weight = stored.usable(weight, module)
        if config.load_in_8bit:
            codes, scale = quantize_rows(weight)
            return self._whole(config, stored.packed(BnbInt8(), {"weight": codes, "SCB": scale}, module))
        codes, absmax = nearest(weight.reshape(-1), entries(config.bnb_4bit_quant_type), BLOCK)
        fmt = cast(Bnb4, self._format(config))
        # A padding code stands for zero, as the original's padding with 0.0 does.
        zero = nearest(torch.zeros(1), entries(fmt.table), BLOCK)[0]
        codes = torch.cat([codes, zero]) if codes.numel() % 2 else codes
        tensors = {"weight": ((codes[::2] << 4) | codes[1::2])[:, None], "absmax": absmax}
        if fmt.nested:
            tensors["absmax"], tensors["nested_absmax"], offset = quantize_scales(absmax)
            fmt = replace(fmt, offset=offset)
        return stored.packed(fmt, tensors, module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        if isinstance(packed.format, BnbInt8):
            return {**packed.tensors, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        fmt, tensors = cast(Bnb4, packed.format), packed.tensors
        state = {
            "quant_type": fmt.table,
            "blocksize": fmt.block,
            "dtype": {"f16": "float16", "bf16": "bfloat16"}.get(module.dtype, "float32"),
            "shape": [packed.N, packed.K],
        }
        storage: torch.dtype = getattr(torch, cast(BnbConfig, config).bnb_4bit_quant_storage)
        out = {
            "weight": _labelled(tensors["weight"], storage),
            "weight.absmax": tensors["absmax"],
            "weight.quant_map": torch.tensor(entries(fmt.table), dtype=torch.float32),
        }
        if fmt.nested:
            state |= {"nested_blocksize": fmt.nested, "nested_dtype": "float32", "nested_offset": fmt.offset}
            out["weight.nested_absmax"] = tensors["nested_absmax"]
            out["weight.nested_quant_map"] = torch.tensor(entries("dynamic"), dtype=torch.float32)
        out[STATE + fmt.table] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return out

    def effects(self, config: MethodConfig) -> list[tuple[str, str]]:
        config = cast(BnbConfig, config)
        notes = without_effect(config)
        if not config.load_in_8bit and config.bnb_4bit_compute_dtype != "float32":
            notes.append(("bnb_4bit_compute_dtype", "weights are unpacked in float32, which is not rounded further"))
        return notes


def _labelled(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes u8 [n, 1] under the label of another dtype, zeros filling the last element."""
    flat = torch.nn.functional.pad(data.reshape(-1), (0, -len(data) % dtype.itemsize))
    return flat.view(dtype).reshape(-1, 1)


def read_state(data: torch.Tensor, name: str, module: Module) -> dict[str, Any]:
    """The JSON that bitsandbytes stores as u8 bytes beside a 4-bit weight, checked against the module."""

    def refuse(found: object, expected: str) -> CheckpointError:
        return CheckpointError(
            "a 4-bit weight has a wrong quant_state",
            where=f"{name} (module {module.path})",
            found=found,
            expected=expected,
            remedy="the checkpoint does not belong to this architecture, or the file is damaged",
        )

    try:
        state = json.loads(bytes(data.reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise refuse(str(error)[:100], "a JSON object") from None
    if not isinstance(state, dict):
        raise refuse(type(state).__name__, "a JSON object")
    kind = name.rsplit("__", 1)[-1]
    wanted: list[tuple[str, bool, str]] = [
        ("quant_type", state.get("quant_type") == kind and kind in TABLES, f"{kind!r}, as the tensor's name says"),
        ("blocksize", _is_size(state.get("blocksize")), "a power of two from 16 to 4096"),
        ("shape", state.get("shape") == [module.n, module.k], f"{[module.n, module.k]}"),
    ]
    if "nested_offset" in state:
        offset = state["nested_offset"]
        wanted += [
            ("nested_blocksize", _is_size(state.get("nested_blocksize")), "a power of two from 16 to 4096"),
            ("nested_offset", isinstance(offset, float) and math.isfinite(offset), "a finite number"),
        ]
    for field, ok, expected in wanted:
        if not ok:
            raise refuse(f"{field}: {state.get(field)!r}"[:200], f"{field}: {expected}")
    return state


def _is_size(value: object) -> bool:
    return type(value) is int and 16 <= value <= 4096 and value & (value - 1) == 0
