"""SINQ: codes in tiles with scales of rows and columns that even the tile out; data-free, with a sidecar of facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import sinq_rounding as rounding
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.sinq import Sinq as SinqFormat
    from qcompile.formats.sinq import SinqSquare
    from qcompile.program import Module
    from qcompile.sources import TensorSource

SIDECAR = "model.safetensors.index.json.meta.json"
WIDTHS = (8, 6, 5, 4, 3, 2, 1)
PACKING = {8: "8bit_u8", 6: "6bit_32", 5: "5bit_32", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
# What the package calls the two methods of transformers' configs, and the parts of which its own names are made.
STORED_AS = {"sinq": "sinq_quantAux", "asinq": "sinq_awq_l1_quantAux"}
PARTS = ("sinq", "rtn", "dual", "hqq", "awq", "l1", "l2", "nf4", "nf3", "noz", "quantaux", "nogemlite")
LEAST = 16  # columns of a tile that the package still takes
# The format's name of a stored number -> the checkpoint's.
NAMES = {f"{name}_{part}": f"meta.{name}.{part}" for name in ("scale", "zero") for part in "xsm"}
NAMES |= {"W_q": "W_q", "scale": "meta.scale", "zero": "meta.zero", "scale2": "meta.scale2"}


@dataclass(frozen=True)
class SinqConfig(MethodConfig):
    """The fields of transformers' SinqConfig, with `algorithm` for what it calls "method".

    `nbits` 1 to 6 or 8; `group_size` columns to a tile, halved where it does not divide the inputs ("1D": a tile has all
    outputs; "2D": it is square, and divides both). `algorithm` "sinq"; "asinq" is read only; or one of the package's own names,
    which say whether scales have 8 bits ("sinq_nf4", "sinq_noz_quantAux", "rtn"); those with "awq" or "hqq" are read only.
    No list of `modules_to_not_convert` is an empty one.
    """

    method: ClassVar[str] = "sinq"
    foreign: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("_extra_kwargs", "sinq", "backend", "quantization_method", "sinq_version"), ""
    )

    nbits: int = 4
    group_size: int = 64
    tiling_mode: str = "1D"
    algorithm: str = "sinq"
    modules_to_not_convert: list[str] | None = None

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "method" in data:
            data["algorithm"] = str(data.pop("method")).lower()
        for name in ("nbits", "group_size"):
            if isinstance(data.get(name), str) and data[name].isdigit():  # as transformers, which takes int() of both
                data[name] = int(data[name])
        return data

    def __post_init__(self) -> None:
        self.require(type(self.nbits) is int and self.nbits in WIDTHS, "nbits", ", ".join(map(str, WIDTHS)))
        group = self.group_size
        self.require(type(group) is int and group > 0 and group % 8 == 0, "group_size", "a multiple of 8")
        self.require(self.tiling_mode in ("1D", "2D"), "tiling_mode", "'1D' or '2D'")
        parts = self.algorithm.split("_")
        known = self.algorithm in STORED_AS or all(part in PARTS for part in parts)
        self.require(known, "algorithm", f"sinq, asinq, or parts joined by _: {', '.join(PARTS)}")
        wide = 4 if "nf4" in parts else 3 if "nf3" in parts else self.nbits
        self.require(self.nbits == wide, "nbits", f"{wide}, the bits of {self.algorithm}")
        self.require("noz" not in parts or self.nbits > 2, "nbits", f"3 or more for {self.algorithm}")
        self.require_patterns("modules_to_not_convert")

    def to_dict(self) -> dict[str, Any]:
        said = super().to_dict()
        return {"method" if name == "algorithm" else name: value for name, value in said.items()}

    @property
    def stored_as(self) -> str:
        """What the package calls the algorithm in a checkpoint."""
        return STORED_AS.get(self.algorithm, self.algorithm.replace("quantaux", "quantAux"))


class Sinq(Method):
    """quant_method "sinq".

    Weights are decoded in float32, as the package does under bfloat16; it rounds the result to the compute dtype, and under
    float16 every step. The columns' scales of 1D tiles multiply x, as its fast kernel has it.
    """

    name = "sinq"
    source = "https://arxiv.org/abs/2509.22944"
    Config = SinqConfig
    formats = ("sinq", "sinq-square")
    indexed = True

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".W_q") or name == "W_q" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(SinqConfig, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        patterns = config.modules_to_not_convert or ()
        skip.check("modules_to_not_convert", patterns, modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        if dense or module.tied:  # the original leaves a tied head without any weight
            return Skip(dense or f"its weight is tied to {', '.join(module.tied)}")
        return Quantized(self._format(config, module))

    def _format(self, config: SinqConfig, module: Module) -> SinqFormat | SinqSquare:
        """How a module's weight is stored when it is quantized on the fly."""
        from qcompile.formats.sinq import Sinq as SinqFormat
        from qcompile.formats.sinq import SinqSquare

        name = config.stored_as
        if "awq" in name or "hqq" in name:
            raise ConfigError(
                f"{config.algorithm} cannot quantize on the fly",
                where="field 'method'",
                found=repr(config.algorithm),
                expected="'sinq', or a checkpoint that was quantized with it",
                remedy="quantize with the sinq package and activations, or choose the method 'sinq'",
            )
        group, whole = config.group_size, config.tiling_mode == "1D"
        while whole and group >= LEAST and module.k % group:
            group //= 2
        if whole and group < LEAST:
            raise ConfigError(
                "sinq cannot tile this module's weight",
                where=f"{module.path} [{module.n}, {module.k}]",
                found=f"K = {module.k}, groups of {config.group_size}",
                expected=f"a multiple of {LEAST} or more of the group halved",
                remedy="leave the module dense by modules_to_not_convert",
            )
        kind = SinqFormat if whole else SinqSquare
        table = "nf4" if "nf4" in name else "nf3" if "nf3" in name else ""
        zero = float((2**config.nbits - 1) // 2) if "noz" in name else None
        fmt = kind(config.nbits, group, "quantAux" in name, cast(Any, table), zero)
        stored.legal(fmt, module, self.name)
        return fmt

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        stored.need_dense(names, "W_q", module, self.name)
        stored.refuse_both(names, "W_q", module, self.name)
        if "W_q" not in names:
            return Skip("the checkpoint stores its weight dense")
        meta = _facts(module, source)
        nested = "meta.scale.x" in names
        parts = ("meta.scale.x", "meta.scale.s", "meta.scale.m") if nested else ("meta.scale",)
        stored.require(names, ("W_q", *parts, "meta.scale2"), module, self.name)
        fmt, claims = self._read_format(module, source, names, meta, nested)
        stored.legal(fmt, module, self.name)
        used = {s.name: names.get(NAMES[s.name], "") for s in fmt.stored(module.n, module.k)}
        stored.require(names, [NAMES[name] for name in used], module, self.name)
        stored.expect_all(fmt, used, source, module)
        if fmt.kind == "sinq":
            stored.expect(names["meta.scale2"], source, (fmt.dtype,), (1, module.k), module)
            claims = (*claims, names["meta.scale2"])
        return Quantized(fmt, used, claims)

    def _read_format(
        self, module: Module, source: TensorSource, names: Mapping[str, str], meta: Mapping[str, Any], nested: bool
    ) -> tuple[SinqFormat | SinqSquare, tuple[str, ...]]:
        """The format that the sidecar's facts and the headers describe, and the tensors that are read into it."""
        from qcompile.formats.sinq import Sinq as SinqFormat
        from qcompile.formats.sinq import SinqSquare

        def refuse(name: str, expected: str) -> CheckpointError:
            return CheckpointError(
                f"a module quantized with sinq has a wrong {name}",
                where=f"{SIDECAR}, {module.path}",
                found=repr(meta.get(name)),
                expected=expected,
                remedy="the checkpoint does not belong to this architecture, or the file is damaged",
            )

        if meta.get("shape") != [module.n, module.k]:
            raise refuse("shape", f"{[module.n, module.k]}")
        packing = meta.get("packing") or PACKING.get(meta.get("nbits", 0))
        bits = next((bits for bits, text in PACKING.items() if text == packing), None)
        if bits is None:
            raise refuse("packing", ", ".join(PACKING.values()))
        if not isinstance(meta.get("method"), str):
            raise refuse("method", "the name of a method")
        shape = meta.get("scale.shape", list(source.info(names[NAMES["scale_x" if nested else "scale"]]).shape))
        group = source.info(names["W_q"]).shape[-1] if source.info(names["W_q"]).shape else 0
        if not isinstance(shape, list) or len(shape) not in (2, 3) or group < 1:
            raise refuse("scale.shape", "[rows, 1] or [tiles, rows, 1]")
        zero, claims = self._one_zero(module, source, names, meta)
        table = next((table for table in ("nf4", "nf3") if table in meta["method"]), "")
        dtype = source.info(names["meta.scale2"]).dtype
        kind = SinqFormat if len(shape) == 2 else SinqSquare
        return kind(bits, group, nested, cast(Any, table), zero, cast(Any, dtype if dtype in DTYPES else "f16")), claims

    def _one_zero(
        self, module: Module, source: TensorSource, names: Mapping[str, str], meta: Mapping[str, Any]
    ) -> tuple[float | None, tuple[str, ...]]:
        """The zero of a whole layer ("noz"), and the tensors that say it; None where every row of a tile has its own."""
        if "noz" not in str(meta.get("method")):
            return None, ()
        held = [names[name] for name in ("meta.zero", "meta.zero.x", "meta.zero.s", "meta.zero.m") if name in names]
        numbers = [source.read(name).float().reshape(-1) for name in held]
        if any(len(number) != 1 for number in numbers) or len(held) not in (0, 1, 3):
            raise CheckpointError(
                "a module quantized with sinq_noz has more than one zero",
                where=module.path,
                found=", ".join(held),
                expected="a single number",
                remedy="the file is damaged",
            )
        if len(numbers) == 3:
            return float(numbers[0] * numbers[1].nan_to_num(0) + numbers[2]), tuple(held)
        return float(numbers[0] if numbers else meta["zero"]), tuple(held)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        packed = super().read(config, module, selected, source)
        if packed.format.kind == "sinq":
            name = next(name for name in selected.also_claims if name.endswith(".scale2"))
            packed = _scaled(packed, stored.finite(source.read(name), name, module))
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """The package's quantizer on a CPU, bit for bit; its deviations come out otherwise on other devices."""
        from qcompile.pack import pack

        config = cast(SinqConfig, config)
        fmt, n, k = self._format(config, module), module.n, module.k
        tall, wide = fmt.tall or n, k // fmt.group
        half = stored.usable(weight, module).half()
        tiles = half.reshape(n // tall, tall, wide, fmt.group).permute(0, 2, 1, 3).reshape(-1, tall, fmt.group)
        made = rounding.quantize(tiles, config.stored_as, config.nbits)

        def flat(numbers: torch.Tensor) -> torch.Tensor:
            """The numbers of rows of tiles [T, tall, 1] in the order in which they are stored."""
            return numbers if fmt.tall else numbers.transpose(0, 1)

        def whole(numbers: torch.Tensor) -> torch.Tensor:
            """Numbers of rows of tiles [T, tall, any] (1 or all columns), for every weight."""
            placed = numbers.expand(-1, -1, fmt.group).reshape(n // tall, wide, tall, fmt.group)
            return placed.permute(0, 2, 1, 3).reshape(n, k)

        def back(stored_: torch.Tensor) -> torch.Tensor:
            """The inverse of `flat`."""
            return stored_.reshape(-1, tall, 1) if fmt.tall else stored_.reshape(tall, -1, 1).transpose(0, 1)

        fields = {"code": whole(made.code).to(torch.int32)}
        for name, numbers in (("scale", made.scale), ("zero", made.zero)):
            if isinstance(numbers, float):
                continue
            if not fmt.nested:
                fields[name] = whole(numbers)
                continue
            ranges = 32 if name == "scale" else numbers.numel()
            codes, step, least = rounding.eight_bits(flat(numbers), ranges)
            for part, value in (("x", codes), ("s", step.expand_as(codes)), ("m", least.expand_as(codes))):
                fields[f"{name}_{part}"] = whole(back(value))
        if fmt.tall:
            fields["scale2"] = whole(made.scale2.expand(-1, tall, -1))
        packed = stored.packed(fmt, pack(fmt, fields, n, k), module)
        return packed if fmt.tall else _scaled(packed, made.scale2)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        out = {NAMES[name]: tensor for name, tensor in packed.tensors.items()}
        fmt = cast("SinqFormat", packed.format)
        if packed.before:
            out["meta.scale2"] = packed.before[0].tensors["scale"].reshape(1, packed.K)
        if fmt.zero is not None:
            out["meta.zero"] = torch.tensor(fmt.zero, dtype=DTYPES[fmt.dtype])
        return out

    def sidecars(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """The facts of every quantized module that its tensors do not tell."""
        config = cast(SinqConfig, config)
        return {SIDECAR: {path: {"meta": self._meta(config, packed)} for path, packed in weights.items()}}

    def _meta(self, config: SinqConfig, packed: Packed) -> dict[str, Any]:
        fmt = cast("SinqFormat", packed.format)
        rows = packed.N * packed.K // fmt.group
        shape = [fmt.tiles(packed.N, packed.K), fmt.tall, 1] if fmt.tall else [rows, 1]
        shapes = {"scale.shape": shape, "zero.shape": shape} if fmt.nested else {}
        return {
            "nbits": fmt.bits,
            "group_size": config.group_size,
            "shape": [packed.N, packed.K],
            "awq_scale": None,
            "axis": 1,
            "packing": PACKING[fmt.bits],
            "method": config.stored_as,
            "compute_dtype": "torch.bfloat16",  # as transformers has it by default
            "unpack_view_dtype": str(packed.tensors["W_q"].dtype),
            "view_as_float": False,
            **shapes,
        }


def _scaled(packed: Packed, scale2: torch.Tensor) -> Packed:
    """A weight of 1D tiles with its columns' scales, K of them, on x."""
    from qcompile.dtypes import NAMES as DTYPE_NAMES
    from qcompile.transform import Applied
    from qcompile.transforms.linear import Scale

    scale = Applied(Scale(DTYPE_NAMES[scale2.dtype]), {"scale": scale2.reshape(packed.K)})
    return replace(packed, before=(scale,))


def _facts(module: Module, source: TensorSource) -> dict[str, Any]:
    """What the sidecar says about a module; CheckpointError when it says nothing."""
    sidecar = source.sidecar(SIDECAR)
    known = {} if sidecar is None else sidecar
    path = module.weight.removesuffix(".weight")
    found = known.get(path, known.get(module.path))
    if not isinstance(found, dict) or not isinstance(found.get("meta"), dict):
        raise CheckpointError(
            "a module quantized with sinq is not described",
            where=f"{module.path}, {source.describe()}",
            found="no such file" if sidecar is None else f"{len(known)} other modules",
            expected=f"an entry of {path!r} in {SIDECAR}",
            remedy="the checkpoint is incomplete: get that file too",
        )
    meta: dict[str, Any] = found["meta"]
    return meta
