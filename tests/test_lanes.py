"""The CPU layouts hold exactly the weight they were made from."""

from __future__ import annotations

import pytest
import torch
from format_cases import CASES, IDS, NF4, random_storage, random_tensor

from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.bitsandbytes import Bnb4
from qcompile.formats.dense import Dense
from qcompile.formats.gguf import Q4_0
from qcompile.formats.gptq import Gptq
from qcompile.formats.hqq import Hqq
from qcompile.formats.integer import Int8
from qcompile.formats.lanes import Lanes, LanesDense, lanes_for, pack_codes, pack_lanes, planes
from qcompile.pack import pack, unpack

REFUSED = {  # kinds with at least one case whose scales change too often
    "hqq": "only 1 consecutive inputs share a scale, fewer than 8",
    "bnb4": "only 1 consecutive inputs share a scale, fewer than 8",
    "gptq": "only 4 consecutive inputs share a scale, fewer than 8",
    "aqlm": "a weight of format 'aqlm' is not a code times a scale",
    "higgs": "a weight of format 'higgs' is not a code times a scale",
    "vptq": "a weight of format 'vptq' is not a code times a scale",
    "sinq-square": "a weight of format 'sinq-square' is not a code times a scale",
}
REORDERED = {"fouroversix", "fp-quant"}  # the tensor's own scale multiplies first in lanes, last in the method


@pytest.mark.parametrize(("format", "N", "K"), CASES, ids=IDS)
def test_lanes_dequantize_to_the_same_bits(format: Format, N: int, K: int) -> None:
    packed = Packed(format, random_storage(format, N, K), N, K)
    made = lanes_for(packed)
    if isinstance(made, str):
        assert made == REFUSED[format.kind] or format == Gptq(4, 24, scale="bf16")
        return
    lanes, perm = made
    lanes.check()
    true = dequantize(format, packed.tensors, N, K)
    got = dequantize(lanes.format, lanes.tensors, lanes.N, lanes.K)
    assert (perm is not None) == getattr(format, "indirect", False)
    true = true if perm is None else true[:, perm]
    if format.kind in REORDERED:
        normal = true.isfinite() & got.isfinite()  # random powers of two overflow in one order only
        torch.testing.assert_close(got[normal], true[normal], rtol=2**-22, atol=1e-37)
        return
    assert torch.equal(got.view(torch.int32), true.view(torch.int32))  # -0.0 too


@pytest.mark.parametrize(("low", "high", "bits"), [(-8, 7, 4), (-2, 1, 2), (-9, 0, 8), (0, 8, 8), (-128, 127, 8)])
@pytest.mark.parametrize("zero", ["", "i8"])
def test_bytes_take_as_few_bits_as_their_codes_need(low: int, high: int, bits: int, zero: str) -> None:
    format = Int8(columns=32, zero=zero)
    tensors = random_storage(format, 20, 64)
    tensors["weight"] = tensors["weight"].clamp(low, high)
    lanes, _ = lanes_for(Packed(format, tensors, 20, 64))
    assert lanes.format.bits == bits and (zero or lanes.format.zero == 1 << bits - 1)
    assert torch.equal(dequantize(lanes.format, lanes.tensors, 20, 64), dequantize(format, tensors, 20, 64))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("N", "K"), [(1, 8), (16, 32), (19, 40), (35, 77)])
def test_the_fast_packer_writes_what_the_formats_addresses_say(bits: int, N: int, K: int) -> None:
    format = Lanes(bits, K, None, None, "f32")
    code = torch.arange(N * K).reshape(N, K) % 2**bits  # every code
    scale = torch.randn(N, 1)
    fast = pack_lanes(format, code, scale)
    slow = pack(format, {"code": code, "scale": scale}, N, K)
    assert fast.keys() == slow.keys() and all(torch.equal(fast[name], slow[name]) for name in fast)
    assert torch.equal(unpack(format, fast, N, K)["code"].long(), code)
    assert len(pack_codes(code, bits)) == len(planes(bits))


def test_the_order_in_a_word_puts_four_inputs_side_by_side() -> None:
    code = torch.arange(8).repeat(16, 1)
    (word,) = pack_codes(code, 4)
    assert word.shape == (1, 1, 16)
    low = word & 0x0F0F0F0F
    assert low[0, 0, :1].view(torch.uint8).tolist() == [0, 1, 2, 3]
    assert ((word >> 4) & 0x0F0F0F0F)[0, 0, :1].view(torch.uint8).tolist() == [4, 5, 6, 7]
    (natural,) = pack_codes(torch.arange(4).repeat(16, 1) + 200, 8)
    assert natural[0, 0, :1].view(torch.uint8).tolist() == [200, 201, 202, 203]


def test_rows_beyond_the_weight_are_zero() -> None:
    format = Lanes(4, 8, NF4)
    tensors = pack_lanes(format, torch.full((3, 8), 15), torch.ones(3, 1))
    assert tensors["codes0"][0, 0, 3:].eq(0).all() and tensors["scales"][0, 0, 3:].eq(0).all()
    assert tensors["codes0"][0, 0, :3].eq(-1).all()


def test_act_order_sorts_inputs_by_group() -> None:
    N, K = 16, 64
    tensors = random_storage(Gptq(4, 32, indirect=True), N, K)
    made = lanes_for(Packed(Gptq(4, 32, indirect=True), tensors, N, K))
    assert not isinstance(made, str)
    lanes, perm = made
    assert perm is not None and torch.equal(perm, torch.argsort(tensors["g_idx"], stable=True))
    assert lanes.format.group == 32  # type: ignore[attr-defined]
    tensors["g_idx"] = torch.arange(K, dtype=torch.int32) // 32
    made = lanes_for(Packed(Gptq(4, 32, indirect=True), tensors, N, K))
    assert not isinstance(made, str) and made[1] is None


def test_a_zero_that_is_the_same_everywhere_is_not_stored() -> None:
    symmetric = random_storage(Gptq(4, 32, v1=False), 16, 64)
    symmetric["qzeros"].fill_(-0x77777778)  # 0x88888888: every zero is 8
    made = lanes_for(Packed(Gptq(4, 32, v1=False), symmetric, 16, 64))
    assert not isinstance(made, str)
    assert made[0].format == Lanes(4, 32, None, 8.0, "f16", "product-f16")
    made = lanes_for(Packed(Q4_0(), random_storage(Q4_0(), 16, 64), 16, 64))
    assert not isinstance(made, str) and made[0].format == Lanes(4, 32, None, 8.0, "f16")


def test_double_quantized_scales_are_folded_and_refusals_say_why() -> None:
    made = lanes_for(Packed(Bnb4("nf4", 64, 256, 0.5), random_storage(Bnb4("nf4", 64, 256, 0.5), 8, 128), 8, 128))
    assert not isinstance(made, str) and made[0].format.scale == "f32"  # type: ignore[attr-defined]
    axis0 = Hqq(4, 64, axis=0)
    assert lanes_for(Packed(axis0, random_storage(axis0, 8, 128), 8, 128)) == REFUSED["hqq"]
    dense = Packed(Dense("bf16"), random_storage(Dense("bf16"), 5, 3), 5, 3)
    made = lanes_for(dense)
    assert not isinstance(made, str) and isinstance(made[0].format, LanesDense)
    assert random_tensor(made[0].format.stored(5, 3)[0], 0).shape == made[0].tensors["values"].shape == (1, 3, 16)
