"""The evaluator of PTX itself: its arithmetic against torch and exact numbers, its layouts against products, and every fault."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from gpu.ptx import Fault, Memory, inline, parse, run

THREADS = 64
HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %d<99>;\n"
# %d0: the array; %r0: the thread; %d1: its place in the array; %r1: its place in shared memory.
START = """ld.param.b64 %d0, [array]; mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d0, %d1;
mov.b32 %r1, smem; shl.b32 %r2, %r0, 2; add.s32 %r1, %r1, %r2;\n"""


def started(body: str, array: torch.Tensor, blocks: int = 1, order: int | None = None, number: int = 0) -> torch.Tensor:
    """`array` after a kernel of 64 threads and 1024 bytes of shared memory."""
    entry = ".visible .entry kernel(.param .u64 array, .param .u32 number)\n.reqntid 64\n"
    text = f"{HEADER}{entry}{{\n{REGISTERS}{START}{body}\nret;\n}}"
    arguments = [array.data_ptr(), number]
    run(parse(text), "kernel", (blocks, 1, 1), THREADS, 1024, arguments, Memory(array), order)
    return array


def fault(body: str, array: torch.Tensor | None = None, order: int | None = None) -> str:
    with pytest.raises(Fault) as caught:
        started(body, torch.arange(THREADS, dtype=torch.int32) if array is None else array, order=order)
    return str(caught.value)


def test_threads_of_blocks_go_different_ways_and_meet_again() -> None:
    """Each counts down from its number; those of odd numbers do more."""
    body = """mov.u32 %r3, %ctaid.x; shl.b32 %r4, %r3, 8; cvt.u64.u32 %d2, %r4; add.s64 %d1, %d1, %d2; mov.b32 %r5, 0;
    mov.b32 %r6, %r0;
    LOOP: setp.eq.s32 %p1, %r6, 0; @%p1 bra DONE; add.s32 %r5, %r5, %r6; sub.s32 %r6, %r6, 1; bra LOOP;
    DONE: and.b32 %r7, %r0, 1; setp.ne.b32 %p2, %r7, 0; @!%p2 bra EVEN; mul.lo.s32 %r5, %r5, 10;
    EVEN: bar.sync 0; add.s32 %r5, %r5, %r3; st.global.b32 [%d1], %r5;"""
    number = torch.arange(THREADS, dtype=torch.int32)
    once = number * (number + 1) // 2 * torch.where(number % 2 == 1, 10, 1)
    for order in (None, 3):
        found = started(body, torch.zeros(3 * THREADS, dtype=torch.int32), 3, order)
        assert torch.equal(found, torch.cat([once, once + 1, once + 2]).int())


def test_the_last_block_to_arrive_is_another_one_in_another_order() -> None:
    body = """setp.ne.s32 %p1, %r0, 0; @%p1 ret; atom.global.gpu.acq_rel.add.u32 %r3, [%d0], 1; setp.ne.s32 %p1, %r3, 4;
    @%p1 ret; mov.u32 %r4, %ctaid.x; st.global.b32 [%d0+4], %r4;"""
    last = [started(body, torch.zeros(2, dtype=torch.int32), 5, order).tolist() for order in (None, 0, 1, 2)]
    assert [count for count, _ in last] == [5] * 4 and last[0][1] == 4 and len({block for _, block in last}) > 1


FAULTS = {
    "outside of all memory": "st.global.b32 [%d1+4], %r0;",
    "outside of the 1024": "st.shared.b32 [%r1+800], %r0;",
    "no multiple of 8": "ld.global.b64 %d3, [%d1];",
    "no multiple of 16": "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};",
    "never written": "ld.shared.b32 %r3, [%r1];",
    "32 threads of the block never reach": "setp.lt.u32 %p1, %r0, 32; @!%p1 bra OVER; bar.sync 0; OVER: bar.sync 0;",
    "a part of a warp": "setp.lt.u32 %p1, %r0, 31; @%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;",
    "not known": "frobnicate.b32 %r3, %r0;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_a_gpu_would_not_do_is_a_fault(message: str) -> None:
    found = fault(FAULTS[message])
    assert message in found and found.startswith("line 11: ") and found[9:].split("\n")[0] in FAULTS[message]


def test_arguments_and_threads_are_those_of_the_entry() -> None:
    module = parse(HEADER + ".visible .entry kernel(.param .u64 array)\n.reqntid 64\n{ ret; }")
    with pytest.raises(Fault, match="1 parameters and was given 2"):
        run(module, "kernel", (1, 1, 1), 64, 0, [0, 0], Memory())
    with pytest.raises(Fault, match="must be started with 64 threads"):
        run(module, "kernel", (1, 1, 1), 128, 0, [0], Memory())


COPY = "and.b32 %r4, %r0, 63; cp.async.ca.shared.global [%r1], [%d1], 0x4, 4; cp.async.commit_group;"


def test_a_copy_has_arrived_when_it_was_waited_for() -> None:
    array = torch.arange(THREADS, dtype=torch.int32)
    exchange = "bar.sync 0; xor.b32 %r5, %r2, 252; mov.b32 %r6, smem; add.s32 %r6, %r6, %r5; ld.shared.b32 %r7, [%r6];"
    found = started(f"{COPY} cp.async.wait_group 0; {exchange} bar.sync 0; st.global.b32 [%d1], %r7;", array.clone())
    assert torch.equal(found, array.flip(0))
    assert "never written" in fault(f"{COPY} cp.async.wait_group 1; {exchange}")
    # Without a barrier between them it is luck which of two warps comes first.
    late = f"{COPY} cp.async.wait_group 0; {exchange.removeprefix('bar.sync 0;')}"
    started(late, array.clone())
    assert "never written" in fault(late, order=0)


def test_a_product_of_a_warp_group_needs_four_warps() -> None:
    registers = "{%r3,%r4,%r5,%r6}"
    body = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {registers}, {registers}, %d0, 1, 1, 1, 0;"
    assert "a part of a warp group" in fault(body)


def test_a_product_and_a_sum_are_rounded_once() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 2**32, 4000, dtype=np.uint32) & 0x8FFFFFFF | 0x30000000 for _ in range(2))
    product = a.view(np.float32).astype(np.float64) * b.view(np.float32)
    # Sums near halfway between two numbers, where rounding twice goes wrong.
    c = (-product * (1 - 2.0 ** generator.integers(-30, -1, 4000))).astype(np.float32).view(np.uint32)
    (found,) = inline(["fma.rn.f32 $0, $1, $2, $3;"], 1, [a, b, c])
    for i in range(0, 4000, 7):
        exact = sum((Fraction(float(x.view(np.float32)[i])) for x in (c,)), Fraction(product[i]))
        near = found.view(np.float32)[i]
        for other in (np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))):
            assert abs(Fraction(float(near)) - exact) <= abs(Fraction(float(other)) - exact)


@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [("bf16x2", torch.bfloat16, 16), ("f16x2", torch.float16, 16), ("satfinite.e4m3x2", torch.float8_e4m3fn, 8),
     ("satfinite.e5m2x2", torch.float8_e5m2, 8)],
)  # fmt: skip
def test_floats_become_small_as_torch_rounds_them(name: str, dtype: torch.dtype, width: int) -> None:
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat(
        [bits.int().view(torch.float32), torch.randn(2000) * 2.0 ** torch.randint(-20, 10, (2000,)), torch.zeros(2)]
    )
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (every[:125] + every[1:126]) / 2
    x = torch.cat([x, every[:127], halfway, -halfway, -torch.zeros(1)])
    most = torch.finfo(dtype).max
    x = x[x.isfinite() & (x.abs() < most)]
    words = x.numpy().view(np.uint32)
    (found,) = inline([f".reg .b16 h;cvt.rn.{name}.f32 h, $2, $1; cvt.u32.u16 $0, h;" if width == 8 else
                       f"cvt.rn.{name}.f32 $0, $2, $1;"], 1, [words, words[::-1].copy()])  # fmt: skip
    expected = x.to(dtype).view(torch.int16 if width == 16 else torch.uint8).numpy().astype(np.uint32) & (
        (1 << width) - 1
    )
    assert np.array_equal(found & ((1 << width) - 1), expected)
    assert np.array_equal(found >> width, expected[::-1])


MMA = {
    "f16": (torch.float16, 16),
    "bf16": (torch.bfloat16, 16),
    "s8": (torch.int8, 32),
    "e4m3": (torch.float8_e4m3fn, 32),
}


@pytest.mark.parametrize("name", MMA)
def test_products_of_tiles(name: str) -> None:
    """Registers are loaded as the reference of mma.m16n8k16 and k32 draws them."""
    dtype, k = MMA[name]
    a, b = (torch.randint(-8, 9, size).to(torch.int8) for size in ((16, k), (8, k)))
    each = torch.arange(32)
    row, place, per = each // 4, each % 4, k // 8
    word = torch.arange(per)[None] + per * place[:, None]
    bits = [x.to(dtype).contiguous().view(torch.uint8).reshape(len(x), k, -1) for x in (a, b)]
    left = [bits[0][(row + 8 * (i % 2))[:, None], word + (i // 2) * k // 2] for i in range(4)]
    right = [bits[1][row[:, None], word + i * k // 2] for i in range(2)]
    inputs = [x.reshape(32, 4).numpy().copy().view(np.uint32)[:, 0] for x in (*left, *right)]
    total = "s32" if name == "s8" else "f32"
    zero = "0" if name == "s8" else "0f00000000"
    found = inline([f"mma.sync.aligned.m16n8k{k}.row.col.{total}.{name}.{name}.{total} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, "
                    f"{{$8,$9}}, {{{zero},{zero},{zero},{zero}}};"], 4, inputs)  # fmt: skip
    expected = a.float() @ b.float().T
    for i, each_ in enumerate(found):
        sums = torch.from_numpy(each_.view(np.int32 if name == "s8" else np.float32).copy()).float()
        assert torch.equal(sums, expected[row + 8 * (i // 2), 2 * place + i % 2])
