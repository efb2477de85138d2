"""The CUDA session on a device that is none: launches, counters, checks, recorded decode steps, generation."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import small_programs as small
import torch
from fake_device import FakeDevice, at

from qcompile.artifact import Buffer, Built, Call, Launch, View
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime.cuda_session import CudaSession, waiting
from qcompile.runtime.generate import Sampling, generate

VOCABULARY = 50


def binary(operation):
    def run(grid, pointers, numbers):
        x, y, z = (at(pointer, "f32", numbers[0]) for pointer in pointers)
        z.copy_(operation(x, y))

    return run


def count(grid, pointers, numbers):
    """y = 0 * x + what the counters hold, which is to be nothing; they are used, and left as they were."""
    x, counters, y = at(pointers[0], "f32", 4), at(pointers[1], "i32", numbers[0]), at(pointers[2], "f32", 4)
    y.copy_(0 * x + counters.sum())
    counters.fill_(7)
    counters.zero_()


def following(grid, pointers, numbers):
    """One-hot logits of (3 x + p + 1) mod 50, if the cache holds what was written to its slots; ids go into the cache."""
    b, s, c = numbers
    ids, positions, keep = (
        at(p, "i64", n).view(-1, n // m) for p, n, m in zip(pointers, (b * s, b * s, 1), (b, b, 1), strict=False)
    )
    cache, past, logits = (
        at(pointers[3], "f32", b * c).view(b, c),
        int(at(pointers[4], "i64")),
        at(pointers[5], "f32", b * 50),
    )
    assert 0 <= past <= c - s and (cache[:, :past] >= 0).all() and (cache[:, past:] == 0).all()
    cache[:, past : past + s] = ids + 1
    next_ = (3 * ids + positions + 1) % VOCABULARY
    logits.view(b, 50).copy_(torch.nn.functional.one_hot(next_[:, int(keep)], VOCABULARY))


FUNCTIONS = {"add": binary(torch.add), "mul": binary(torch.mul), "count": count, "following": following}
KERNELS = {name: Built("", b"", name, Launch(("(d0 + 3) // 4", 1, 1), 1)) for name in FUNCTIONS}


def session(program=None, weights=None, **options):
    program = program or small.arithmetic()
    device = FakeDevice(FUNCTIONS)
    weights = {"w": torch.arange(8.0).view(2, 4)} if weights is None else weights
    return CudaSession(program, weights, KERNELS, device, **options), device


def language_model(*more):
    """A program with a cache; `more` are steps of its own, before the one that makes the logits."""
    shapes = {"input_ids": ("b", "s"), "position_ids": ("b", "s"), "keep": ("k",), "past": (1,), "start": ("b",)}
    buffers = [small.buffer(name, "input", shape, "i64") for name, shape in shapes.items()]
    buffers += [small.buffer("cache", "state", ("b", "c")), small.buffer("logits", "output", ("b", "k", VOCABULARY))]
    flat = {
        "input_ids": "b*s",
        "position_ids": "b*s",
        "keep": "k",
        "cache": "b*c",
        "past": 1,
        "logits": f"b*k*{VOCABULARY}",
    }
    args = tuple(small.flat(name, size) for name, size in flat.items())
    ports = [small.port(name, shape, "i64") for name, shape in shapes.items()]
    program = small.executable(
        buffers, [*more, small.step("next", Call("following", args, ("b", "s", "c"), (3, 5)))], ports,
        [small.port("logits", ("b", "k", VOCABULARY))],
    )  # fmt: skip
    return program


def test_launches_and_operators_of_torch_alternate():
    run, device = session()
    x = torch.randn(2, 4)
    t = x + torch.arange(8.0).view(2, 4)
    assert torch.equal(run({"x": x})["y"], t * x + t)
    assert [name for name, *_ in device.launches] == ["add", "add"] and device.launches[0][2] == (8,)
    assert [name for name, _ in run.profile({"x": x})] == ["add", "mul", "sum"]


def test_counters_are_zeros_of_their_own():
    buffers = [small.buffer("x", "input"), small.buffer("y", "output"), small.buffer("t", "temp")]
    buffers += [Buffer(name, "i32", (size,), "counter") for name, size in (("c1", 3), ("c2", "b+4"))]
    x, t, y = (small.flat(name, "b*4") for name in ("x", "t", "y"))
    calls = [
        Call("count", (x, View("c1", (3,), (1,)), t), (3,), (1, 2)),
        Call("count", (t, View("c2", ("b+4",), (1,)), y), ("b+4",), (1, 2)),
    ]
    program = small.executable(buffers, [small.step("count", *calls)], [small.port("x")], [small.port("y")])
    run, device = session(program)
    for b in (1, 1, 3, 1):
        assert torch.equal(run({"x": torch.ones(b, 4)})["y"][:1], torch.zeros(1, 4))
    plan = run.plan({"b": 3})
    assert plan.counters == 28 and plan.arena == 64
    first, second = (pointers[1] for _, pointers, _ in device.launches[-2:])
    assert first == second != device.launches[-1][1][0]


def test_pointers_of_kernels_are_multiples_of_16_bytes():
    bad = small.step(
        "odd", Call("add", (small.flat("x", 3), View("t1", (3,), (1,), 2), small.flat("y", 3)), (3,), (2,))
    )
    program = small.arithmetic()
    run, _ = session(dataclasses.replace(program, steps=(*program.steps, bad)))
    with pytest.raises(ArtifactError) as error:
        run({"x": torch.ones(2, 4)})
    assert str(error.value) == (
        "a kernel's argument does not start on a boundary\n  where:    step 'odd', kernel 'add'\n"
        "  found:    byte 8 of its buffer\n  expected: a multiple of 16"
    )


def test_numbers_of_kernels_are_i32():
    big = small.step("big", small.binary("add", "x", "x", "y", "b*2147483648"))
    program = small.executable(
        [small.buffer("x", "input"), small.buffer("y", "output")], [big], [small.port("x")], [small.port("y")]
    )
    wide = {name: dataclasses.replace(b, shape=("b", 2147483648)) for name, b in program.buffers.items()}
    run, _ = session(dataclasses.replace(program, buffers=wide))
    with pytest.raises(ArtifactError, match="a number is too large for a kernel\n  where:    step 'big', kernel 'add'"):
        run._binding(run.plan({"b": 1}), 0)


def steps(run, state, tokens, at=0):
    """The logits of decode steps that the caller makes one by one."""
    got = []
    for i, token in enumerate(tokens):
        given = {
            "input_ids": torch.tensor([[token]]),
            "position_ids": torch.tensor([[at + i]]),
            "keep": torch.tensor([0]),
        }
        got.append(run(given, state)["logits"][0, 0].argmax().item())
    return got


def test_a_decode_step_is_recorded_the_second_time_and_replayed():
    run, device = session(language_model(), {})
    state = run.new_state(1)
    tokens, want = [5, 9, 2, 11, 30], [(3 * t + p + 1) % 50 for p, t in enumerate([5, 9, 2, 11, 30])]
    assert steps(run, state, tokens) == want and device.replays == 4
    assert (
        state.length == 5
        and state.past.item() == 5
        and state.tensors["cache"][0, :5].tolist() == [t + 1 for t in tokens]
    )
    other = run.new_state(1)
    assert steps(run, other, tokens[:3]) == want[:3] and device.replays == 6
    assert steps(run, state, [1], at=5) == [9] and device.replays == 7
    plain, still = session(language_model(), {}, graphs=False)
    assert steps(plain, plain.new_state(1), tokens) == want and still.replays == 0


def test_results_of_replays_belong_to_the_caller():
    run, _ = session(language_model(), {})
    state = run.new_state(1)
    given = [
        {"input_ids": torch.tensor([[t]]), "position_ids": torch.tensor([[0]]), "keep": torch.tensor([0])}
        for t in range(4)
    ]
    results = [run(each, state)["logits"] for each in given]
    assert [int(result.argmax()) for result in results] == [1, 4, 7, 10]


def test_several_positions_are_not_recorded():
    run, device = session(language_model(), {})
    for _ in range(3):
        given = {"input_ids": torch.tensor([[1, 2]]), "position_ids": torch.tensor([[0, 1]]), "keep": torch.tensor([1])}
        run(given, run.new_state(1))
    assert device.replays == 0


def test_a_program_that_waits_for_the_gpu_is_launched_call_by_call(caplog):
    ids, flat = small.flat("input_ids", "b*s"), small.flat("found", "b*s")
    look = small.step("look", Call("aten.repeat_interleave.Tensor", (ids, flat), (), (), ([{"view": 0}], {})))
    program = language_model(look)
    program.buffers["found"] = small.buffer("found", "temp", ("b", "s"), "i64")
    assert waiting(program) == ("aten.repeat_interleave.Tensor",)
    with caplog.at_level(logging.WARNING, "qcompile"):
        run, device = session(program, {})
    assert (
        "decode steps are launched call by call" in caplog.text
        and "aten.repeat_interleave.Tensor waits" in run.uncaptured
    )
    assert steps(run, run.new_state(1), [5, 9, 2]) == [16, 29, 9] and device.replays == 0


def test_a_recording_that_fails_is_given_up(caplog):
    run, device = session(language_model(), {})
    device.refuses = "operation not permitted when stream is capturing\nmore"
    state = run.new_state(1)
    assert steps(run, state, [5, 9, 2, 11]) == [16, 29, 9, 37] and device.replays == 0
    assert run.uncaptured == "operation not permitted when stream is capturing"
    assert caplog.text.count("decode steps are launched call by call") == 1


def made(run, prompt, **options):
    options = {
        "max_new_tokens": 9,
        "sampling": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "streamer": None,
    } | options
    return generate(run, torch.tensor(prompt), None, **options)


@pytest.mark.parametrize("sampled", [False, True])
def test_generation_is_the_same_with_and_without_graphs(sampled):
    results, heard = [], []
    for graphs in (True, False):
        run, device = session(language_model(), {}, graphs=graphs)
        sampling = Sampling(2.0, top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(5)) if sampled else None
        heard.append([])
        results.append(made(run, [[5, 7], [1, 2]], sampling=sampling, streamer=heard[-1].append))
        assert device.replays == (7 if graphs else 0)
    assert torch.equal(*results) and results[0].shape == (2, 11)
    assert torch.equal(torch.stack(heard[0], 1), results[0][:, 2:])
    if not sampled:
        tokens = [5, 7]
        for _ in range(9):
            tokens.append((3 * tokens[-1] + len(tokens)) % 50)
        assert results[0][0].tolist() == tokens


def test_generation_stops_at_the_end_of_sequence():
    run, device = session(language_model(), {})
    alone = made(run, [[5]])[0]
    assert torch.equal(made(run, [[5]], eos_token_id=int(alone[3]))[0], alone[:4])
    # One step was started before it was known that the sequence had ended.
    assert len([1 for name, *_ in device.launches if name == "following"]) == 9 + 4


def test_a_cache_that_grows_is_recorded_again():
    run, device = session(language_model(), {})
    state = run.new_state(1)
    inputs = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[0]]), "keep": torch.tensor([0])}
    seen = []
    step = run.repeated(inputs, state, lambda out: seen.append(out["logits"].argmax().item()))
    for _ in range(130):
        step()
    assert state.length == 130 and state.capacity == 256 and seen == [16] * 130
    assert device.replays == 63 + 63 + 1


def test_a_cache_has_an_end():
    run, _ = session(language_model(), {}, sizes={"c": (1, 100)})
    step = run.repeated(
        {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[0]]), "keep": torch.tensor([0])},
        run.new_state(1), lambda out: None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="found:    101 positions"):
        for _ in range(101):
            step()


def test_weights_that_do_not_fit(monkeypatch):
    def full(size, device="cpu"):
        raise ArtifactError("not enough memory", found=f"{size} bytes wanted on {device}")

    program = small.arithmetic()
    monkeypatch.setattr("qcompile.runtime.memory.allocate", full)
    with pytest.raises(ArtifactError) as error:
        session(program, {"w": torch.arange(9.0)[1:].view(2, 4)})
    assert str(error.value) == (
        "the weights do not fit into the GPU's memory\n  where:    cpu\n"
        "  found:    32 bytes of weights; 32 bytes wanted on cpu\n  try:      a GPU with more memory, or a smaller format"
    )
