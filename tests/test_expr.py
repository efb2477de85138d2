"""The decode language: sharing, typing, text, and a simplifier that never changes a value."""

from __future__ import annotations

import doctest

import pytest
import torch
from format_cases import CASES, IDS, random_storage
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile.expr
import qcompile.format
import qcompile.formats.stream
import qcompile.simplify
from qcompile.errors import InternalError
from qcompile.evaluate import Reader
from qcompile.expr import Expr, bitcast, bits, cast, cat, const, k, load, n, substitute, table, var, walk, where
from qcompile.format import Format
from qcompile.formats.lanes import Lanes
from qcompile.simplify import Fact, Simplifier, coordinates, interval, simplify


@pytest.mark.parametrize("module", [qcompile.expr, qcompile.simplify, qcompile.format, qcompile.formats.stream])
def test_examples_in_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_equal_expressions_are_one_object() -> None:
    assert (n * 8 + k) // 4 is (n * 8 + k) // 4
    assert const(0.0) is not const(-0.0)
    assert const(1) is not const(1.0)
    assert table((0.0, 1.0), k) is not table((-0.0, 1.0), k)
    shared = load("t", "i32", (4, 4), n, k)
    assert sum(node.op == "load" for node in walk(shared + shared * 2)) == 1


def test_types_are_checked_where_they_are_made() -> None:
    word, half = load("w", "u8", (4,), n), load("s", "f16", (4,), n)
    assert (word.dtype, half.dtype, (word < 3).dtype) == ("i32", "f16", "bool")
    for wrong in (
        lambda: word + half,
        lambda: half // half,
        lambda: load("w", "u8", (4, 4), n),
        lambda: bits(half, 0, 4),
        lambda: bits(word, 0, 33),
        lambda: cat(word, word),
        lambda: where(word, half, half),
        lambda: bitcast("f16", half),
        lambda: const(2**31),
    ):
        with pytest.raises(InternalError):
            wrong()
    with pytest.raises(TypeError, match="no truth value"):
        bool(n < k)


def at(expr: Expr, tensors: dict[str, torch.Tensor] | None = None, n: int = 0, k: int = 0) -> torch.Tensor:
    return Reader(tensors or {}, torch.tensor([n]), torch.tensor([k]))(expr).squeeze()


def test_meaning_of_the_node_kinds() -> None:
    word = {"w": torch.tensor([-1, 0x12345678], dtype=torch.int32)}
    w = load("w", "i32", (2,), n)
    assert at(bits(w, 28, 4), word) == 15 and at(bits(w, 4, 8), word, 1) == 0x67
    assert at(bits(w, 8, 32), word) == 0x00FFFFFF and at(bits(w, 0, 32), word) == -1  # a logical shift
    assert at(bits(w, k, 32), word, 0, 31) == 1
    assert at(cat(bits(w, 0, 4), bits(w, 16, 4), bits(w, 8, 8)), word, 1) == 0x5648
    assert at((n - 5) // 4) == -2 and at((n - 5) % 4) == 3 and at((n - 5) // 3) == -2 and at((n - 5) % 3) == 1
    assert at(bitcast("f16", bits(w, 0, 16) * 0 + 0x3C00), word) == 1.0
    assert at(bitcast("i8", bits(w, 0, 8)), word) == -1
    assert at(bitcast("f32", w * 0 + 0x40490FDB), word).item() == 3.1415927410125732
    assert at(where(n < 1, const(2.5), const(1.0))) == 2.5
    assert at(table((5, 7), k), k=1) == 7
    assert at(cast("f16", const(2049.0))).dtype == torch.float16 and at(cast("f16", const(2049.0))) == 2048
    assert at(w + 1, word) == 0  # i32 wraps
    signed = {"b": torch.tensor([-3], dtype=torch.int8)}
    assert at(load("b", "i8", (1,), n), signed) == -3


def test_simplifier_resolves_addresses() -> None:
    k0, lane = var("k0"), var("lane")
    facts = {"lane": Fact(0, 15), "k0": Fact(0, 127)}
    lanes = substitute(Lanes(6).weight(64, 4096), {k: k0 * 32 + 7, n: var("nb") * 16 + lane})
    assert str(simplify(lanes, facts)) == (
        "cast(f32, code=cat(bits(codes0[nb, k0 * 4, lane], 28, 32), bits(codes1[nb, k0 * 2, lane], 26, 2)))"
        " * scale=scales[nb, k0, lane]"
    )
    assert simplify((n * 96 + k) // 32 % 3, coordinates(8, 32)) is const(0)
    assert simplify((k0 * 8 + 11) // 8) is k0 + 1
    assert simplify((k + 3) % 8, {"k": Fact(step=8)}) is const(3)
    assert simplify(k // 4 // 8) is k // 32 and simplify(k % 32 % 8) is k % 8
    assert simplify(k * 6 // 4) is k * 3 // 2 and simplify((k * 6 + 1) % 4) is k % 2 * 2 + 1
    assert simplify(k < 8, {"k": Fact(0, 7)}) is const(1, "bool")
    assert simplify(table((0, 4, 8, 12), k) // 4) is table((0, 1, 2, 3), k)


def test_simplifier_drops_masks_and_joins_fields() -> None:
    byte = load("b", "u8", (64,), k)
    word = load("w", "i32", (64,), k)
    assert simplify(bits(byte, 0, 8)) is byte
    assert simplify(bits(byte, 4, 4)) is bits(byte, 4, 32)
    assert simplify(bits(bits(word, 8, 16), 4, 4)) is bits(word, 12, 4)
    assert simplify(cat(bits(word, 3, 1), bits(word, 4, 1), bits(word, 5, 1))) is bits(word, 3, 3)
    assert simplify(bits(byte + 1, 0, 8)) is bits(byte + 1, 0, 8)  # it may carry
    assert interval(bits(word, 0, 32)) == (-(2**31), 2**31 - 1) and interval(bits(word, 1, 32)) == (0, 2**31 - 1)


@st.composite
def integers(draw: st.DrawFn, depth: int = 4) -> Expr:
    """An integer expression over `n`, `k` and a stored word that stays far from 2**31."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        number = const(draw(st.integers(-40, 40)))
        return draw(st.sampled_from([n, k, number, load("w", "i32", (64,), k), load("b", "u8", (64,), k)]))
    left = draw(integers(depth - 1))
    small = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32]))
    match draw(st.sampled_from(["add", "sub", "mul", "div", "mod", "bits", "shift", "cat", "table", "where", "pair"])):
        case "add":
            return left + draw(integers(depth - 1))
        case "sub":
            return left - draw(integers(depth - 1))
        case "mul":
            return left % 256 * draw(st.integers(-9, 9))
        case "div":
            return left // small
        case "mod":
            return left % small
        case "bits":
            return bits(left, draw(st.integers(0, 31)), draw(st.integers(1, 8)))
        case "shift":
            return bits(left, draw(integers(depth - 1)) % small, draw(st.integers(1, 12)))
        case "cat":
            start, width = draw(st.integers(0, 15)), draw(st.integers(1, 4))
            return cat(bits(left, start, width), bits(left, start + width, 3))
        case "table":
            return table(tuple(range(small, 0, -1)), left % small)
        case "where":
            return where(left < draw(integers(depth - 1)), left, draw(integers(depth - 1)))
    return left // small * small + left % small


@settings(max_examples=300)
@given(integers(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 63))
def test_simplifying_never_changes_a_value(expr: Expr, step: int, least: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randint(-(2**20), 2**20, (64,), generator=generator, dtype=torch.int32),
        "b": torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8),
    }
    columns = torch.arange(-(-least // step) * step, 64, step)
    if len(columns) == 0:
        return
    facts = {"k": Fact(least, 63, step), "n": Fact(0, 5)}
    simplifier = Simplifier(facts)
    shorter = simplifier(expr)
    true = Reader(tensors, torch.arange(6), columns)(expr)
    got = Reader(tensors, torch.arange(6), columns)(shorter)
    assert torch.equal(*torch.broadcast_tensors(got.to(true.dtype), true))
    low, high = simplifier.interval(expr)
    assert low <= int(true.min()) and int(true.max()) <= high
    assert torch.equal(true % max(simplifier.step(expr), 1) if simplifier.step(expr) else true, torch.zeros_like(true))


@pytest.mark.parametrize(("format", "N", "K"), CASES, ids=IDS)
def test_simplified_formats_decode_the_same_bits(format: Format, N: int, K: int) -> None:
    tensors = random_storage(format, N, K)
    raw, facts = format.weight(N, K), coordinates(N, K)
    rows, columns = torch.arange(N), torch.arange(K)
    true = Reader(tensors, rows, columns)(raw)
    got = Reader(tensors, rows, columns)(simplify(raw, facts))
    assert torch.equal(got.view(torch.int32), true.view(torch.int32))
