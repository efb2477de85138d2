"""A conversation's state: capacity, contents, and what a program sees of it."""

from __future__ import annotations

import pytest
import small_programs as small
import torch

from qcompile.artifact import Call, View
from qcompile.errors import ConfigError
from qcompile.runtime.session import Session
from qcompile.runtime.state import State

CACHE = small.buffer("cache", "state", ("b", 2, "c", 3))


def running_sum():
    """y = sum over slots of the cache after x [b, 2, s, 3] is written at `past`: a toy of attention over a cache."""
    inputs = [("x", ("b", 2, "s", 3), "f32"), ("past", (1,), "i64"), ("start", ("b",), "i64")]
    buffers = [small.buffer(name, "input", shape, dtype) for name, shape, dtype in inputs]
    buffers += [CACHE, small.buffer("slots", "temp", ("s",), "i64"), small.buffer("y", "output", ("b", 2, 3))]
    buffers += [small.buffer("count", "output", (1,), "i64"), small.buffer("new", "temp", ("b", 2, "c", 3))]
    x = View("x", ("b", 2, "s", 3), ("6*s", "3*s", 3, 1))
    cache, new = (View(name, ("b", 2, "c", 3), ("6*c", "3*c", 3, 1)) for name in ("cache", "new"))
    slots, past, y = View("slots", ("s",), (1,)), View("past", (1,), (1,)), View("y", ("b", 2, 3), (6, 3, 1))
    v = [{"view": i} for i in range(4)]
    return small.executable(
        buffers,
        [
            small.step("arange", Call("aten.arange.default", (slots,), (), (0,), ([{"dim": "s"}], {}))),
            small.step("slots", Call("aten.add.Tensor", (slots, past), (), (0,), (v[:2], {}))),
            small.step(
                "write", Call("aten.index_copy.default", (cache, slots, x, new), (), (3,), ([v[0], 2, v[1], v[2]], {}))
            ),
            small.step("keep", Call("aten.alias.default", (new, cache), (), (1,), (v[:1], {}))),
            small.step("sum", Call("aten.sum.dim_IntList", (cache, y), (), (1,), ([v[0], [2]], {}))),
            small.step(
                "count", Call("aten.add.Tensor", (past, past, View("count", (1,), (1,))), (), (2,), (v[:2], {}))
            ),
        ],
        [small.port(name, shape, dtype) for name, shape, dtype in inputs],
        [small.port("y", ("b", 2, 3)), small.port("count", (1,), "i64")],
    )


def session(**options):
    return Session(running_sum(), {}, {}, threads=1, **options)


def test_a_conversation_grows_and_keeps_what_it_has():
    run = session()
    state, total, length = run.new_state(2), torch.zeros(2, 2, 3), 0
    for steps in (3, 1, 60, 1, 1, 200, 1):
        x = torch.randn(2, 2, steps, 3)
        got = run({"x": x}, state)
        total = total + x.sum(2)
        assert torch.allclose(got["y"], total, atol=1e-4) and got["count"].item() == 2 * length
        length += steps
        assert state.length == length <= state.capacity
    assert state.capacity == 512


def test_two_conversations_do_not_meet():
    run = session()
    a, b = run.new_state(1), run.new_state(1)
    for _ in range(3):
        run({"x": torch.ones(1, 2, 2, 3)}, a)
    assert torch.equal(run({"x": torch.ones(1, 2, 1, 3)}, b)["y"], torch.ones(1, 2, 3))
    assert torch.equal(run({"x": torch.ones(1, 2, 1, 3)}, a)["y"], torch.full((1, 2, 3), 7.0))


def test_reset_starts_again_in_the_same_memory():
    state = State([CACHE], 2)
    state.reserve(10)
    state.advance(10)
    memory = state.tensors["cache"].data_ptr()
    state.reset()
    state.reserve(20)
    assert state.length == 0 and state.past.item() == 0 and state.tensors["cache"].data_ptr() == memory


def test_capacity_doubles_up_to_the_limit():
    state = State([CACHE], 1)
    for slots, capacity in ((1, 64), (65, 128), (129, 256), (257, 300), (300, 300)):
        state.reserve(slots, 300)
        assert state.capacity == capacity and state.tensors["cache"].shape == (1, 2, capacity, 3)
    with pytest.raises(ConfigError, match="longer than the model was compiled for\n  found:    301 positions"):
        state.reserve(301, 300)


def test_growing_keeps_the_filled_slots():
    state = State([CACHE], 1)
    state.reserve(64)
    state.tensors["cache"].normal_()
    state.advance(40)
    before = state.tensors["cache"][:, :, :40].clone()
    state.reserve(65)
    assert torch.equal(state.tensors["cache"][:, :, :40], before) and not state.tensors["cache"][:, :, 40:].any()


def test_state_errors():
    run = session(sizes={"c": (1, 100)})
    with pytest.raises(ConfigError, match="this program continues a conversation"):
        run({"x": torch.ones(1, 2, 1, 3)})
    with pytest.raises(ConfigError, match="with b = 1 as elsewhere"):
        run({"x": torch.ones(2, 2, 1, 3)}, run.new_state(1))
    with pytest.raises(ConfigError, match="longer than the model was compiled for"):
        run({"x": torch.ones(1, 2, 101, 3)}, run.new_state(1))
