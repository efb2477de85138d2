"""Targets for GPUs: names, several at once, and which machine code a GPU runs."""

from __future__ import annotations

import pytest

from qcompile import target as module
from qcompile.errors import ConfigError
from qcompile.target import CUDA_CAPABILITIES, code_for, target


def test_several_are_one_target_whatever_the_order():
    both = target("cuda:sm_80,sm_90")
    assert both == target(["cuda:sm_90", "cuda:sm_80"]) == target("cuda:sm_90,sm_80,sm_90") == target(both)
    assert both.name == "cuda:sm_80,sm_90" and both.capabilities == (80, 90)
    assert [code.name for code in both.codes()] == ["cuda:sm_80", "cuda:sm_90", "cuda:ptx"]
    assert target(["cpu:aarch64"]) == target("cpu:aarch64")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:sm_91", "did you mean 'cuda:sm_9"),
        ("cuda:sm_80,", "expected: cuda:sm_80, cuda:sm_86"),
        (["cuda:sm_80", "cpu:aarch64"], "only CUDA targets can be compiled for together\n  found:    cpu:aarch64"),
        ([], "found:    no target"),
        ("gpu", "cuda:sm_90"),
    ],
)
def test_unknown_names_say_what_is_known(name, said):
    with pytest.raises(ConfigError) as error:
        target(name)
    assert said in str(error.value)


def test_machine_code_of_a_lower_minor_number_serves_capability_8_alone():
    every = target(",".join(["cuda:sm_80", *(f"sm_{each}" for each in CUDA_CAPABILITIES[1:])])).codes()
    assert {has: code_for(has, every).name for has in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)} == {
        80: "cuda:sm_80", 86: "cuda:sm_86", 87: "cuda:sm_86", 89: "cuda:sm_89", 90: "cuda:sm_90", 100: "cuda:sm_100",
        103: "cuda:ptx", 110: "cuda:ptx", 120: "cuda:sm_120", 121: "cuda:ptx",
    }  # fmt: skip
    assert code_for(80, target("cuda:sm_90").codes()).name == "cuda:ptx"
    assert code_for(75, every) is None


def test_cuda_means_the_gpu_of_this_machine(monkeypatch):
    for has, means in ((90, "cuda:sm_90"), (87, "cuda:sm_86"), (103, "cuda:ptx")):
        monkeypatch.setattr(module, "gpu_capability", lambda has=has: has)
        assert target("cuda").name == means
    monkeypatch.setattr(module, "gpu_capability", lambda: 75)
    with pytest.raises(ConfigError, match="too old"):
        target("cuda")
    assert target("cuda:sm_90").missing() == ("a GPU of capability 8.0 or higher",)
    monkeypatch.setattr(module, "gpu_capability", lambda: None)
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        target("cuda")
    assert target("cuda:sm_90").missing() == ("an NVIDIA GPU with a driver",)
