"""Compiling Triton sources without a GPU: machine code, PTX, the same bytes again, and errors that name the text."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest

from qcompile.errors import ToolchainError
from qcompile.lowering.triton import toolchain
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.toolchain import PTX_VERSION, compile_sources, key
from qcompile.lowering.triton.worker import fenced
from qcompile.target import PTX, target

BODY = """
at = tl.program_id(0) * 128 + tl.arange(0, 128)
tl.store(y + at, tl.load(x + at, mask=at < d0) + 1.0, mask=at < d0)
"""
SM80 = target("cuda:sm_80")


@pytest.fixture(autouse=True)
def _own_workers():
    """Processes that compile are started by each test here, unlike in the others."""
    token = toolchain._kept.set(None)
    yield
    toolchain._kept.reset(token)


def source(body=BODY, **changes):
    text = module("add_one", "y = x + 1.", ["x", "y"], 1, body, SM80)
    return dataclasses.replace(Source(text, "add_one", ("f32", "f32"), 1, ("(d0 + 127)//128", 1, 1)), **changes)


def test_a_kernel_compiles_to_the_same_machine_code_again():
    alone = "\nimport sys\nassert 'torch' not in sys.modules\n"
    wanted = source(text=source().text + alone)
    (first, same), (again,) = compile_sources([wanted, wanted], SM80), compile_sources([wanted], SM80)
    assert first is same and first == again and first.object[:4] == b"\x7fELF"
    assert first.entry == "add_one" and first.source == wanted.text
    launch = first.launch
    assert (launch.grid, launch.warps, launch.scratch, launch.spills) == (source().grid, 4, 2, 0)
    assert 0 < launch.registers < 64


def test_ptx_is_in_a_version_that_older_drivers_read():
    (made,) = compile_sources([source()], PTX)
    text = made.object.decode()
    assert f".version {PTX_VERSION // 10}.{PTX_VERSION % 10}" in text and re.search(r"\.target sm_80\b", text)
    assert ".visible .entry add_one(" in text and made.launch.scratch == 2
    assert str(os.getcwd()) not in text and "qcompile-triton" not in text


def test_the_fallback_is_what_code_for_the_least_capability_is_assembled_from(monkeypatch):
    asked, answer = [], toolchain._Worker.answer
    monkeypatch.setattr(toolchain._Worker, "answer", lambda self, job: asked.append(job) or answer(self, job))
    jobs = [toolchain.Job(source(), code) for code in (PTX, SM80)]
    told = []
    (both, machine) = toolchain.compile_jobs(jobs, told.append)
    assert asked == jobs[1:] and sorted(told, key=jobs.index) == jobs
    (alone,) = compile_sources([source()], PTX)
    assert both == alone and machine.object[:4] == b"\x7fELF"


def test_keys_tell_apart_what_compiles_differently():
    made = [key(source(), SM80), key(source(), PTX), key(source(warps=8), SM80), key(source(BODY + "pass"), SM80)]
    assert len(set(made)) == 4 and key(source(), SM80) == made[0]


def test_what_triton_refuses_names_the_file_with_the_text(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # is about the process of the tests, not those that compile
    wrong = source(BODY.replace("tl.load", "tl.lod"))
    with pytest.raises(ToolchainError) as error:
        compile_sources([wrong], SM80)
    assert "refused a kernel for cuda:sm_80" in str(error.value) and "tl.lod" in error.value.found
    with open(error.value.where) as file:
        assert file.read() == wrong.text
    os.remove(error.value.where)


def test_a_compiler_that_dies_is_an_error_and_the_next_kernel_compiles(monkeypatch):
    monkeypatch.setattr("qcompile.lowering.triton.toolchain._processors", lambda: 1)
    fatal = source(text=source().text + "\nimport os\nos._exit(3)\n")
    with pytest.raises(ToolchainError, match="died of a kernel") as error:
        compile_sources([fatal, source()], SM80)
    assert "exit status 3" in error.value.found
    os.remove(error.value.where)


def test_a_process_that_is_kept_compiles_again(monkeypatch, tmp_path):
    monkeypatch.setattr("qcompile.lowering.triton.toolchain._processors", lambda: 1)
    told = f"\nimport os\nopen({str(tmp_path / 'processes')!r}, 'a').write(f'{{os.getpid()}} ')\n"
    wanted = [source(text=source().text + told, warps=warps) for warps in (1, 2)]
    with toolchain.workers_kept():
        for each in wanted:
            compile_sources([each], SM80)
    (process, again) = (tmp_path / "processes").read_text().split()
    assert process == again
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_a_kernel_that_needs_more_shared_memory_than_there_is_is_refused():
    tile = """
rows, cols = tl.arange(0, 128), tl.arange(0, 128)
acc = tl.zeros([128, 128], tl.float32)
for k in range(0, 4096, 128):
    a = tl.load(x + rows[:, None] * 4096 + k + cols[None, :])
    b = tl.load(x + rows[:, None] + (k + cols[None, :]) * 128)
    acc = tl.dot(a, b, acc)
tl.store(y + rows[:, None] * 128 + cols[None, :], acc)
"""
    large = source(tile, pointers=("bf16", "f32"), warps=8, stages=4)
    with pytest.raises(ToolchainError, match="more shared memory") as error:
        compile_sources([large], target("cuda:sm_86"))
    assert "expected at most 101376 on cuda:sm_86" in error.value.found
    os.remove(error.value.where)


def test_what_older_versions_of_triton_leave_out_is_put_in_front_of_tensor_cores():
    """tests/gpu/ptx refuses kernels of 9.0 without it, as the PTX manual asks for it."""
    text = "bar.sync 0;\n\twgmma.fence.sync.aligned;\n\twgmma.mma_async.sync a, b;\n@p tcgen05.mma.cta_group::1 c, d;\n"
    fence = "fence.proxy.async.shared::cta;\n"
    assert fenced(text) == (
        f"bar.sync 0;\n{fence}\twgmma.fence.sync.aligned;\n\twgmma.mma_async.sync a, b;\n"
        f"{fence}@p tcgen05.mma.cta_group::1 c, d;\n"
    )
    assert fenced("mma.sync.aligned.m16n8k16;\n") == "mma.sync.aligned.m16n8k16;\n"
