"""The PTX that decodes weights gives each code's value, and plain Triton text gives the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gpu.ptx import inline
from gpu.ptx.values import halves, joined

from qcompile.dtypes import DTYPES
from qcompile.evaluate import dequantize
from qcompile.formats.coded import Content
from qcompile.formats.fragments import Fragments, pack_fragments
from qcompile.formats.minifloat import E2M1
from qcompile.formats.stream import planes
from qcompile.formats.tables import NF4
from qcompile.lowering.triton.decode import PACK, SLOTS, Decode, ptx

COMPUTES = ("bf16", "f16")


def _codes(bits: int) -> torch.Tensor:
    """[16, 128] with every code at every slot, in both elements of a pair, where they fit."""
    n, k = torch.arange(16)[:, None], torch.arange(128)[None, :]
    return ((n * 8 + k % 8 + k // 16 * 37 + k // 2 * 11) % 2**bits).to(torch.uint8)


def _packed(format: Fragments, codes: torch.Tensor) -> list[np.ndarray]:
    content = Content({}, codes, torch.ones(16, 128 // format.group), None, None, None)
    tensors = pack_fragments(format, content, content.scale)
    return [tensors[f"codes{p}"].numpy().reshape(16, 4, -1).view(np.uint32) for p in range(len(planes(format.bits)))]


def _registers(format: Fragments, tiles: list[np.ndarray]) -> list[np.ndarray]:
    """The inputs for the elements of each plane: a run for each (row, c, h)."""
    out = []
    for width, tile in zip(planes(format.bits), tiles, strict=True):
        if width == 1:  # two bytes of a word, each at the low end of a half, with anything above it
            pairs = np.ascontiguousarray(tile).view(np.uint16).reshape(128).astype(np.uint32)
            out.append(pairs | (pairs >> np.uint32(8)) << np.uint32(16))
            continue
        runs = tile.reshape(128, -1)
        runs = runs.view(np.uint64) if width == 8 else runs
        out += [runs[:, i].copy() for i in range(runs.shape[1])]
    return out


def _decoded(decode: Decode, codes: torch.Tensor, given: list[torch.Tensor]) -> torch.Tensor:
    """W f32 [16, 128]; `given` are zeros and scales of each row, as the kernel gives them."""
    made = ptx(decode)
    inputs = _registers(decode.format, _packed(decode.format, codes))
    for entry in decode.words():
        inputs += [np.full(128, entry, np.uint32)] * PACK
    inputs += [joined(each.repeat_interleave(8)[:, None].expand(-1, 2).numpy(), decode.compute) for each in given]
    assert len(inputs) == len(made.inputs)
    results = inline(made.lines, made.outputs, inputs)
    values = torch.from_numpy(np.stack([halves(result, decode.compute) for result in results])).float()
    values = values.reshape(SLOTS, 16, 4, 2, 2)  # slot, row, c, h, e
    return values.permute(1, 0, 3, 2, 4).reshape(16, 128)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_exact(bits: int, compute: str) -> None:
    codes = _codes(bits)
    for zero in (None, float(1 << (bits - 1)), 1.0):
        decode = Decode(Fragments(bits, 128, zero=zero), compute)  # type: ignore[arg-type]
        assert torch.equal(_decoded(decode, codes, []), codes.float() - (zero or 0.0))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_zeros_are_exact_and_scales_round_once(bits: int, compute: str) -> None:
    codes, zero = _codes(bits), torch.arange(16) * 15 % 2**bits
    layout = Fragments(bits, 64, zero="u8")
    magic = {"bf16": 128, "f16": 1024}[compute]
    decode = Decode(layout, compute, zeros=2)  # type: ignore[arg-type]
    given = (128 - zero if decode.by_sign else -(magic + zero)).float()
    assert torch.equal(_decoded(decode, codes, [given, given]), codes.float() - zero[:, None])
    scale = (torch.rand(2, 16) + 0.1).to(DTYPES[compute]).float()
    got = _decoded(Decode(layout, compute, zeros=2, scales=2), codes, [given, given, *scale])  # type: ignore[arg-type]
    exact = (codes.double() - zero[:, None]) * scale.T.repeat_interleave(64, 1).double()
    assert torch.equal(got, exact.float().to(DTYPES[compute]).float())


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("table", [NF4, E2M1], ids=["nf4", "e2m1"])
def test_tables_hold_entries_rounded_to_the_compute_dtype(table: tuple[float, ...], compute: str) -> None:
    codes = _codes(4)
    decode = Decode(Fragments(4, 128, table), compute)  # type: ignore[arg-type]
    wanted = torch.tensor(table).to(DTYPES[compute]).float()[codes.long()]
    got = _decoded(decode, codes, [])
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))
    if table is E2M1:
        assert torch.equal(wanted, torch.tensor(table)[codes.long()])


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("code", ["f8e4m3", "f8e5m2"])
def test_floats_of_eight_bits_are_exact(code: str, compute: str) -> None:
    codes = _codes(8)
    values = codes.view(DTYPES[code]).float()
    got = _decoded(Decode(Fragments(8, 128, code=code), compute), codes, [])  # type: ignore[arg-type]
    finite = values.isfinite()
    assert finite.sum() > 1900 and torch.equal(got[finite], values[finite])


def test_every_code_is_at_every_slot() -> None:
    for bits in range(1, 9):
        codes = _codes(bits).reshape(16, SLOTS, 8, 2)
        for slot, e in itertools.product(range(SLOTS), (0, 1)):
            found = len(codes[:, slot, :, e].unique())
            assert found == 2**bits if bits < 8 else found >= 64


def test_the_layout_in_the_test_is_the_format() -> None:
    format = Fragments(4, 128, zero=8.0)
    content = Content({}, _codes(4), torch.ones(16, 1), None, None, None)
    tensors = pack_fragments(format, content, content.scale)
    assert torch.equal(dequantize(format, tensors, 16, 128), _decoded(Decode(format, "bf16"), _codes(4), []))


def test_a_scale_in_two_parts_rounds_like_one() -> None:
    codes, scale = _codes(8), torch.rand(16) + 0.1
    parts = [scale.bfloat16().float(), (scale - scale.bfloat16().float()).bfloat16().float()]
    got = _decoded(Decode(Fragments(8, 128, zero=128.0), "bf16", scales=1, rest=True), codes, parts)
    exact = (codes.double() - 128) * scale[:, None].double()
    assert ((got - exact).abs() <= exact.abs() * (2.0**-8 + 2.0**-16)).all()
    assert (got == exact.float().bfloat16().float()).double().mean() > 0.99
