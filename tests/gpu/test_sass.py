"""Machine code read for what it does."""

from __future__ import annotations

import pytest

from qcompile.lowering.triton.sass import parse

LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R8], desc[UR12][R12.64] ;
        /*0030*/                   LDSM.16.M88.4 R4, [R4] ;
        /*0040*/                   LDS.U16 R5, [R4] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/              @!P0 BRA 0x10 ;
        /*0090*/                   LDG.E.U8.CONSTANT R2, desc[UR4][R2.64] ;
        /*00a0*/                   FFMA R4, R4, R4, R4 ;
        /*00b0*/                   FFMA R4, R4, R4, R4 ;
        /*00c0*/                   FFMA R4, R4, R4, R4 ;
        /*00d0*/                   FFMA R4, R4, R4, R4 ;
        /*00e0*/                   FFMA R4, R4, R4, R4 ;
        /*00f0*/              @!P0 BRA 0x90 ;
        /*0100*/                   EXIT ;
        /*0110*/                   BRA 0x110;
        /*0120*/                   NOP;
"""


def test_the_main_loop_is_the_innermost_one_with_tensor_cores():
    found = parse(LISTING)
    assert len(found.loops) == 2 and found.main.instructions == 5
    assert (found.main.loads, found.main.shared_loads) == ({128: 1}, {128: 1, 16: 1})
    assert found.code.loads == {128: 1, 64: 1, 8: 1} and found.code.spills == 1 and found.main.spills == 0
    assert found.main.counts() == {"LDGSTS": 1, "LDSM": 1, "LDS": 1, "HMMA": 1, "BRA": 1}


def test_without_tensor_cores_the_main_loop_is_the_longest():
    assert parse(LISTING.replace("HMMA.16816.F32.BF16", "FADD")).main.counts()["FFMA"] == 5


@pytest.mark.parametrize(
    ("operation", "products"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16 / 32),
        ("IMMA.16832.S8.S8", 16 * 8 * 32 / 32),
        ("QMMA.16832.F32.E4M3.E4M3", 16 * 8 * 32 / 32),
        ("HGMMA.64x16x16.F32.BF16", 64 * 16 * 16 / 128),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 64 * 128 * 32 / 128),
        ("UTCHMMA", 0),
    ],
)
def test_products_of_tensor_cores_are_read_from_their_instructions(operation, products):
    found = parse(LISTING.replace("HMMA.16816.F32.BF16", operation)).code
    assert found.products == products and found.tensor_cores == 1
