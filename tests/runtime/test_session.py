"""Sessions: results, binding of inputs and outputs, variants, errors, threads."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading

import pytest
import small_programs as small
import torch

from qcompile.artifact import Call, Port, Step, Variant, View
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime.session import Session


def session(program=None, weights=None, **options):
    program = program or small.arithmetic()
    return Session(program, weights or {"w": torch.arange(8.0).view(2, 4)}, small.kernels(), **options)


def expected(x):
    t = x.float() + torch.arange(8.0).view(2, 4)
    return t * x.float() + t


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_and_eager_calls_alternate(threads):
    x = torch.randn(2, 4)
    assert torch.equal(session(threads=threads)({"x": x})["y"], expected(x))


def test_inputs_may_be_strided_misaligned_or_of_another_float_dtype():
    run, x = session(), torch.randn(9)
    for case in (
        torch.randn(4, 2).T,
        x[1:].view(2, 4),
        torch.randn(2, 4).half(),
        torch.randn(2, 4, requires_grad=True),
    ):
        assert torch.equal(run({"x": case})["y"], expected(case.detach()))


def test_outputs_belong_to_the_caller():
    run = session()
    first = run({"x": torch.ones(2, 4)})["y"]
    kept = first.clone()
    run({"x": torch.zeros(2, 4)})
    assert torch.equal(first, kept)


def test_out_is_written_where_it_fits():
    run, out = session(), torch.empty(2, 4)
    y = run({"x": torch.ones(2, 4)}, out={"y": out})["y"]
    assert y.data_ptr() == out.data_ptr() and torch.equal(out, expected(torch.ones(2, 4)))
    assert run({"x": torch.ones(2, 4)}, out={"y": torch.empty(3)})["y"].shape == (2, 4)


def test_a_barrier_stands_behind_every_call():
    count = 40000
    names = ["x", *[f"t{i}" for i in range(1, 20)], "y"]
    kinds = ["input", *["temp"] * 19, "output"]
    program = small.executable(
        [small.buffer(name, kind, ("n",)) for name, kind in zip(names, kinds, strict=True)],
        [small.step(b, small.binary("mirror", a, a, b, "n")) for a, b in itertools.pairwise(names)],
        [small.port("x", ("n",))],
        [small.port("y", ("n",))],
    )
    x = torch.arange(float(count))
    want = x
    for _ in range(20):
        want = want + want.flip(0)
    run = session(program, {"none": x}, threads=2)
    for _ in range(5):
        assert torch.equal(run({"x": x})["y"], want)
    assert run.plan({"n": count}).arena == 2 * count * 4


def test_the_first_variant_that_fits_runs():
    few, many = small.binary("add", "x", "x", "y"), small.binary("mul", "x", "x", "y")
    program = small.executable(
        [small.buffer("x", "input"), small.buffer("y", "output")],
        [Step("either", "", (Variant(("b", 2), (few,)), Variant(None, (many,))))],
        [small.port("x")],
        [small.port("y")],
    )
    program = dataclasses.replace(program, kernels=small.SPECS)
    run = session(program, {"none": torch.ones(1)})
    for b in (1, 2, 3, 2):
        x = torch.full((b, 4), 3.0)
        assert torch.equal(run({"x": x})["y"], x + x if b <= 2 else x * x)


def test_an_output_may_be_a_view_of_anything():
    program = small.arithmetic()
    outputs = (
        program.outputs[0],
        Port("again", View("y", ("b", 4), (4, 1)), "f32"),
        Port("turned", View("y", (4, "b"), (1, 4)), "f32"),
        Port("middle", View("t1", ("b",), (4,), 1), "f16"),
        Port("same", View("x", ("b", 4), (4, 1)), "f32"),
    )
    run, x = session(dataclasses.replace(program, outputs=outputs)), torch.randn(2, 4)
    got = run({"x": x})
    y, t = expected(x), x + torch.arange(8.0).view(2, 4)
    assert torch.equal(got["again"], y) and torch.equal(got["turned"], y.T) and torch.equal(got["same"], x)
    assert torch.equal(got["middle"], t[:, 1].half()) and got["same"].data_ptr() != x.data_ptr()
    got["y"].zero_()
    assert torch.equal(got["again"], y)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "an input is missing\n  found:    none\n  expected: x"),
        ({"y": 1}, "an input is not known\n  found:    'y'\n  expected: x"),
        ({"xx": 1}, "an input is not known, did you mean 'x'?\n  found:    'xx'\n  expected: x"),
        ({"x": 1}, "an input is not a tensor\n  where:    x\n  found:    int\n  expected: f32"),
        (
            {"x": torch.ones(2, 4).long()},
            "an input has the wrong dtype\n  where:    x\n  found:    torch.int64\n  expected: f32",
        ),
        ({"x": torch.ones(4)}, "an input has the wrong shape\n  where:    x\n  found:    [4]\n  expected: [b, 4]"),
        (
            {"x": torch.ones(2, 5)},
            "an input has the wrong shape\n  where:    x\n  found:    [2, 5]\n  expected: [b, 4]",
        ),
        ({"x": torch.ones(9, 4)}, "the size 'b' is out of range\n  found:    9\n  expected: 1 to 8"),
    ],
)
def test_inputs_that_do_not_fit(inputs, text):
    with pytest.raises(ConfigError) as error:
        session(sizes={"b": (1, 8)})(inputs)
    assert str(error.value) == text


def test_two_inputs_must_agree_on_a_size():
    program = small.executable(
        [small.buffer("x", "input"), small.buffer("z", "input"), small.buffer("y", "output")],
        [small.step("add", small.binary("add", "x", "z", "y"))],
        [small.port("x"), small.port("z")],
        [small.port("y")],
    )
    run = session(program, {"none": torch.ones(1)})
    with pytest.raises(ConfigError, match=re.escape("[b, 4] with b = 2 as elsewhere")):
        run({"x": torch.ones(2, 4), "z": torch.ones(3, 4)})


def test_indices_are_checked():
    program = small.arithmetic()
    limited = dataclasses.replace(program.buffers["x"], below="b+1")
    run = session(dataclasses.replace(program, buffers={**program.buffers, "x": limited}))
    run({"x": torch.full((2, 4), 2.0)})
    with pytest.raises(ConfigError, match="an index is out of range\n  where:    x\n  found:    3\n  expected: 0 to 2"):
        run({"x": torch.full((2, 4), 3.0)})


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"v": torch.ones(1)}, "a weight is missing\n  where:    w\n  expected: f32 [2, 4]"),
        ({"w": torch.ones(2, 3)}, "found:    f32 [2, 3]\n  expected: f32 [2, 4]"),
        ({"w": torch.ones(2, 4).half()}, "found:    f16 [2, 4]\n  expected: f32 [2, 4]"),
    ],
)
def test_weights_that_do_not_fit(weights, text):
    with pytest.raises(ArtifactError, match=re.escape(text)):
        session(weights=weights)


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (View("t1", (9,), (1,)), "a view reaches outside its buffer"),
        (View("t1", (2, 4), (5, 1)), "a view reaches outside its buffer"),
        (View("t1", (1,), (1,), -1), "a view reaches outside its buffer"),
        (View("t1", (1,), (1,), "b*4"), "a view reaches outside its buffer"),
        (View("t1", (2,), (-1,), 7), "a view has a negative stride"),
        (View("t1", ("b-3",), (1,)), "a dimension is negative"),
        (View("t1", ("b*4000000000*4000000000*4000000000",), (1,)), "a dimension is out of range"),
    ],
)
def test_views_stay_inside_their_buffer(view, text):
    program = small.arithmetic()
    bad = small.step("bad", Call("add", (view, small.flat("x", 1), small.flat("t1", 1)), (1,), (2,)))
    run = session(dataclasses.replace(program, steps=(bad, *program.steps)))
    with pytest.raises(ArtifactError, match=text):
        run({"x": torch.ones(2, 4)})


def test_a_missing_kernel_is_named():
    with pytest.raises(ArtifactError, match="a kernel is missing\n  found:    add"):
        Session(small.arithmetic(), {"w": torch.ones(2, 4)}, {})


def test_sessions_run_from_many_threads():
    runs = [session(threads=2), session(threads=1), session(threads=2)]
    right = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(30):
            x = torch.randn(2, 4, generator=generator)
            right.append(torch.equal(runs[(seed + i) % 3]({"x": x})["y"], expected(x)))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(right) == 120 and all(right)


def test_profile_names_every_call():
    assert [name for name, _ in session().profile({"x": torch.ones(2, 4)})] == ["add", "mul", "sum"]


def test_a_repeated_call_binds_nothing_again():
    program = small.arithmetic()
    renamed = dataclasses.replace(program, outputs=(dataclasses.replace(program.outputs[0], name="result"),))
    run, x, out = session(renamed), torch.ones(2, 4), {"result": torch.empty(2, 4)}
    run({"x": x}, out=out)
    binding = next(iter(run._plans.values()))
    before = binding.calls
    assert run({"x": x}, out=out)["result"].data_ptr() == out["result"].data_ptr()
    assert binding.calls is before
