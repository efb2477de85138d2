"""Which of CompressedTensors' layouts a module has in a checkpoint, judged by headers and small tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import compressed_tensors_layout as layouts
from qcompile.methods import stored
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.compressed_tensors_activations import suffixes
from qcompile.methods.compressed_tensors_args import Args, Scheme
from qcompile.methods.compressed_tensors_config import CompressedTensorsConfig

if TYPE_CHECKING:
    from qcompile.format import Format
    from qcompile.formats.bitstream import Bitstream
    from qcompile.program import Module
    from qcompile.sources import TensorSource

METHOD = "compressed-tensors"
_OTHERS = (
    "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point",
    "input_global_scale", "output_scale", "output_zero_point", "output_global_scale", "shape", "bitmask", "row_offsets",
    "meta",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A module with its tensors (name within it -> whole name) and its scheme, None where it has none."""

    config: CompressedTensorsConfig
    scheme: Scheme | None
    names: Mapping[str, str]
    module: Module
    source: TensorSource

    def select(self) -> Skip | Quantized:
        """The format and names of what is there; CheckpointError where something is missing or wrong."""
        scheme, names = self.scheme, self.names
        if "bitmask" in names:
            return self._sparse()
        if scheme is None or scheme.weights is None:
            return self.dense()
        kind, args = self.config.stored_format(scheme), scheme.weights
        if kind == "marlin-24":
            return self._marlin(args)
        fmt = layouts.layout(kind, args, self._scale())
        if "weight_packed" not in names and "weight" in names and self._dtype("weight") in layouts.FLOATS:
            return self._calibrated(fmt)
        stored.refuse_both(names, "weight_packed", self.module, METHOD)
        self._require(*layouts.official(fmt).values())
        if fmt.kind == "bitstream":
            fmt = self._bitstream(fmt)  # type: ignore[arg-type]
        fmt = self._ordered(fmt, args)
        for what, rounded in (("input", scheme.input_activations), ("output", scheme.output_activations)):
            if rounded is not None:
                self._require(*(f"{what}_{suffix}" for suffix in suffixes(rounded)))
        used = {name: names[official] for name, official in layouts.official(fmt).items()}
        layouts.check(fmt, used, self.source, self.module)
        return self._quantized(fmt, used)

    def _dtype(self, name: str) -> str:
        return self.source.info(self.names[name]).dtype

    def _scale(self) -> str:
        """The dtype of the scales, as far as formats leave it open."""
        found = self._dtype("weight_scale") if "weight_scale" in self.names else ""
        return found if found in layouts.FLOATS else "bf16"

    def _require(self, *wanted: str) -> None:
        stored.require(self.names, wanted, self.module, METHOD)

    def _quantized(self, fmt: Format, used: dict[str, str], note: str = "", more: tuple[str, ...] = ()) -> Quantized:
        taken = set(used.values())
        others = (full for name, full in self.names.items() if name in (*_OTHERS, *more) and full not in taken)
        return Quantized(fmt, used, tuple(others), note)

    def dense(self) -> Quantized:
        """A module whose weight stays as it is: what happens around it does not."""
        from qcompile.formats.dense import Dense

        self._require("weight")
        stored.expect(self.names["weight"], self.source, layouts.FLOATS, (self.module.n, self.module.k), self.module)
        return self._quantized(Dense(self._dtype("weight")), {"weight": self.names["weight"]})

    def _calibrated(self, fmt: Format) -> Skip | Quantized:
        """A float weight: dense, or with the scales by which a model rounds it that is not compressed yet."""
        if "weight_scale" not in self.names:
            return Skip("the checkpoint stores its weight dense")
        shape = (self.module.n, self.module.k)
        stored.expect(self.names["weight"], self.source, layouts.FLOATS, shape, self.module)
        used = {"weight": self.names["weight"]}
        return self._quantized(fmt, used, "rounded by the scales beside it", ("weight_scale",))

    def _bitstream(self, fmt: Bitstream) -> Bitstream:
        self._require("weight_shape")
        module, source, name = self.module, self.source, self.names["weight_shape"]
        shape = source.read(name).flatten().tolist()
        if shape != [module.n, module.k]:
            raise CheckpointError(
                "a packed weight has another shape than its module",
                where=f"{name} (module {module.path})",
                found=shape,
                expected=[module.n, module.k],
                remedy="check that the checkpoint belongs to this config.json",
            )
        used = {name: self.names[official] for name, official in layouts.official(fmt).items()}
        version = str(self.config.unused.get("version", ""))
        return replace(fmt, padded=layouts.packing(fmt, used, source, module, version))

    def _ordered(self, fmt: Format, args: Args) -> Format:
        """The format with the order of the columns, where one is stored that their places do not say."""
        from qcompile.formats.bitstream import Bitstream

        if "weight_g_idx" not in self.names:
            return fmt
        name, columns = self.names["weight_g_idx"], args.blocks[1] or self.module.k
        if layouts.ordered(name, -(-self.module.k // columns), columns, self.source, self.module):
            return fmt
        if not isinstance(fmt, Bitstream):
            raise CheckpointError(
                "an order of the columns is supported for packed integers only",
                where=name,
                found=f"a weight of format '{fmt.kind}'",
                expected="pack-quantized",
                remedy="quantize the model anew without actorder 'group'",
            )
        return replace(fmt, indirect=True)

    def _marlin(self, args: Args) -> Quantized:
        self._require("weight_packed", "scale_packed", "meta")
        names, module, source = self.names, self.module, self.source
        fmt, n, k = layouts.layout("marlin-24", args, "f16"), module.n, module.k
        ok = args.num_bits in (4, 8) and args.symmetric and n % 64 == 0 and k % 32 == 0
        if not ok or args.strategy not in ("group", "channel"):
            raise ConfigError(
                "marlin-24 cannot store this module's weight",
                where=f"{module.path} [{n}, {k}]",
                found=f"{args.num_bits} bits, symmetric: {args.symmetric}, strategy {args.strategy!r}",
                expected="4 or 8 symmetric bits, groups or channels, outputs in multiples of 64 and inputs of 32",
            )
        groups = -(-k // (args.blocks[1] or k))
        stored.expect(names["weight_packed"], source, ("i32",), (k // 32, n * args.num_bits // 2), module)
        stored.expect(names["scale_packed"], source, ("f16",), (groups, n), module)
        stored.expect(names["meta"], source, ("i16",), (k // 32, 2 * n), module)
        used = {"packed": names["weight_packed"], "scale": names["scale_packed"]}
        return self._quantized(fmt, used, "2:4 sparse in the checkpoint, stored with its zeros")

    def _sparse(self) -> Quantized:
        from qcompile.formats.dense import Dense

        self._require("compressed", "bitmask", "shape")
        module = self.module
        stored.expect(self.names["bitmask"], self.source, ("u8",), (module.n, -(-module.k // 8)), module)
        used = {"weight": self.names["compressed"]}
        if self.scheme is None or self.scheme.weights is None:
            fmt: Format = Dense(self._dtype("compressed"))
        else:
            fmt = layouts.layout(self.config.stored_format(self.scheme), self.scheme.weights, self._scale())
            rest = {name: official for name, official in layouts.official(fmt).items() if name != "weight"}
            self._require(*rest.values())
            used |= {name: self.names[official] for name, official in rest.items()}
        return self._quantized(fmt, used, "sparse in the checkpoint, stored with its zeros")
