"""The machines qcompile compiles for: closed tables of CPU levels and GPU capabilities, and `reference` on any torch device.

>>> target("cpu:aarch64").lanes
4
>>> target("cuda:sm_90,sm_80").capabilities
(80, 90)
>>> target("reference:cuda:1").device
'cuda:1'
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Sequence
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
    `capabilities` are the GPUs that a `cuda` target has machine code for (90 is sm_90), ascending; 0 is Triton's interpreter,
    which tests use in place of a GPU. `portable` is true for code that newer GPUs translate themselves: PTX.
    """

    name: str
    backend: Literal["cpu", "cuda", "reference"]
    triple: str = ""
    processor: str = ""
    features: str = ""
    lanes: int = 0
    isa: Literal["avx512", "avx2", "portable"] = "portable"
    vnni: bool = False
    requires: tuple[str, ...] = ()
    device: str = "cpu"
    capabilities: tuple[int, ...] = ()
    portable: bool = False

    @property
    def capability(self) -> int:
        """The one capability of a target that a kernel's text is made for."""
        (only,) = self.capabilities
        return only

    def codes(self) -> tuple[Target, ...]:
        """The machine codes of a `cuda` target, each a target of one capability: those it names, then the portable one."""
        if self.capabilities == (0,) or self.portable:
            return (self,)
        return (*(_cuda(capability) for capability in self.capabilities), PTX)

    def missing(self) -> tuple[str, ...]:
        """What this machine lacks to run the target's objects; empty when they run here."""
        if self.backend == "reference" or self.capabilities == (0,):
            return ()
        if self.backend == "cuda":
            found = gpu_capability()
            if found is None:
                return ("an NVIDIA GPU with a driver",)
            return () if code_for(found, self.codes()) else (f"a GPU of capability {LEAST_CAPABILITY / 10} or higher",)
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


CUDA_CAPABILITIES = (80, 86, 89, 90, 100, 120)
LEAST_CAPABILITY = 80
# Its instructions are those of 8.0, its tiles those of 8.6: newer GPUs need not have the shared memory of 8.0.
PTX = Target("cuda:ptx", "cuda", device="cuda", capabilities=(86,), portable=True)
INTERPRET = Target("cuda:interpret", "cuda", capabilities=(0,))


def _cuda(*capabilities: int) -> Target:
    names = ",".join(f"sm_{capability}" for capability in capabilities)
    return Target(f"cuda:{names}", "cuda", device="cuda", capabilities=capabilities)


def code_for(capability: int, codes: Sequence[Target]) -> Target | None:
    """The one of `codes` (as `Target.codes` gives them) that a GPU of this capability runs best; None where none runs.

    That is its own; else the highest below it of the same major number, where machine code is compatible (8.x: from 9.0 on
    it is specific to one capability); else the portable one, which the driver translates.

    >>> [code_for(has, target("cuda:sm_80,sm_86,sm_90").codes()).name for has in (80, 87, 90, 100)]
    ['cuda:sm_80', 'cuda:sm_86', 'cuda:sm_90', 'cuda:ptx']
    """
    compatible = [
        code for code in codes if not code.portable and code.capability <= capability
        and (code.capability == capability or code.capability // 10 == capability // 10 == 8)
    ]  # fmt: skip
    if compatible:
        return max(compatible, key=lambda code: code.capability)
    return next((code for code in codes if code.portable and capability >= LEAST_CAPABILITY), None)


@functools.cache
def gpu_capability() -> int | None:
    """The capability of this machine's first NVIDIA GPU (90 is 9.0), as its driver says; None without a GPU or driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return None
    device, value, numbers = ctypes.c_int(), ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(value.value)
    return numbers[0] * 10 + numbers[1]


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


def target(name: str | Target | Sequence[str]) -> Target:
    """The target called `name`: a CPU level, "cpu" or "cpu:native", "cuda:sm_80,sm_90" (or a list of such names: one target
    with all their machine codes), "cuda" for the GPU of this machine, "reference" or "reference:<torch device>"."""
    if isinstance(name, Target):
        return name
    if not isinstance(name, str):
        return _together([target(each) for each in name])
    if name in ("cpu", "cpu:native"):
        return native()
    if name in CPU_LEVELS:
        return CPU_LEVELS[name]
    head, _, rest = name.partition(":")
    if head == "reference":
        return Target(name, "reference", device=rest or "cpu")
    if head == "cuda":
        return _cuda_target(rest)
    known = ("cpu", "cpu:native", *CPU_LEVELS, "cuda", *cuda_names(), "reference")
    raise ConfigError(f"no target is called '{name}'{near(name, known)}", found=repr(name), expected=", ".join(known))


def cuda_names() -> list[str]:
    """The targets of one capability each."""
    return [f"cuda:sm_{capability}" for capability in CUDA_CAPABILITIES]


def _cuda_target(rest: str) -> Target:
    """The target whose name is "cuda:" with `rest` behind it."""
    for special in (PTX, INTERPRET):
        if f"cuda:{rest}" == special.name:
            return special
    if not rest:
        found = gpu_capability()
        if found is None:
            raise ConfigError(
                "this machine has no NVIDIA GPU with a driver", found="target 'cuda'", expected="a GPU to compile for",
                remedy="name what to compile for: " + ", ".join(cuda_names()),
            )  # fmt: skip
        code = code_for(found, (*(_cuda(known) for known in CUDA_CAPABILITIES), PTX))
        if code is None:
            raise ConfigError(
                "this machine's GPU is too old",
                found=f"capability {found / 10}",
                expected=f"{LEAST_CAPABILITY / 10} or more",
            )
        return code
    named = set()
    for item in rest.split(","):
        if item not in {f"sm_{known}" for known in CUDA_CAPABILITIES}:
            known = cuda_names()
            raise ConfigError(
                f"no target is called 'cuda:{item}'{near(f'cuda:{item}', known)}",
                found=repr(f"cuda:{rest}"), expected=", ".join(known) + ", several with commas between",
            )  # fmt: skip
        named.add(int(item.removeprefix("sm_")))
    return _cuda(*sorted(named))


def _together(targets: Sequence[Target]) -> Target:
    """One target with the machine codes of several."""
    if len(set(targets)) == 1:
        return targets[0]
    mixed = [each.name for each in targets if each.backend != "cuda" or 0 in each.capabilities or each.portable]
    if mixed or not targets:
        raise ConfigError(
            "only CUDA targets can be compiled for together",
            found=", ".join(mixed) or "no target",
            expected="cuda:sm_...",
        )
    return _cuda(*sorted({number for each in targets for number in each.capabilities}))
