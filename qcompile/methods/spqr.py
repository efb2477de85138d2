"""SpQR: tiles of 3-bit codes with scales quantized again, and outliers in float16 beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import CheckpointError
from qcompile.methods import stored
from qcompile.methods.base import MethodConfig, Quantized, Skip
from qcompile.methods.calibrated import Calibrated

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

STORED = ("dense_weights", "row_offsets", "col_vals", "in_perm")
SIDE = 16  # of a tile


@dataclass(frozen=True)
class SpqrConfig(MethodConfig):
    """The fields of transformers' SpQRConfig. `shapes` has the length of each stored tensor."""

    method: ClassVar[str] = "spqr"

    bits: int = 3
    beta1: int = 16
    beta2: int = 16
    shapes: Mapping[str, int] = field(default_factory=dict)
    modules_to_not_convert: list[str] | None = None

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        return data | {"shapes": {}} if data.get("shapes", 0) is None else data

    def __post_init__(self) -> None:
        self.require(type(self.bits) is int and self.bits == 3, "bits", "3")
        self.require(type(self.beta1) is int and self.beta1 == SIDE, "beta1", "16")
        self.require(type(self.beta2) is int and self.beta2 == SIDE, "beta2", "16")
        self.require(isinstance(self.shapes, Mapping), "shapes", "a dict of lengths")
        self.require_patterns("modules_to_not_convert")


class Spqr(Calibrated):
    """quant_method "spqr".

    The weight of the tiles acts on permuted inputs; the outliers' products are added to it in float32, as the original
    kernel does. `q.weight` is their sum rounded to float16, which is what the original's `dequantize` gives: from that
    matrix outputs differ by the rounding of the outliers, a relative 2^-11 of each. The original's kernel takes float16
    inputs; here they are float32. Both layouts of the outliers are read (CSR, and PTCSR, which interleaves 16 rows), and
    CSR is written.
    """

    name = "spqr"
    source = "https://arxiv.org/abs/2306.03078"
    Config = SpqrConfig
    formats = ("spqr",)
    mark = "dense_weights"
    needs = "calibration data (the Hessian of each layer's inputs)"

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        from qcompile.formats.spqr import Spqr as SpqrFormat

        config = cast(SpqrConfig, config)
        dense = self.dense(config, module, source, modules)
        if dense is not None:
            return dense
        names, fmt = stored.tensors(source, module), SpqrFormat()
        stored.require(names, STORED, module, self.name)
        stored.legal(fmt, module, self.name)
        stored.expect(names["dense_weights"], source, ("i64",), (module.n * module.k // SIDE,), module)
        rows = len_of(source, names["row_offsets"])
        whole = module.n + 1 if rows != module.n // SIDE + 1 else rows
        stored.expect(names["row_offsets"], source, ("i32",), (whole,), module)
        count = len_of(source, names["col_vals"])
        stored.expect(names["col_vals"], source, ("i32",) if count else ("i32", "f32"), (count,), module)
        order = module.k // 2 if len_of(source, names["in_perm"]) else 0
        stored.expect(names["in_perm"], source, ("i32",) if order else ("i32", "f32"), (order,), module)
        for name in STORED:
            said, found = config.shapes.get(f"{module.path}.{name}.shape"), len_of(source, names[name])
            if said not in (None, found):
                raise _damaged("a stored tensor is not as long as the config says", names[name], module, found, said)
        used = {"words": names["dense_weights"]}
        return Quantized(fmt, used, tuple(names[name] for name in STORED[1:]))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        from qcompile.transform import Applied
        from qcompile.transforms.linear import Permute

        names = stored.tensors(source, module)
        words = source.read(names["dense_weights"])
        _check_tiles(words, names["dense_weights"], module)
        tiles = words.view(torch.int32).reshape(module.n // SIDE, module.k // SIDE, SIDE, 2)
        packed = stored.packed(selected.format, {"words": tiles}, module)
        perm = source.read(names["in_perm"])
        if perm.numel():
            packed.before = (Applied(Permute(), {"order": stored.permutation(halves(perm), names["in_perm"], module)}),)
        packed.residual = outliers(
            source.read(names["row_offsets"]), source.read(names["col_vals"]), names["col_vals"], module
        )
        return packed

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        made = {
            "dense_weights": packed.tensors["words"].reshape(-1, 2).view(torch.int64).flatten(),
            "row_offsets": torch.zeros(packed.N + 1, dtype=torch.int32),
            "col_vals": torch.zeros(0),  # float32, as the original has it
            "in_perm": torch.zeros(0, dtype=torch.int32),
        }
        if packed.residual is not None:
            t = packed.residual.tensors
            pairs = torch.stack([t["column"].to(torch.int16), t["number"].view(torch.int16)], dim=1)
            made["row_offsets"][1:] = torch.bincount(t["row"], minlength=packed.N).cumsum(0)
            made["col_vals"] = pairs.view(torch.int32).flatten()
        for applied in packed.before:
            made["in_perm"] = applied.tensors["order"].to(torch.int16).view(torch.int32)
        return made

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        shapes: dict[str, int] = {}
        for path, packed in weights.items():
            count = packed.residual.tensors["column"].numel() if packed.residual is not None else 0
            lengths = (packed.N * packed.K // SIDE, packed.N + 1, count, packed.K // 2 if packed.before else 0)
            shapes |= {f"{path}.{name}.shape": length for name, length in zip(STORED, lengths, strict=True)}
        return config.to_dict() | {"shapes": shapes}


def len_of(source: TensorSource, name: str) -> int:
    """The length of a stored vector."""
    return source.info(name).shape[0] if source.info(name).shape else 0


def halves(words: torch.Tensor) -> torch.Tensor:
    """The unsigned 16-bit numbers in 32-bit words, the low half first, i64."""
    return words.contiguous().view(torch.int16).long() & 0xFFFF


def outliers(offsets: torch.Tensor, words: torch.Tensor, name: str, module: Module) -> Applied | None:
    """The stored outliers as a residual, their rows in order; None where there are none.

    A word holds a column and the bits of a float16 number. With N + 1 `offsets` each row has its own words (CSR); with
    N / 16 + 1 word i of 16 rows belongs to row i % 16 of them, and zero words fill the shorter rows (PTCSR).
    """
    from qcompile.transform import Applied
    from qcompile.transforms.sparse import Sparse

    bounds, count = offsets.long(), words.numel()
    if bounds[0] != 0 or bounds[-1] != count or bool((bounds.diff() < 0).any()):
        raise _damaged(
            "the offsets of outliers do not fit their number",
            name,
            module,
            f"{bounds[0]} to {bounds[-1]}",
            f"0 to {count}, in order",
        )
    if not count:
        return None
    row = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    words = words.to(torch.int32)
    if len(bounds) - 1 != module.n:
        row = row * SIDE + torch.arange(count) % SIDE
        row, words = row[words != 0], words[words != 0]
        row, place = row.sort(stable=True)
        words = words[place]
    column, number = words.view(torch.int16).reshape(-1, 2).unbind(1)
    number = stored.finite(number.contiguous().view(torch.float16), name, module)
    if not words.numel():
        return None
    if bool(((column < 0) | (column >= module.k)).any()):
        raise _damaged(
            "an outlier's column is out of range",
            name,
            module,
            f"{column.min()} to {column.max()}",
            f"0 to {module.k - 1}",
        )
    tensors = {"row": row.to(torch.int32), "column": column.to(torch.int32), "number": number}
    return Applied(Sparse(module.n, len(row), "f16", "f16"), tensors)


def _check_tiles(words: torch.Tensor, name: str, module: Module) -> None:
    """CheckpointError unless both copies of each byte agree, and the numbers that they make are finite."""
    byte = (words >> 54 & 0xFF).reshape(-1, 2)
    wrong = byte[:, 0] != byte[:, 1]
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        found = f"bytes {byte[at].tolist()} in words {2 * at} and {2 * at + 1}"
        raise _damaged("two rows of a tile disagree on its scales", name, module, found, "one byte twice")
    stored.finite(byte[:, 0].to(torch.uint8).view(torch.float16), name, module)


def _damaged(what: str, name: str, module: Module, found: object, expected: object) -> CheckpointError:
    return CheckpointError(
        what,
        where=f"{name} (module {module.path})",
        found=found,
        expected=expected,
        remedy="the file is damaged, or belongs to another architecture",
    )
