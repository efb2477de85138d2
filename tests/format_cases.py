"""Cases for tests over the format registry: parameters with legal shapes, odd ones among them, and random storage."""

from __future__ import annotations

import torch

from qcompile.dtypes import DTYPES
from qcompile.expr import FLOATS
from qcompile.format import Format, Stored
from qcompile.formats import (
    awq,
    bitnet,
    bitsandbytes,
    bitstream,
    codebook,
    dense,
    eetq,
    fouroversix,
    fp_quant,
    gemma,
    gguf,
    gguf_k,
    gptq,
    higgs,
    hqq,
    integer,
    lanes,
    minifloat,
    mlx,
    native,
    quanto,
    quark,
    sinq,
    spqr,
    torchao,
)

NF4 = (-1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0)
CASES: list[tuple[Format, int, int]] = [
    *((gptq.Gptq(bits, 32, v1), 33, 64) for bits in (2, 3, 4, 8) for v1 in (True, False)),
    *((gptq.Gptq(bits, 64, v1, planar=True), 32, 64) for bits in (3, 5, 6, 7) for v1 in (True, False)),
    *((gptq.Gptq(bits, 32, v1, by_field=True), 64, 96) for bits in range(2, 9) for v1 in (True, False)),
    (gptq.Gptq(4, 32, indirect=True), 17, 96),
    *((gptq.Gptq(bits, 32, v1, word=word), 33, 64) for bits, v1, word in ((2, True, 8), (4, True, 16), (8, False, 8))),
    (gptq.Gptq(4, 24, scale="bf16"), 5, 40),  # the last group is short
    (gptq.Gptq(8, 1000), 12, 20),
    (awq.Awq(4, 32), 24, 64),
    *((awq.Awq(bits, 16, interleaved=False), 19, 48) for bits in (2, 3, 5, 6, 7, 8)),
    (awq.Awq(5, 16, interleaved=True), 16, 48),
    *((awq.AwqGemv(group), 3, 256) for group in (16, 32, 64, 128)),
    *((awq.AwqGemvFast(group), 8, 192) for group in (32, 64)),
    *((hqq.Hqq(bits, 24, axis), 16, 72) for bits in (8, 4, 2, 1) for axis in (0, 1)),
    *((hqq.Hqq(3, 24, axis, "f32"), 5, 72) for axis in (0, 1)),
    (hqq.Hqq(4, 48, 1, "bf16"), 6, 80),  # groups straddle rows
    *((bitsandbytes.Bnb4(table), N, K) for table in ("nf4", "fp4") for N, K in ((3, 64), (3, 5), (7, 96))),
    (bitsandbytes.Bnb4("nf4", 64, 256, 0.25), 300, 96),
    (bitsandbytes.BnbInt8(), 5, 9),
    *((bitnet.Ternary(scale, inverse), N, 24) for scale, inverse, N in (("bf16", True, 12), ("f32", False, 7))),
    *((higgs.Higgs(bits, 64, tile), 512, 64) for bits, tile in ((2, 32), (2, 64), (3, 32), (4, 64))),
    (higgs.Higgs(4, 64, dtype="bf16"), 128, 128),
    (spqr.Spqr(), 32, 48),
    *((codebook.Aqlm(*shape), 6, 48) for shape in ((1, 10), (2, 8, 1, 16, "f32"), (3, 5, 2, 8), (1, 17, 3, 4))),
    *(
        (codebook.Vptq(*shape), 10, 52)
        for shape in ((8, 16, 16), (6, 64, 0, 2), (4, 8, 4, 4), (5, 128, 32, 1, 0, 0, 0, False))
    ),
    *((codebook.Vptq(*shape), 11, 30) for shape in ((8, 512, 64, 2, 6, 4, 2**16), (3, 4, 0, 1, 2, 2, 2**16, False))),
    (eetq.Eetq(), 64, 128),
    (eetq.Eetq("f32"), 128, 64),
    *((minifloat.Fp8(dtype, columns=16), 19, 48) for dtype in ("f8e4m3", "f8e5m2")),
    (minifloat.Fp8(scale="bf16", rows=16, columns=24, rounding="product-bf16"), 35, 72),
    (minifloat.Fp8(scale="u8", columns=32), 3, 64),
    (minifloat.Fp4(32), 19, 64),
    *((minifloat.Fp4(16, "f8e4m3", tensor), 5, 48) for tensor in ("", "multiply", "divide")),
    *((minifloat.Fp6(element), 5, 64) for element in ("e2m3", "e3m2")),
    *((bitstream.Bitstream(bits, 1, 16, zero="packed"), 21, 48) for bits in range(1, 9)),
    *((bitstream.Bitstream(bits, 1, 16, "f32", "packed", padded=True), 21, 48) for bits in (3, 5, 6, 7)),
    (bitstream.Bitstream(4, 0, 0, "f16", "i8"), 5, 33),
    (bitstream.Bitstream(4, 1, 16, indirect=True), 5, 48),
    (integer.Int8(), 19, 24),
    (integer.Int8("i8", "bf16", "i8", 1, 8, "each-bf16"), 3, 24),
    (integer.Int8("u8", "f16", "u8", 16, 40), 35, 80),
    *((sinq.Sinq(bits, 24, nested), 40, 96) for bits in (1, 2, 3, 4, 5, 6, 8) for nested in (True, False)),
    (sinq.Sinq(4, 32, False, "nf4"), 16, 64),
    (sinq.Sinq(3, 16, False, "nf3", None, "bf16"), 5, 48),
    (sinq.Sinq(4, 16, False, "", 7.0), 6, 48),
    (sinq.Sinq(4, 16, False, "nf4", 0.25), 6, 48),
    *((sinq.SinqSquare(bits, 16, nested), 32, 48) for bits in (4, 5, 8) for nested in (True, False)),
    *((mlx.Mlx(bits, 32, "bf16" if bits == 4 else "f16"), 5, 96) for bits in (1, 2, 3, 4, 5, 6, 8)),
    *((quanto.QuantoBits(bits, group), 5, 96) for bits in (4, 2) for group in (0, 32)),
    (quanto.QuantoBits(4, 32, "f16", zero=True), 7, 160),
    (quanto.QuantoBits(2, 0, "bf16"), 13, 24),
    *((torchao.Int4Rows(32, scale), 19, 96) for scale in ("bf16", "f32")),
    (torchao.Int4Tiles(64), 19, 192),
    *((dense.Dense(dtype), 3, 5) for dtype in ("f32", "f16", "bf16")),
    *((cls(), 3, 96) for cls in (gguf.Q4_0, gguf.Q4_1, gguf.Q5_0, gguf.Q5_1, gguf.Q8_0)),
    (gguf.Q6_K(), 3, 512),
    *((cls(), 3, 512) for cls in (gguf_k.Q2_K, gguf_k.Q3_K, gguf_k.Q4_K, gguf_k.Q5_K, gguf_k.IQ4_XS)),
    (gguf_k.IQ4_NL(), 3, 96),
    (fouroversix.FourOverSix(), 130, 200),
    (fouroversix.FourOverSix("mxfp4"), 5, 64),
    (gemma.Gemma(), 3, 33),
    (gemma.Gemma(2, 24, "bf16"), 5, 72),
    *((fp_quant.FpQuant(dtype), 130, 96) for dtype in ("nvfp4", "mxfp4")),
    *((lanes.Lanes(bits, 24, None, "f16", "f16", "each-f16"), 19, 72) for bits in range(1, 9)),
    (native.Native(), 5, 40),
    (native.Native("int", 4, 8, 128, 128), 6, 256),
    (native.Native("int", 2, 1, 128), 6, 200),
    (native.Native("f8e4m3", group=32, rows=4), 9, 64),
    (lanes.Lanes(4, 8, NF4), 16, 40),
    (lanes.Lanes(5, 11, None, 16.0, "bf16", "product-bf16", "f32", 0.5), 3, 33),
    *(
        (quark.QuarkInt4("group", 32, signed, order, "f16", True), 24, 96)
        for signed in (True, False)
        for order in (True, False)
    ),
    *(
        (quark.QuarkInt4(per, signed=signed, zero=True), 24, 40)
        for per in ("channel", "tensor")
        for signed in (True, False)
    ),
    (quark.QuarkInt4("group", 24, zero=False), 8, 48),
    *((lanes.LanesDense(dtype), 18, 7) for dtype in ("f32", "bf16")),
]
IDS = [f"{format.kind}-{i}-{N}x{K}" for i, (format, N, K) in enumerate(CASES)]


def random_tensor(s: Stored, seed: int) -> torch.Tensor:
    """Any bits for integers; finite numbers for floats, so that they can be compared."""
    generator = torch.Generator().manual_seed(seed)
    if s.dtype in FLOATS:
        return torch.randn(s.shape, generator=generator).to(DTYPES[s.dtype])
    info = torch.iinfo(DTYPES[s.dtype])
    return torch.randint(info.min, info.max + 1, s.shape, generator=generator, dtype=torch.int64).to(DTYPES[s.dtype])


def random_storage(format: Format, N: int, K: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors with random content; indices are legal ones."""
    out = {s.name: random_tensor(s, seed + i) for i, s in enumerate(format.stored(N, K))}
    if format.kind == "spqr":  # no infinite scale: the exponents of its float16 numbers are small
        out["words"] &= ~(0x40 << 22)
    if "g_idx" in out:
        groups = out["scales"].shape[0] if "scales" in out else out["scale"].shape[1]
        out["g_idx"] = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).to(torch.int32) % groups
    return out
