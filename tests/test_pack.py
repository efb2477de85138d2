"""The packer inverts every format's addresses."""

from __future__ import annotations

import pytest
import torch
from format_cases import CASES, IDS, random_storage

from qcompile.dtypes import DTYPES
from qcompile.errors import ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import FORMATS, Format, format_class
from qcompile.formats.gguf import Q4_0
from qcompile.formats.gptq import Gptq
from qcompile.pack import pack, unpack


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN and -0.0 compare too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits_of(a[name]), bits_of(b[name])) for name in a)


def test_every_format_has_a_case() -> None:
    layouts = {"fragments", "runs"}  # which have tests of their own
    assert {format.kind for format, _, _ in CASES} | layouts == set(FORMATS)
    assert all(format_class(format.kind) is type(format) for format, _, _ in CASES)


@pytest.mark.parametrize(("format", "N", "K"), CASES, ids=IDS)
def test_pack_after_unpack_is_the_identity(format: Format, N: int, K: int) -> None:
    assert format.check(N, K) == []
    raw = random_storage(format, N, K)
    fields = unpack(format, raw, N, K)
    assert all(field.shape == (N, K) for field in fields.values())
    # Bits that hold no field (the tail of a word, padded rows) are random in `raw` and 0 after one trip.
    clean = pack(format, fields, N, K)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in clean.items()} == {
        s.name: (DTYPES[s.dtype], s.shape) for s in format.stored(N, K)
    }
    again = unpack(format, clean, N, K)
    assert same(fields, again)
    assert same(clean, pack(format, again, N, K))
    assert same({"w": dequantize(format, raw, N, K)}, {"w": dequantize(format, clean, N, K)})


WHOLE = [case for case in CASES if case[0].kind in ("awq", "eetq", "bnb-int8", "dense") and case[1] % 8 == 0]


@pytest.mark.parametrize(("format", "N", "K"), WHOLE, ids=[f"{f.kind}-{N}x{K}" for f, N, K in WHOLE])
def test_storage_without_gaps_comes_back_whole(format: Format, N: int, K: int) -> None:
    raw = random_storage(format, N, K)
    gap = format.kind == "awq" and N * format.bits % 32  # type: ignore[attr-defined]
    assert gap or same(raw, pack(format, unpack(format, raw, N, K), N, K))


def test_gptq_v1_zeros_borrow_across_the_word() -> None:
    fields = {"code": torch.zeros(8, 8, dtype=torch.int32), "scale": torch.ones(1, 1)}
    fields["zero"] = torch.tensor([3, 0, 0, 7, 15, 0, 1, 2])[:, None]
    qzeros = pack(Gptq(4, 8), fields, 8, 8)["qzeros"]
    word = sum(int(zero) << (4 * i) for i, zero in enumerate(fields["zero"].flatten()))
    assert qzeros.item() & 0xFFFFFFFF == (word - 0x11111111) & 0xFFFFFFFF


def test_a_field_that_does_not_fit_is_an_error_that_names_the_weight() -> None:
    code = torch.zeros(4, 8, dtype=torch.int32)
    code[2, 5] = 16
    good = {"zero": torch.zeros(1, 1, dtype=torch.int32), "scale": torch.ones(1, 1)}
    with pytest.raises(ConfigError) as error:
        pack(Gptq(4, 8), {"code": code, **good}, 4, 8)
    assert str(error.value) == (
        "format 'gptq' cannot hold this 'code': out of range, or not the same over a group\n"
        "  where:    weight [2, 5]\n  found:    16\n  expected: 0"
    )
    scale = torch.ones(4, 8)
    scale[1, 3] = 2
    with pytest.raises(ConfigError, match="cannot hold this 'scale'"):
        pack(Gptq(4, 8), {"code": code % 16, "zero": good["zero"], "scale": scale}, 4, 8)
    with pytest.raises(ConfigError, match="has other fields\n  found:    code, scale, zero\n  expected: code, scale"):
        pack(Q4_0(), {"code": code, **good}, 4, 32)
