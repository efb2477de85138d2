"""The way back from a CPU layout to the format that a weight was packed in."""

from __future__ import annotations

import pytest
import torch
from format_cases import CASES, IDS, random_storage

from qcompile.artifact import Module, Origin, WeightRecord
from qcompile.errors import ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.affine import Affine
from qcompile.formats.bitsandbytes import Bnb4
from qcompile.formats.gptq import Gptq
from qcompile.formats.integer import Int8
from qcompile.formats.lanes import lanes_for
from qcompile.original import beside, lost, original


def laid_out(packed: Packed) -> tuple[WeightRecord, dict[str, torch.Tensor]] | None:
    """The record of the weight in its lane layout between two others, and the tensors of the artifact."""
    made = lanes_for(packed)
    if isinstance(made, str) or made[0] is packed:
        return None
    lanes, order = made
    kept = {name: f"kept.{name}" for name in beside(packed.format, packed.N, packed.K)}
    tensors = {f"kept.{name}": packed.tensors[name] for name in kept}
    # As if joined with other weights: sixteen rows lie above this one.
    stack = {name: torch.cat([part[:1], part]) for name, part in lanes.tensors.items()}
    tensors |= {f"m.{name}": part for name, part in stack.items()} | ({} if order is None else {"order": order})
    module = Module("m", "Linear", packed.N, packed.K, "m.weight")
    record = WeightRecord(
        lanes.format.to_json(), {name: f"m.{name}" for name in stack}, packed.N + 16, packed.K, 16, packed.N,
        None if order is None else "order", origin=Origin(module, packed.format.to_json(), kept=kept),
    )  # fmt: skip
    return record, tensors


@pytest.mark.parametrize(("format", "N", "K"), CASES, ids=IDS)
def test_a_weight_gets_its_format_back(format: Format, N: int, K: int) -> None:
    packed = Packed(format, random_storage(format, N, K), N, K)
    made = laid_out(packed)
    if made is None:
        return
    if format.kind != "dense" and lost(format, N, K):  # codes and scales of scales share a tensor
        with pytest.raises(ConfigError, match="has not kept all that the format stores"):
            original(*made)
        return
    back = original(*made)
    assert back.format == format
    want, got = (dequantize(format, part.tensors, N, K) for part in (packed, back))
    assert torch.equal(want.view(torch.int32), got.view(torch.int32))


def test_bytes_that_lie_in_fewer_bits_come_back() -> None:
    packed = Packed(Int8(zero="i8"), random_storage(Int8(zero="i8"), 20, 64), 20, 64)
    packed.tensors["weight"].clamp_(-8, 7)
    made = laid_out(packed)
    assert made is not None and made[0].format["bits"] == 4
    assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in original(*made).tensors.items())


def test_only_blocks_of_many_numbers_are_lost() -> None:
    kinds = {format.kind for format, N, K in CASES if isinstance(format, Affine) and lost(format, N, K)}
    assert {"gguf-q4_k", "gguf-q6_k"} <= kinds
    assert not kinds & {"gptq", "awq", "hqq", "bnb4", "eetq", "gguf-q4_0", "gguf-q8_0", "mlx", "fp8", "fp4", "int8"}


def test_what_is_kept_beside_a_layout() -> None:
    assert beside(Gptq(), 64, 256) == frozenset()
    assert beside(Gptq(indirect=True), 64, 256) == {"g_idx"}
    assert beside(Bnb4("nf4", 64, 256, 0.5), 64, 256) == {"absmax", "nested_absmax"}
    assert beside(Int8(zero="i8"), 64, 256) == frozenset()
