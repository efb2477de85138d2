"""Kernels stay inside their arguments: parameters and dims that do not fit are refused, and what is accepted is safe.

What a template says it touches is tried on arrays between pages that nobody may touch: see guarded.py.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import CASES
from test_artifact_security import edited, reseal

import qcompile
from qcompile.artifact import Buffer, Call, Executable, Extent, KernelSpec, Step, Variant, View
from qcompile.errors import ArtifactError, ConfigError, InternalError, QCompileError
from qcompile.lowering.mlir import templates
from qcompile.lowering.mlir.build import Builder
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.plan import make_plan
from qcompile.target import native

THREADS = 3
HUGE = 2**40
SIZES = (0, 1, 2, 3, 4, 5, 7, 16, 17, 31, 32, 33, 40, 48, 64, 96, 128, 300)


def spec_of(name: str) -> KernelSpec:
    """The kernel of a case as an artifact holds it: lists for tuples."""
    spec = CASES[name][0]
    return KernelSpec(spec.template, json.loads(json.dumps(spec.params)))


def program(spec: KernelSpec, touched: list[Extent], dims: tuple[int, ...], writes: Any = None) -> Executable:
    """One call of the kernel on buffers of exactly these extents."""
    buffers = {f"t{i}": Buffer(f"t{i}", extent.dtype, (extent.elements,), "temp") for i, extent in enumerate(touched)}
    args = tuple(View(name, buffer.shape, (1,)) for name, buffer in buffers.items())
    written = tuple(i for i, extent in enumerate(touched) if extent.written)
    call = Call("kernel", args, dims, written if writes is None else writes)
    return Executable(buffers, (), (), (Step("only", "", (Variant(None, (call,)),)),), {"kernel": spec})


def plan(made: Executable, ours: bool = False) -> None:
    make_plan(made, {"threads": THREADS}, {"kernel": 0}, Bounds.of(made.kernels, Builder(), ours))


def touched_by(name: str) -> tuple[KernelSpec, list[Extent], tuple[int, ...]]:
    spec, dims = spec_of(name), CASES[name][1]
    return spec, list(templates.extents(spec)(dims, THREADS)), dims


def refusal(made: Executable) -> str:
    with pytest.raises(ArtifactError) as caught:
        plan(made)
    return str(caught.value)


def accepted(spec: KernelSpec, dims: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """`dims` and `count` random neighbours of it that the template has no objection to, as long as they are small."""
    draw, found, extents = random.Random(str(dims)), [dims], templates.extents(spec)
    for _ in range(200 * count):
        changed = tuple(draw.choice(SIZES) if draw.random() < 0.4 else dim for dim in dims)
        try:
            if sum(extent.elements for extent in extents(changed, THREADS)) < 10**6:
                found.append(changed)
        except ArtifactError:
            continue
        if len(found) > count:
            break
    return found


def guarded(*lines: Any) -> subprocess.CompletedProcess[str]:
    script, text = Path(__file__).parents[1] / "guarded.py", "\n".join(map(json.dumps, lines))
    return subprocess.run([sys.executable, str(script)], input=text, capture_output=True, text=True)


FAMILIES = {
    "linear": "linear|activation",
    "attention": "attention|cache|rope",
    "others": "(?!linear|act|att|cache|rope)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by mprotect")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_touches_no_more_than_it_says(family):
    names = [name for name in CASES if re.match(FAMILIES[family], CASES[name][0].template)]
    specs = [(spec_of(name), CASES[name][1]) for name in names]
    done = guarded(*([spec.template, spec.params, accepted(spec, dims, 30), 0] for spec, dims in specs))
    runs = done.stdout.splitlines()
    assert done.returncode == 0, f"died at {runs[-1:]}: {done.stderr[-2000:]}"
    assert len(runs) >= 15 * len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by mprotect")
def test_an_element_too_few_would_be_noticed():
    spec, dims = CASES["softmax"]
    assert guarded([spec.template, spec.params, [dims], 1]).returncode == -signal.SIGSEGV


def test_every_template_has_a_case():
    assert {spec.template for spec, _ in CASES.values()} == templates.TEMPLATES.keys()


@pytest.mark.parametrize("name", CASES)
def test_dims_that_do_not_fit_are_refused(name):
    spec, touched, dims = touched_by(name)
    plan(program(spec, touched, dims))
    for index in range(len(dims)):
        for value in (-1, -(2**62), HUGE, 2**62):
            changed = (*dims[:index], value, *dims[index + 1 :])
            assert refusal(program(spec, touched, changed)), changed
    assert "wrong number of dims" in refusal(program(spec, touched, dims[:-1]))
    assert "wrong number of dims" in refusal(program(spec, touched, (*dims, 1)))


@pytest.mark.parametrize("name", CASES)
def test_arguments_that_do_not_fit_are_refused(name):
    spec, touched, dims = touched_by(name)
    for index, extent in enumerate(touched):
        others = [*touched[:index], extent._replace(elements=extent.elements - 1), *touched[index + 1 :]]
        assert f"argument {index}, 't{index}'" in refusal(program(spec, others, dims))
        others[index] = extent._replace(dtype="u8" if extent.dtype != "u8" else "i8", elements=8 * extent.elements)
        assert f"argument {index}, 't{index}'" in refusal(program(spec, others, dims))
        if extent.written:
            writes = tuple(i for i, other in enumerate(touched) if other.written and i != index)
            assert "a kernel writes an argument that the call only reads" in refusal(
                program(spec, touched, dims, writes)
            )
    assert "another number of arguments" in refusal(program(spec, touched[:-1], dims))
    assert "another number of arguments" in refusal(program(spec, [*touched, Extent("f32", 1)], dims))


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in paths(item, (*at, key)))]


@pytest.mark.parametrize("name", CASES)
def test_parameters_that_do_not_fit_are_refused(name):
    """Whatever stands where: an ArtifactError, or a kernel of bounded text that says what it touches."""
    spec, _, dims = touched_by(name)
    values = ("x", "", None, True, 0, -1, 3, 2**31, HUGE, 2**70, 1.5, 1e300, [], {}, ["x"], {"op": "glu"}, "f32")
    places = paths(spec.params)
    for place in places if len(places) < 60 else random.Random(name).sample(places, 60):
        for value in values:
            changed = KernelSpec(spec.template, edited(spec.params, place, value))
            try:
                extents = templates.extents(changed)
                if value == 3 or place == ():
                    assert len(templates.emit(changed, native())) < 4_000_000
                extents(dims, THREADS)
            except ArtifactError as error:
                assert str(error)
    for changed in ({**spec.params, "extra": 1}, dict(list(spec.params.items())[1:])):
        if spec.template != "attention" or "extra" in changed:
            with pytest.raises(ArtifactError):
                templates.extents(KernelSpec(spec.template, changed))


def changed(name: str, **params: Any) -> KernelSpec:
    spec = spec_of(name)
    return KernelSpec(spec.template, {**spec.params, **params})


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (KernelSpec("gather2", {}), "unknown kernel template\n  found:    'gather2', did you mean 'gather'?\n"),
        (changed("gemv", rows=10**9),
         "a kernel's parameter is out of range\n  where:    linear-gemv\n  found:    rows = 1000000000"),
        (changed("gemv", rows="4"),
         "a value has the wrong type\n  where:    linear-gemv: rows\n  found:    '4'\n  expected: an integer"),
        (changed("gather", inner=4),
         "a field of Params is not known\n  where:    gather\n  found:    'inner'\n  expected: index, x, y"),
        (changed("attention", d=10**9),
         "a kernel's parameter is out of range\n  where:    attention\n  found:    d = 1000000000"),
        (changed("gemv", formats=[{"kind": "lanes", "bits": 40}]),
         "a kernel's parameter is out of range\n  where:    linear-gemv\n  found:    bits = 40"),
        (changed("embedding-gptq", n=2**31),
         "a kernel's parameter is out of range\n  where:    embedding\n  found:    a gptq weight [2147483648, 64]"),
        (changed("int8-gemv-start", act_group=0),
         "a kernel's parameters make no sense\n  where:    linear-int8-gemv\n"
         "  found:    ZeroDivisionError: integer modulo by zero"),
        (changed("pointwise", ops=[["floor_divide", "i32", [0, {"number": 0}]], ["exit", "f32", [0]]]),
         "a kernel's parameter is out of range\n  where:    pointwise\n  found:    outputs = "),
    ],
)  # fmt: skip
def test_what_is_said_about_parameters(spec, text):
    with pytest.raises(ArtifactError) as caught:
        templates.emit(spec, native())
    assert str(caught.value).startswith(text)


def test_integers_are_divided_by_no_data():
    for divisor in (0, -1, 1.0, "3", {"number": 0}, {"number": -1}, {"number": 1.0}):
        ops = [["to", "i32", [0]], ["floor_divide", "i32", [2, divisor]]]
        spec = changed("pointwise", outputs=[["i32", "unit", 3]], ops=ops)
        with pytest.raises(ArtifactError):
            templates.extents(spec)


def test_what_is_said_about_calls():
    spec, touched, dims = touched_by("gemv")
    assert dims == (1, 64, 48)
    where = "where:    step 'only', kernel 'kernel'"
    for other, text in (
        ((1, 64), f"a kernel is called with the wrong number of dims\n  {where}\n  found:    2\n  expected: 3"),
        ((1, 64, -48), f"a kernel is called with a negative dim\n  {where}\n  found:    [1, 64, -48]"),
        ((2, 64, 48), f"more rows than the kernel is written for\n  {where}\n  found:    2\n  expected: at most 1"),
        ((1, 64, 40), f"rows are no whole blocks\n  {where}\n  found:    [40]"),
        ((1, 65, 48), f"a format cannot hold a weight of this size\n  {where}\n  found:    K = 65\n"
                      "  expected: a multiple of the group, 32"),
        ((1, 64, 64), f"a kernel reaches outside its argument\n  {where}, argument 1, 't1'\n"
                      "  found:    48 elements of f32\n  expected: 64 elements of f32"),
    ):  # fmt: skip
        assert refusal(program(spec, touched, other)) == text
    with pytest.raises(InternalError, match="a kernel reaches outside its argument"):
        plan(program(spec, touched, (1, 64, 64)), ours=True)


def test_the_offset_of_a_view_counts():
    spec, touched, dims = touched_by("softmax")
    made = program(spec, touched, dims)
    (call,) = made.steps[0].variants[0].calls
    view = dataclasses.replace(call.args[0], offset=1, shape=(call.args[0].shape[0] - 1,))
    moved = dataclasses.replace(call, args=(view, *call.args[1:]))
    made = dataclasses.replace(made, steps=(Step("only", "", (Variant(None, (moved,)),)),))
    assert "found:    110 elements of bf16\n  expected: 111 elements of bf16" in refusal(made)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.down(torch.relu(self.up(x))), -1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small compiled model, saved; its program.json as data."""
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    q = qcompile.compile(Mlp(), example_inputs=(x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    folder = tmp_path_factory.mktemp("bounds") / "m.qc"
    q.save(folder)
    return folder, json.loads((folder / "program.json").read_bytes()), x, q(x)


def _linears(data: Any) -> list[tuple[Any, ...]]:
    """Where the calls of linear kernels are."""
    kernels, found = data["executable"]["kernels"], []
    for i, step in enumerate(data["executable"]["steps"]):
        for j, variant in enumerate(step["variants"]):
            for k, call in enumerate(variant["calls"]):
                if kernels[call["kernel"]]["template"] == "linear-gemv":
                    found.append(("executable", "steps", i, "variants", j, "calls", k))
    return found


def _with(saved: Any, data: Any) -> qcompile.CompiledModel:
    folder = saved[0]
    original = (folder / "program.json").read_bytes()
    try:
        (folder / "program.json").write_bytes(json.dumps(data).encode())
        reseal(folder)
        return qcompile.load(folder, threads=1)
    finally:
        (folder / "program.json").write_bytes(original)
        reseal(folder)


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def test_a_sealed_artifact_with_other_dims_is_refused(saved):
    _, data, x, y = saved
    assert torch.equal(_with(saved, data)(x), y)
    place = _linears(data)[0]
    for index in range(len(_at(data, (*place, "dims")))):
        for new in (2**20, -16, "n*4096"):
            with pytest.raises(ArtifactError):
                _with(saved, edited(data, (*place, "dims", index), new))(x[:1])
    with pytest.raises(ArtifactError, match="a kernel reaches outside its argument"):
        _with(saved, edited(data, (*place, "args", 2), _at(data, (*place, "args", 0))))(x[:1])


def test_a_sealed_artifact_with_other_parameters_is_refused_when_it_is_loaded(saved):
    _, data, *_ = saved
    kernel = _at(data, _linears(data)[0])["kernel"]
    for name, value in (("rows", 2**30), ("ragged", 1), ("epilogue", [{"op": "system"}]), ("new", 0)):
        params = {**data["executable"]["kernels"][kernel]["params"], name: value}
        with pytest.raises(ArtifactError, match="linear-gemv"):
            _with(saved, edited(data, ("executable", "kernels", kernel, "params"), params))


def test_an_input_is_all_of_its_buffer(saved):
    _, data, *_ = saved
    edit = edited(data, ("executable", "buffers", "x", "shape"), ["n", 3200])
    with pytest.raises(ArtifactError, match="an input is not all of its buffer\n  where:    x"):
        _with(saved, edit)


def test_every_edit_of_a_number_is_refused_or_runs(saved):
    """Random integers anywhere in the program: errors of the tree or a result, and never an end of this process."""
    _, data, x, _ = saved
    draw = random.Random(0)
    places = [place for place in paths(data["executable"]) if type(_at(data["executable"], place)) is int]
    refused = 0
    for place in draw.sample(places, 60):
        edit = edited(data, ("executable", *place), draw.choice([0, 1, 3, -1, 15, 64, 1000, HUGE]))
        try:
            _with(saved, edit)(x)
        except QCompileError:
            refused += 1
    assert 10 < refused < 60


def test_a_state_belongs_to_its_model():
    import end_to_end_models as tiny

    one, other = tiny.compiled("llama", "float"), tiny.compiled("gpt2", "float")
    state = one(input_ids=tiny.tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=re.escape("a state belongs to another model")):
        other(input_ids=tiny.tokens(1, 1), past_key_values=state)


@pytest.mark.parametrize("accuracy", ["exact", "int8"])
def test_plans_of_compiled_models_pass(accuracy):
    import end_to_end_models as tiny

    q = tiny.compiled("llama", "nf4", "cpu", accuracy)
    assert q.session.bounds is not None and q.session.bounds.ours
    for b, s, t, c in ((1, 1, 1, 64), (1, 7, 1, 64), (3, 1, 1, 128), (2, 64, 64, 64), (5, 33, 2, 1000)):
        q.session.plan({"b": b, "s": s, "t": t, "c": c})
