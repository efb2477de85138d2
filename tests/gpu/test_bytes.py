"""PTX on four bytes at a time: all bytes, against what torch says of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu.ptx import inline

from qcompile.dtypes import DTYPES
from qcompile.lowering.triton.bytes import halves, unpack

BYTES = np.arange(256, dtype=np.uint8)


def run(text: str, outputs: int) -> list[np.ndarray]:
    """What the PTX makes of registers with four of the bytes each."""
    return inline([text], outputs, [BYTES.view(np.uint32)])


@pytest.mark.parametrize(("code", "worth"), [("f8e4m3", 2.0**-8), ("f8e5m2", 1.0)])
def test_floats_of_eight_bits_are_halves(code: str, worth: float) -> None:
    first, second = run(halves(code), 2)
    found = torch.from_numpy(np.stack([first, second], 1).reshape(-1)).view(torch.float16).float()
    expected = torch.from_numpy(BYTES).view(DTYPES[code]).float() * worth
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize(("bits", "zero"), [(2, 1), (2, 0), (4, 8), (4, 15)])
def test_packed_codes_become_signed_bytes(bits: int, zero: int) -> None:
    for plane in range(8 // bits):
        (found,) = run(unpack(bits, plane, zero), 1)
        expected = (BYTES >> (plane * bits) & ((1 << bits) - 1)).astype(np.int8) - zero
        assert np.array_equal(found.view(np.int8), expected)
