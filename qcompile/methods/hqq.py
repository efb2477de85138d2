"""HQQ: affine codes with a float zero that a data-free solver places; a checkpoint describes itself."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError, ConfigError, near
from qcompile.methods import stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.skip import check

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.hqq import Hqq as HqqFormat
    from qcompile.program import Module
    from qcompile.sources import TensorSource

CHUNK = 1 << 17  # weights the solver works on at a time
WIDTH = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1.58: 2, 1: 1}  # nbits -> bits of a stored code
PACKING = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
# Stored with each module beside W_q, scale and zero: they describe the weight.
DESCRIPTION = (
    "shape", "nbits", "group_size", "axis", "packing", "compute_dtype", "unpack_view_dtype", "view_as_float",
    "channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero", "offload_meta", "stores_quant_config",
    "encoded_state_dict",
)  # fmt: skip
NEEDED = ("W_q", "scale", "zero", "shape", "group_size", "axis", "packing", "compute_dtype")


@dataclass(frozen=True)
class HqqLayer:
    """How one kind of layer is quantized: hqq's `weight_quant_params`. `round_zero` None means that nbits is 4."""

    nbits: float = 4
    group_size: int | None = 64
    view_as_float: bool = False
    axis: int = 1
    channel_wise: bool = True
    optimize: bool = True
    round_zero: bool | None = None

    def params(self) -> dict[str, Any]:
        """The dict that hqq writes into config.json."""
        weight = asdict(self) | {"round_zero": self.nbits == 4 if self.round_zero is None else self.round_zero}
        return {
            "weight_quant_params": weight,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        }


@dataclass(frozen=True)
class HqqConfig(MethodConfig):
    """The fields of transformers' HqqConfig, and the `quant_config` that it saves instead of the first five.

    `nbits` 8, 6, 5, 4, 3, 2, 1.58 or 1; `group_size` a multiple of 8, or None for whole rows; `axis` 1: groups run
    along the inputs, 0: across the flattened weight. `dynamic_config` maps a linear tag ("self_attn.q_proj") to such
    fields; tags that it lacks stay dense. `skip_modules` are tags.
    """

    method: ClassVar[str] = "hqq"
    steering: ClassVar[Mapping[str, str]] = {"view_as_float": "codes are kept as integers: the same bytes"}

    nbits: float = 4
    group_size: int | None = 64
    view_as_float: bool = False
    axis: int | None = None
    dynamic_config: Mapping[str, Mapping[str, Any]] | None = None
    skip_modules: list[str] = field(default_factory=lambda: ["lm_head"])
    quant_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.require_patterns("skip_modules")
        self.require(self.axis in (None, 0, 1), "axis", "0 or 1")
        self.layers()

    def layers(self) -> HqqLayer | dict[str, HqqLayer]:
        """How every layer is quantized, or how the layers of each tag are."""
        saved = self.quant_config
        if saved is not None and "weight_quant_params" in saved:
            return self._saved(saved, "quant_config")
        if saved is not None:
            return {tag: self._saved(value, f"quant_config, {tag!r}") for tag, value in saved.items()}
        if self.dynamic_config is not None:
            return {tag: self._layer(value, f"dynamic_config, {tag!r}") for tag, value in self.dynamic_config.items()}
        return self._layer(
            {"nbits": self.nbits, "group_size": self.group_size, "view_as_float": self.view_as_float,
             "axis": 1 if self.axis is None else self.axis}, "")  # fmt: skip

    def quantizes_scales(self) -> bool:
        """Whether the saved config asks for what hqq has withdrawn and ignores: scales or zeros of fewer bits."""
        saved = self.quant_config or {}
        layers = [saved] if "weight_quant_params" in saved else [value for value in saved.values() if value]
        return any(layer.get(name) for layer in layers for name in ("scale_quant_params", "zero_quant_params"))

    def _saved(self, value: Any, where: str) -> HqqLayer:
        if not isinstance(value, Mapping) or not isinstance(value.get("weight_quant_params"), Mapping):
            raise ConfigError(
                "the hqq config has no weight_quant_params",
                where=f"field {where}",
                found=repr(value)[:200],
                expected="{'weight_quant_params': {'nbits': 4, 'group_size': 64, ...}, ...}",
            )
        return self._layer(value["weight_quant_params"], where)

    def _layer(self, value: Mapping[str, Any], where: str) -> HqqLayer:
        known = tuple(HqqLayer.__dataclass_fields__)
        for name in value:
            if name not in known and name not in ("quant_zero", "quant_scale", "offload_meta"):
                raise ConfigError(
                    "unknown field in the hqq config",
                    where=f"field {where}",
                    found=f"{name!r}{near(name, known)}",
                    expected=", ".join(known),
                    remedy="correct the name, or leave the field out",
                )
        layer = HqqLayer(**{name: item for name, item in value.items() if name in known})
        group = layer.group_size
        for name, ok, expected in (
            ("nbits", layer.nbits in WIDTH and not isinstance(layer.nbits, bool), ", ".join(map(str, WIDTH))),
            (
                "group_size",
                group is None or (type(group) is int and group > 0 and group % 8 == 0),
                "None or a multiple of 8",
            ),
            ("axis", layer.axis in (0, 1), "0 or 1"),
            ("channel_wise", layer.channel_wise is True, "True: one scale for a whole weight is not supported"),
        ):
            if not ok:
                raise ConfigError(
                    "the hqq config has a value out of range",
                    where=f"field {where}, {name!r}" if where else f"field {name!r}",
                    found=repr(getattr(layer, name)),
                    expected=expected,
                )
        return layer

    def to_dict(self) -> dict[str, Any]:
        """As transformers saves it: `quant_config` and `skip_modules`."""
        layers = self.layers()
        saved = (
            layers.params() if isinstance(layers, HqqLayer) else {tag: layer.params() for tag, layer in layers.items()}
        )
        return {"quant_method": self.method, "quant_config": saved, "skip_modules": list(self.skip_modules)}


def tag(path: str) -> str:
    """A module's linear tag: its path without "model", "layers" and numbers.

    >>> tag("model.layers.31.self_attn.k_proj")
    'self_attn.k_proj'
    """
    return ".".join(part for part in path.split(".") if part not in ("model", "layers") and not part.isnumeric())


def optimize(weight: torch.Tensor, layer: HqqLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HQQ's half-quadratic solver: f32 codes, scale, zero of a grouped weight [groups, size] (axis 0: [size, groups]).

    The scale is found once; the zero moves for at most 20 rounds, until the mean error of the whole tensor stops
    falling. Source: hqq 0.2.8, `optimize_weights_proximal_legacy` (its beta never changes); every operation is in its
    order, since the result is compared bit for bit.
    """
    axis, top = layer.axis, round(2**layer.nbits - 1)
    lo, hi = weight.amin(axis, keepdim=True), weight.amax(axis, keepdim=True)
    scale = top / (hi - lo)
    scale = torch.where((hi - lo).abs() <= 1e-4, torch.ones_like(scale), scale).clamp(max=2e4)
    zero = -lo * scale
    if layer.round_zero if layer.round_zero is not None else layer.nbits == 4:
        zero = torch.round(zero)
    best, errors = float("inf"), torch.empty_like(weight)
    for _ in range(20 if layer.optimize else 0):
        # Groups do not meet before the mean error: rows are taken a cache's worth at a time. Columns are not, because
        # the order in which a column is summed, and so its last bit, depends on the columns beside it.
        step = max(1, CHUNK // weight.shape[1]) if axis == 1 else weight.shape[0]
        moved = [
            _move(w, s, z, top, axis, out)
            for w, s, z, out in zip(
                torch.split(weight, step),
                torch.split(scale, step if axis == 1 else 1),
                torch.split(zero, step if axis == 1 else 1),
                torch.split(errors, step),
                strict=True,
            )
        ]
        zero, error = torch.cat(moved), float(errors.mean())
        if not error < best:
            break
        best = error
    return (weight * scale).add_(zero).round_().clamp_(0, top), 1.0 / scale, zero


def _move(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int, axis: int, errors: torch.Tensor
) -> torch.Tensor:
    """The next zero of some groups; the size of what is lost with the present one goes to `errors`."""
    code = (weight * scale).add_(zero).round_().clamp_(0, top)
    lost = weight - (code - zero).div_(scale)
    torch.abs(lost, out=errors)
    shrunk = errors.pow(0.7 - 1).mul_(1.0 / 10.0)
    torch.sub(errors, shrunk, out=shrunk).clamp_min_(0.0).mul_(lost.sign_())
    return torch.mean(code - (weight - shrunk).mul_(scale), dim=axis, keepdim=True)


class Hqq(Method):
    """quant_method "hqq"."""

    name = "hqq"
    source = "https://github.com/mobiusml/hqq"
    Config = HqqConfig
    formats = ("hqq",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".W_q") or name == "W_q" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(HqqConfig, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        if module.kind != "Linear":
            return Skip(f"{module.kind} is not converted by the method (only Linear)")
        tags = {path: tag(path) for path in modules}
        if list(config.skip_modules) != ["lm_head"]:  # the default names a head that not every model has
            check("skip_modules", config.skip_modules, tags.values(), self.name, operator.eq)
        if tag(module.path) in config.skip_modules:
            return Skip(f"skip_modules has {tag(module.path)!r}")
        layer = self._layer(config, module, tuple(tags.values()))
        if layer is None:
            return Skip(f"the config has no entry for {tag(module.path)!r}")
        fmt = self._format(WIDTH[layer.nbits], layer.group_size, layer.axis, module)
        stored.legal(fmt, module, self.name)
        return Quantized(fmt)

    def _layer(self, config: HqqConfig, module: Module, tags: tuple[str, ...] = ()) -> HqqLayer | None:
        layers = config.layers()
        if isinstance(layers, HqqLayer):
            return layers
        if tags:
            check("dynamic_config", layers, tags, self.name, operator.eq)
        return layers.get(tag(module.path))

    def _format(self, bits: int, group: int | None, axis: int, module: Module, dtype: str = "") -> HqqFormat:
        from qcompile.formats.hqq import Hqq as HqqFormat

        whole = module.k if axis == 1 else module.n
        return HqqFormat(bits=bits, group=group or whole, axis=axis, dtype=dtype or module.dtype)

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        stored.need_dense(names, "W_q", module, self.name)
        stored.refuse_both(names, "W_q", module, self.name)
        if "W_q" not in names:
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, NEEDED, module, self.name)
        described = {name: source.read(names[name]) for name in DESCRIPTION if name in names}

        def refuse(name: str, found: object, expected: str) -> CheckpointError:
            return CheckpointError(
                f"a module quantized with hqq has a wrong {name}",
                where=names[name],
                found=found,
                expected=expected,
                remedy="the checkpoint does not belong to this architecture, or the file is damaged",
            )

        for name in ("quant_scale", "quant_zero"):
            if name in described and bool(described[name].any()):
                raise refuse(
                    name, True, "False: hqq stores scales and zeros that are themselves quantized only in pickles"
                )
        if described["shape"].tolist() != [module.n, module.k]:
            raise refuse("shape", described["shape"].tolist(), f"{[module.n, module.k]}")
        packing, dtype = (_text(described[name]) for name in ("packing", "compute_dtype"))
        dtype = dtype.removeprefix("torch.")
        short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}.get(dtype)
        if packing not in PACKING:
            raise refuse("packing", repr(packing), ", ".join(PACKING))
        if short is None:
            raise refuse("compute_dtype", repr(dtype), "float16, bfloat16 or float32")
        axis, group = int(described["axis"]), int(described["group_size"])
        if axis not in (0, 1):
            raise refuse("axis", axis, "0 or 1")
        if group < 1:
            raise refuse("group_size", group, "a positive number")
        fmt = self._format(PACKING[packing], group, axis, module, short)
        stored.legal(fmt, module, self.name)
        used = {s.name: names[s.name] for s in fmt.stored(module.n, module.k)}
        for s in fmt.stored(module.n, module.k):
            if s.name == "W_q" and bool(described.get("view_as_float", torch.zeros(1)).any()):
                columns = s.shape[1] * DTYPES[s.dtype].itemsize // DTYPES[short].itemsize  # 3 bits: i32, wider than f16
                stored.expect(used[s.name], source, (short,), (s.shape[0], columns), module)
            else:
                stored.expect(used[s.name], source, (s.dtype,), s.shape, module)
        return Quantized(fmt, used, tuple(names[name] for name in described))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        tensors = {}
        for s in selected.format.stored(module.n, module.k):
            tensor = source.read(selected.names[s.name])
            if s.name == "W_q":  # perhaps viewed as the compute dtype: the same bytes
                tensors[s.name] = tensor.contiguous().view(DTYPES[s.dtype])
            else:
                tensors[s.name] = stored.finite(tensor, selected.names[s.name], module)
        return stored.packed(selected.format, tensors, module)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """HQQ's solver in float32, as hqq runs it on a CPU (on CUDA it uses float16)."""
        from qcompile.pack import pack

        layer = self._layer(cast(HqqConfig, config), module)
        if layer is None:
            raise ConfigError("the hqq config does not quantize this module", where=module.path, found=tag(module.path))
        fmt = self._format(WIDTH[layer.nbits], layer.group_size, layer.axis, module)
        stored.legal(fmt, module, self.name)
        flat = stored.usable(weight, module)
        grouped = flat.reshape(-1, fmt.group) if layer.axis == 1 else flat.reshape(fmt.group, -1)
        code, scale, zero = optimize(grouped, layer)
        dtype = DTYPES[fmt.dtype]

        def whole(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return part.to(dtype).expand_as(grouped).reshape(module.n, module.k)

        fields = {"code": whole(code, torch.int32), "zero": whole(zero, dtype), "scale": whole(scale, dtype)}
        return stored.packed(fmt, pack(fmt, fields, module.n, module.k), module)

    def effects(self, config: MethodConfig) -> list[tuple[str, str]]:
        withdrawn = ("quant_config", "scales and zeros stay floats, as in hqq, which has withdrawn their quantization")
        return super().effects(config) + ([withdrawn] if cast(HqqConfig, config).quantizes_scales() else [])

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        fmt, layer = cast("HqqFormat", packed.format), self._layer(cast(HqqConfig, config), module) or HqqLayer()
        nbits = layer.nbits if WIDTH[layer.nbits] == fmt.bits else fmt.bits
        rounds = nbits == 4 if layer.round_zero is None else layer.round_zero
        numbers = {"nbits": nbits, "group_size": fmt.group, "axis": fmt.axis}
        flags = {
            "view_as_float": False, "channel_wise": True, "optimize": layer.optimize, "round_zero": rounds,
            "quant_scale": False, "quant_zero": False, "offload_meta": False, "stores_quant_config": True,
            "encoded_state_dict": True,
        }  # fmt: skip
        texts = {
            "packing": next(text for text, bits in PACKING.items() if bits == fmt.bits),
            "compute_dtype": str(DTYPES[fmt.dtype]),
            "unpack_view_dtype": str(packed.tensors["W_q"].dtype),
        }
        return {
            **packed.tensors,
            "shape": torch.tensor([packed.N, packed.K]),
            **{n: torch.tensor(v, dtype=None if isinstance(v, float) else torch.int32) for n, v in numbers.items()},
            **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
        }


def _text(codes: torch.Tensor) -> str:
    """The ASCII text that hqq stores as one u8 per character."""
    return "".join(chr(code) for code in codes.reshape(-1)[:64].tolist())
