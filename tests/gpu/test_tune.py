"""`qcompile tune`: candidates without a GPU, the fastest of what a timer says, and a table that changes the kernel."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import qcompile
from qcompile import tuning
from qcompile.artifact import Built, Launch
from qcompile.cli import main
from qcompile.errors import ArtifactError, ConfigError, ToolchainError
from qcompile.lowering.triton import tables, toolchain
from qcompile.lowering.triton.build import Builder
from qcompile.lowering.triton.describe import kernel_rows, launch_rows
from qcompile.runtime.codes import coded
from qcompile.target import target

H100 = target("cuda:sm_90")
CONFIG = {"quant_method": "hqq", "nbits": 4, "group_size": 64}


@pytest.fixture(scope="module")
def contents():
    (made,) = tuning.layers([(96, 256)], CONFIG)
    return made


@pytest.fixture(scope="module")
def tasks(contents):
    return tuning.tasks(contents.artifact, H100)


def test_every_kernel_with_a_schedule_is_a_task_once(tasks):
    assert len({task.problem for task in tasks}) == len(tasks) >= 3
    assert {task.problem.k for task in tasks} == {256} and {task.problem.n for task in tasks} == {96}


def test_candidates_come_in_the_order_of_the_model_with_the_default_among_them(tasks):
    for task in tasks:
        rows = tuning.plan(task, 90, most=3)
        assert [row.modelled for row in rows[:3]] == sorted(row.modelled for row in rows[:3])
        assert sum(row.chosen for row in rows) == 1
        assert len({row.schedule for row in rows}) == len(rows) <= 4


class Stopwatch:
    """Says what it was told to, kernel after kernel; what would take for ever does not start."""

    name = "a GPU"

    def __init__(self, *microseconds: float):
        self.left, self.seen = list(microseconds), []

    def __call__(self, kernel, dims, extents, given) -> float:
        self.seen.append((kernel.source, dims, [tensor is not None for tensor in given]))
        if (found := self.left.pop(0)) == float("inf"):
            raise ArtifactError("a kernel needs more of this GPU than it has")
        return found


def fails_for(wrong: str):
    """A toolchain that has no kernel for the source that prints as `wrong`; a kernel's text is how its source prints."""

    def compile_sources(sources, code):
        if any(repr(source) == wrong for source in sources):
            raise ToolchainError("no kernel")
        return [Built(repr(source), b"", source.entry, Launch(source.grid, source.warps)) for source in sources]

    return compile_sources


def test_the_fastest_is_kept_and_what_has_no_kernel_is_left_out(tasks, contents, monkeypatch):
    rows = tuning.plan(tasks[0], 90, most=3)[:3]
    texts = [kernel.source for kernel in _all_built(rows, monkeypatch)]
    assert len(set(texts)) == 3
    monkeypatch.setattr(toolchain, "compile_sources", fails_for(texts[1]))
    timer = Stopwatch(7.0, 5.5)
    timed = tuning.measure(rows, H100, timer, contents.tensors)
    assert [row.measured for row in timed] == [7.0, None, 5.5]
    assert [source for source, _, _ in timer.seen] == [texts[0], texts[2]]
    assert all(dims == (1,) and sum(given) >= 2 for _, dims, given in timer.seen)
    ((key, entry),) = tuning.best(timed, 90, timer.name).entries.items()
    assert key == (90, tasks[0].problem) and entry.schedule == rows[2].schedule
    assert (entry.microseconds, entry.device) == (5.5, "a GPU")


def test_what_is_found_is_kept_problem_by_problem(contents, monkeypatch):
    monkeypatch.setattr(toolchain, "compile_sources", fails_for("no text has this"))
    kept, plan = [], tuning.plan

    def keep(rows):
        kept.append([row.measured for row in rows])
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "plan", lambda *given: plan(*given)[:2])
    with pytest.raises(KeyboardInterrupt):
        tuning.tune([contents], H100, Stopwatch(7.0, float("inf"), 5.0, 6.0), keep=keep)
    assert kept == [[7.0, None], [5.0, 6.0]]


def _all_built(rows, monkeypatch):
    monkeypatch.setattr(toolchain, "compile_sources", fails_for("no text has this"))
    return tuning.built(rows, H100)


def test_a_table_changes_the_kernel_and_its_key(tasks):
    task = tasks[0]
    other = next(row.schedule for row in tuning.plan(task, 90) if not row.chosen)
    plain = Builder(schedules=tables.Table())
    tuned = Builder(schedules=tables.Table.of([tables.Entry(90, task.problem, other)]))
    assert dict(tuned.schedules_of(task.spec, H100.name))[task.problem] == other
    assert plain.key(task.spec, H100.name) != tuned.key(task.spec, H100.name)
    assert plain.key(task.spec, "cuda:sm_80") == tuned.key(task.spec, "cuda:sm_80")


def test_the_users_own_table_is_used_where_there_is_one(tasks, tmp_path, monkeypatch):
    task = tasks[0]
    other = next(row.schedule for row in tuning.plan(task, 90) if not row.chosen)
    monkeypatch.setenv("QCOMPILE_HOME", str(tmp_path))
    before = Builder().key(task.spec, H100.name)
    tables.write(tmp_path / "schedules.json", tables.Table.of([tables.Entry(90, task.problem, other)]))
    assert Builder().key(task.spec, H100.name) != before
    (tmp_path / "schedules.json").write_text("{}")
    with pytest.raises(ConfigError, match="a field is missing"):
        Builder().key(task.spec, H100.name)


def test_rows_of_the_report(contents):
    program = contents.artifact.executable
    builder = Builder(schedules=tables.Table())
    launch = Launch((1, 1, 1), 4, 1000, stages=3, registers=80, loop=300, products=800.0)
    kernels = {coded(name, H100): Built("", b"", "f", launch) for name in program.kernels}
    rows = kernel_rows(program.kernels, kernels, H100.codes()[:1], builder)
    assert [row.kernel for row in rows] == sorted(program.kernels)
    scheduled = [row for row in rows if row.tile]
    assert scheduled and all(row.instructions == pytest.approx(300 * row.tile[1] / 800, abs=0.01) for row in scheduled)
    assert {(row.code, row.registers, row.shared, row.stages) for row in rows} == {("sm_90", 80, 1000, 3)}
    (layer,) = launch_rows(program)
    assert (layer.layers, layer.count, layer.aten) == ("*", 1, 0) and layer.kernels >= 1


def tune(*arguments, code=0):
    result = CliRunner().invoke(main, ["tune", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_dry_run_needs_no_gpu_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_HOME", str(tmp_path))
    asked = ("--shapes", "96x256", "--config", json.dumps(CONFIG), "--target", "cuda:sm_90", "--dry-run", "--most", 2)
    text = tune(*asked)
    assert "N=96 K=256 M<=4" in text and "chosen" in text and "measured" not in text
    assert text == tune(*asked)
    rows = json.loads(tune(*asked, "--json"))
    assert {row["measured us"] for row in rows} == {None} and all(row["modelled us"] > 0 for row in rows)
    assert not (tmp_path / "schedules.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        ((), "one of ARTIFACT and --shapes is needed", 2),
        (("--shapes", "96by256"), "no list of shapes", 2),
        (("--shapes", "96x256", "--target", "cpu", "--dry-run"), "schedules are for one GPU", 1),
        (("--shapes", "96x256", "--target", "cuda:sm_80,sm_90", "--dry-run"), "schedules are for one GPU", 1),
        (("--shapes", "96x256", "--target", "cuda:sm_90"), "schedules are timed on the GPU that they are for", 1),
    ],
)
def test_what_cannot_be_tuned_says_so(arguments, says, code, monkeypatch):
    monkeypatch.setattr(tuning, "gpu_capability", lambda: None)
    assert says in tune(*arguments, code=code)


def test_schedules_are_for_cuda_alone():
    with pytest.raises(ConfigError, match="only kernels for CUDA have schedules"):
        qcompile.compile(
            torch.nn.Linear(4, 4), target="reference", schedules="s.json", example_inputs=(torch.ones(1, 4),)
        )


def test_a_model_for_a_cpu_has_no_schedules(contents):
    with pytest.raises(ConfigError, match="only kernels for CUDA have schedules"):
        tuning.tasks(replace(contents.artifact, target="cpu:x86-64-v3"), H100)
