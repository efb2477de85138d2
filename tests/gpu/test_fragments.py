"""The CUDA layout holds exactly the weight it was made from, in the order in which tensor cores take it."""

from __future__ import annotations

import pytest
import torch
from format_cases import CASES, IDS, random_storage

from qcompile.backend import CudaBackend
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.affine import Affine
from qcompile.formats.coded import Content
from qcompile.formats.fragments import Fragments, fragments_for, fragments_form, pack_fragments
from qcompile.formats.gptq import Gptq
from qcompile.formats.minifloat import Fp4, Fp6
from qcompile.formats.tables import NF4
from qcompile.pack import pack, unpack

AFFINE = [(format, N, K) for format, N, K in CASES if isinstance(format, Affine)]
REORDERED = {"fouroversix", "fp-quant"}  # the tensor's own scale multiplies first in the layout, last in the method


@pytest.mark.parametrize(
    ("format", "N", "K"), AFFINE, ids=[i for i, case in zip(IDS, CASES, strict=True) if case in AFFINE]
)
def test_fragments_dequantize_to_the_same_bits(format: Format, N: int, K: int) -> None:
    # Groups of fewer than 16 inputs have no fragments; eight times the inputs give most formats longer ones.
    packed = Packed(format, random_storage(format, N, K), N, K)
    made = fragments_for(packed)
    if isinstance(made, str):
        assert "consecutive inputs share a scale" in made or "entries" in made
        return
    fragments, order = made
    fragments.check()
    true = dequantize(format, packed.tensors, N, K)
    got = dequantize(fragments.format, fragments.tensors, N, K)
    true = true if order is None else true[:, order]
    if format.kind in REORDERED:
        normal = true.isfinite() & got.isfinite()  # random powers of two overflow in one order only
        torch.testing.assert_close(got[normal], true[normal], rtol=2**-22, atol=1e-37)
        return
    assert torch.equal(got.view(torch.int32), true.view(torch.int32))  # -0.0 too


def _content(format: Fragments, N: int, K: int) -> Content:
    codes = (torch.arange(N * K).reshape(N, K) * 5 % 2**format.bits).to(torch.uint8)
    groups = torch.arange(N * (K // format.group)).reshape(N, -1).to(torch.float16)
    return Content({}, codes, groups, groups + 1, groups + 2, None)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("N", "K"), [(1, 16), (16, 128), (19, 272)])
def test_the_fast_packer_writes_what_the_addresses_say(bits: int, N: int, K: int) -> None:
    format = Fragments(bits, 16, None, "f16", "f16", offset="f16")
    content = _content(format, N, K)
    fast = pack_fragments(format, content, content.scale)
    groups = {"scale": content.scale, "zero": content.zero, "offset": content.offset}
    fields = {name: value.repeat_interleave(16, 1) for name, value in groups.items() if value is not None}
    slow = pack(format, {"code": content.codes.int(), **fields}, N, K)
    assert fast.keys() == slow.keys() and all(torch.equal(fast[name], slow[name]) for name in fast)
    assert torch.equal(unpack(format, fast, N, K)["code"], content.codes.int())


def test_tables_lie_in_another_order() -> None:
    format = Fragments(4, 16, NF4, None, "f16")
    content = _content(format, 19, 272)
    fast = pack_fragments(format, content, content.scale)
    slow = pack(format, {"code": content.codes.int(), "scale": content.scale.repeat_interleave(16, 1)}, 19, 272)
    assert all(torch.equal(fast[name], slow[name]) for name in fast)


def test_a_word_holds_neighbours_in_its_halves_and_a_thread_reads_16_bytes_at_a_time() -> None:
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    s, h, c, e = 5, 1, 2, 1
    codes[3, 16 * s + 8 * h + 2 * c + e] = 15
    made = pack_fragments(Fragments(4, 128), Content({}, codes, torch.ones(16, 1), None, None, None), torch.ones(16, 1))
    words = made["codes0"].reshape(16, 4, 2, 2)  # row, c, h, q
    assert words[3, c, h, s // 4] == 15 << (16 * e + 4 * (s % 4)) and words.count_nonzero() == 1


def test_groups_that_cut_a_block_come_in_pieces() -> None:
    made = fragments_for(Packed(Gptq(4, 96), random_storage(Gptq(4, 96), 16, 192), 16, 192))
    assert not isinstance(made, str) and made[0].format.group_size(16, 192) == 32
    whole = fragments_for(Packed(Gptq(4, 192), random_storage(Gptq(4, 192), 16, 192), 16, 192))
    assert not isinstance(whole, str) and whole[0].format.group_size(16, 192) == 192


def test_scales_take_the_narrowest_dtype_that_holds_them() -> None:
    tensors = random_storage(Fp4(32), 16, 128)
    made = fragments_for(Packed(Fp4(32), tensors, 16, 128))
    assert not isinstance(made, str) and made[0].format.scale == "f8e8m0"  # type: ignore[attr-defined]
    nested = Fp4(16, "f8e4m3", "multiply")
    made = fragments_for(Packed(nested, random_storage(nested, 16, 128), 16, 128))
    assert not isinstance(made, str)
    layout = made[0].format
    assert isinstance(layout, Fragments) and layout.scale == "f8e4m3" and layout.tensor


def test_weights_with_a_scale_of_the_whole_tensor_lie_one_below_the_other() -> None:
    cuda, format, sizes = CudaBackend(), Fp4(16, "f8e4m3", "multiply"), (32, 16, 24)
    parts = [Packed(format, random_storage(format, n, 128), n, 128) for n in sizes]
    for at, part in enumerate(parts, 1):
        part.tensors["tensor_scale"].fill_(0.3 * at)
    layouts = [cuda.layout(part).packed for part in parts]
    assert len({float(layout.tensors["tensor_scale"][0]) for layout in layouts}) == 3
    assert cuda.may_join([(layout.format, layout.N) for layout in layouts]) is None
    (joined,) = cuda.join(layouts)
    joined.check()
    true = torch.cat([dequantize(format, part.tensors, part.N, 128) for part in parts])
    assert torch.equal(dequantize(joined.format, joined.tensors, joined.N, 128).nan_to_num(), true.nan_to_num())


def test_what_has_no_fragments_says_why() -> None:
    made = fragments_for(Packed(Fp6(), random_storage(Fp6(), 16, 128), 16, 128))
    assert made == fragments_form(Fp6(), 16, 128) == "a table of 64 entries, more than 16"
    assert fragments_form(Gptq(4, 8), 16, 128) == "only 8 consecutive inputs share a scale, fewer than 16"
    [problem] = Fragments(4, 48).check(16, 96)
    assert problem.found == "a group of 48"
