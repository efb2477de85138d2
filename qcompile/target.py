"""The machines qcompile compiles for: a closed table of CPU levels, and the `reference` target on any torch device.

>>> target("cpu:aarch64").lanes
4
>>> target("reference:cuda:1").device
'cuda:1'
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import Literal

from qcompile.errors import ConfigError, near


@dataclass(frozen=True)
class Target:
    """A machine as code generation sees it.

    `lanes` is the number of float32 in the widest register (0 for `reference`); `isa` names the machine instructions a
    kernel may use ("portable": none but what LLVM selects by itself). `vnni` is true where `vpdpbusd` exists.
    `requires` are the processor features, as LLVM spells them, that a machine must have to run the objects.
    `device` is the torch device of the `reference` backend.
    """

    name: str
    backend: Literal["cpu", "reference"]
    triple: str = ""
    processor: str = ""
    features: str = ""
    lanes: int = 0
    isa: Literal["avx512", "avx2", "portable"] = "portable"
    vnni: bool = False
    requires: tuple[str, ...] = ()
    device: str = "cpu"

    def missing(self) -> tuple[str, ...]:
        """What this machine lacks to run the target's objects; empty when they run here."""
        if self.backend == "reference":
            return ()
        machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
        if not self.triple.startswith(machine):
            return (self.triple.split("-")[0],)
        here = _host_features()
        return tuple(feature for feature in self.requires if feature not in here)


_V3 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni")

# Best level of an architecture first: `native` takes the first that runs here. x86-64-v4 asks LLVM to avoid 512-bit
# registers, which its templates are written for; x18 belongs to the system on some aarch64 systems.
CPU_LEVELS: dict[str, Target] = {
    level.name: level
    for level in (
        Target(
            "cpu:x86-64-v4-vnni", "cpu", "x86_64-unknown-linux-gnu", "x86-64-v4", "+avx512vnni,-prefer-256-bit",
            lanes=16, isa="avx512", vnni=True, requires=_V4,
        ),
        Target("cpu:x86-64-v3", "cpu", "x86_64-unknown-linux-gnu", "x86-64-v3", lanes=8, isa="avx2", requires=_V3),
        Target("cpu:aarch64", "cpu", "aarch64-unknown-linux-gnu", "generic", "+neon,+reserve-x18", lanes=4),
    )
}  # fmt: skip


@functools.cache
def _host_features() -> frozenset[str]:
    import llvmlite.binding

    return frozenset(name for name, present in llvmlite.binding.get_host_cpu_features().items() if present)


def native() -> Target:
    """The best CPU level that runs on this machine; ConfigError where there is none."""
    for level in CPU_LEVELS.values():
        if not level.missing():
            return level
    raise ConfigError(
        "this processor is below every CPU level", found=platform.machine(), expected=", ".join(CPU_LEVELS),
        remedy="target='reference' runs on any device that torch supports",
    )  # fmt: skip


def target(name: str | Target) -> Target:
    """The target called `name`: a CPU level, "cpu" or "cpu:native", "reference" or "reference:<torch device>"."""
    if isinstance(name, Target):
        return name
    if name in ("cpu", "cpu:native"):
        return native()
    if name in CPU_LEVELS:
        return CPU_LEVELS[name]
    head, _, device = name.partition(":")
    if head == "reference":
        return Target(name, "reference", device=device or "cpu")
    known = ("cpu", "cpu:native", *CPU_LEVELS, "reference")
    raise ConfigError(f"no target is called '{name}'{near(name, known)}", found=repr(name), expected=", ".join(known))
