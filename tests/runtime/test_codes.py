"""Artifacts for GPUs: machine code for several in one folder, and the one that is run."""

from __future__ import annotations

import dataclasses

import artifacts
import pytest

from qcompile import target as targets
from qcompile.artifact import Built, Launch
from qcompile.errors import ArtifactError
from qcompile.runtime import codes
from qcompile.runtime.load import load
from qcompile.runtime.store import read, write
from qcompile.target import target

BOTH = target("cuda:sm_80,sm_90")
LAUNCH = Launch(("(d0 + 127)//128", 1, 1), warps=4, shared=1024, scratch=2, stages=3, registers=40)


class Builder:
    """Builds objects that say what they are."""

    def key(self, spec, target):
        return f"{spec.template}{target}".encode().hex()

    def build(self, kernels):
        asked = [(name, codes.parts(name)[0], target) for name, (_, target) in kernels.items()]
        return {name: Built(f"# {each}", f"{each} {target}".encode(), each, LAUNCH) for name, each, target in asked}

    def extents(self, spec):
        return lambda dims, threads: []


@pytest.fixture
def made(tmp_path):
    """An artifact for two capabilities, as a folder."""
    contents = artifacts.contents(target=BOTH.name)
    kernels = codes.build_codes(contents.artifact.executable.kernels, BOTH.codes(), Builder(), tmp_path / "cache")
    write(tmp_path / "m.qc", dataclasses.replace(contents, kernels=kernels))
    return tmp_path / "m.qc"


def on(monkeypatch, capability):
    monkeypatch.setattr(targets, "gpu_capability", lambda: capability)


def test_a_folder_holds_text_and_object_of_every_code(made):
    names = {file.name for file in made.iterdir() if file.name.startswith("kernel-add")}
    assert names == {
        "kernel-add.sm_80.py", "kernel-add.sm_80.cubin", "kernel-add.sm_90.py", "kernel-add.sm_90.cubin",
        "kernel-add.ptx.py", "kernel-add.ptx",
    }  # fmt: skip
    kernel = read(made, trusted=True).kernels["add.sm_90"]
    assert kernel == Built("# add", b"add cuda:sm_90", "add", LAUNCH)
    assert read(made).kernels == {}


@pytest.mark.parametrize(("has", "code"), [(80, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "ptx")])
def test_the_gpu_decides_which_code_is_run(made, tmp_path, monkeypatch, has, code):
    on(monkeypatch, has)
    trusted = load(made, native="trusted")
    assert trusted.target.name == f"cuda:{code}"
    built = load(made, builder_for=lambda _: Builder(), cache=tmp_path / "cache")
    assert list(built.contents.kernels) == [f"add.{code}"] and built.kernels()[f"add.{code}"].source == "# add"
    kernels = codes.one_code(built.contents.kernels, ["add"], built.target)
    assert kernels["add"].object == f"add cuda:{code}".encode()


@pytest.mark.parametrize(("has", "found"), [(None, "no NVIDIA GPU with a driver"), (75, "a GPU of capability 7.5")])
def test_a_machine_that_runs_none_of_them_is_told_what_there_is(made, monkeypatch, has, found):
    on(monkeypatch, has)
    with pytest.raises(ArtifactError) as error:
        load(made, native="trusted")
    assert str(error.value) == (
        f"the artifact is for another machine\n  found:    {found}\n  expected: cuda:sm_80, cuda:sm_90, cuda:ptx\n"
        '  try:      target="reference" runs anywhere'
    )


def test_cpu_and_gpu_do_not_run_each_other(made):
    with pytest.raises(ArtifactError, match="another kind of machine"):
        load(made, target="cpu:aarch64", builder_for=lambda _: Builder())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warps": 64}, "cannot be started so"),
        ({"shared": -1}, "cannot be started so"),
        ({"scratch": 99}, "cannot be started so"),
        ({"grid": ("b", 1, 1)}, "cannot be started so"),
        ({"grid": ("__import__('os')", 1, 1)}, "not a dimension"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(made, tmp_path, change, said):
    contents = read(made, trusted=True)
    wrong = dataclasses.replace(contents.kernels["add.ptx"], launch=dataclasses.replace(LAUNCH, **change))
    write(tmp_path / "wrong.qc", dataclasses.replace(contents, kernels={**contents.kernels, "add.ptx": wrong}))
    with pytest.raises(ArtifactError, match=said):
        read(tmp_path / "wrong.qc")


def test_every_kernel_of_a_gpu_has_a_launch_and_a_code_of_the_target(made, tmp_path):
    contents = read(made, trusted=True)
    bare = dataclasses.replace(contents.kernels["add.sm_90"], launch=None)
    for name, kernel in (("add.sm_90", bare), ("add.sm_86", contents.kernels["add.sm_90"])):
        write(tmp_path / "wrong.qc", dataclasses.replace(contents, kernels={**contents.kernels, name: kernel}))
        with pytest.raises(ArtifactError, match="belongs to nothing"):
            read(tmp_path / "wrong.qc")
