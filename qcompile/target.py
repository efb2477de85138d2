"""The machines qcompile compiles for: closed tables of CPU levels and of GPUs, and `reference` on any torch device.

>>> target("cpu:aarch64").lanes
4
>>> target("cuda:sm_90,sm_80").capabilities
(80, 90)
>>> target("rocm:gfx942").warp
64
>>> target("reference:cuda:1").device
'cuda:1'
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qcompile.errors import ConfigError, near


@dataclass(frozen=True)
class Target:
    """A machine as code generation sees it. `backend` says whose kernels it runs: "cuda" stands for Triton's, AMD's GPUs too.

    `lanes` is the number of float32 in the widest register (0 for `reference`); `isa` names the machine instructions a
    kernel may use ("portable": none but what LLVM selects by itself). `vnni` is true where `vpdpbusd` exists.
    `requires` are the processor features, as LLVM spells them, that a machine must have to run the objects.
    `device` is the torch device of the `reference` backend.
    `capabilities` are the GPUs that a target has machine code for (90 is sm_90; AMD's as Linux numbers them, 90402 is gfx942),
    ascending; 0 is Triton's interpreter, which tests use in place of a GPU. `warp` is how many threads one of their warps
    has. `portable` is true for code that newer GPUs translate themselves: PTX.
    """

    name: str
    backend: Literal["cpu", "cuda", "reference"]
    triple: str = ""
    processor: str = ""
    features: str = ""
    lanes: int = 0
    isa: Literal["avx512", "avx2", "ptx", "gcn", "portable"] = "portable"
    vnni: bool = False
    requires: tuple[str, ...] = ()
    device: str = "cpu"
    capabilities: tuple[int, ...] = ()
    warp: int = 32
    portable: bool = False

    @property
    def family(self) -> str:
        """The machines whose programs are alike: "cpu", "cuda", "rocm" or "reference"."""
        return self.name.partition(":")[0]

    @property
    def code(self) -> str:
        """What a name says behind the family: "sm_90"."""
        return self.name.partition(":")[2]

    @property
    def capability(self) -> int:
        """The one capability of a target that a kernel's text is made for."""
        (only,) = self.capabilities
        return only

    @property
    def fp8(self) -> bool:
        """Whether the machine itself multiplies and rounds to the 8-bit floats of checkpoints, f8e4m3 with NaN and f8e5m2.

        Those of gfx942 have another bias, and no place for what is negative zero there.
        """
        return self.isa == "ptx" and self.capability >= 89

    def codes(self) -> tuple[Target, ...]:
        """The machine codes of a GPU's target, each a target of one capability: those it names, then the portable one, if any."""
        if self.capabilities == (0,) or self.portable:
            return (self,)
        return (*(_gpu(self.family, capability) for capability in self.capabilities), *[PTX] * (self.family == "cuda"))

    def missing(self) -> tuple[str, ...]:
        """What this machine lacks to run the target's objects; empty when they run here."""
        if self.backend == "reference" or self.capabilities == (0,):
            return ()
        if self.backend == "cuda":
            found = gpu_here(self.family)
            if found is None:
                return (f"an {VENDORS[self.family]} GPU with a driver",)
            wanted = (
                f"a GPU of capability {LEAST_CAPABILITY / 10} or higher" if self.isa == "ptx" else f"a {self.code} GPU"
            )
            return () if code_for(found, self.codes()) else (wanted,)
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
GPUS: dict[str, dict[str, int]] = {
    "cuda": {f"sm_{capability}": capability for capability in CUDA_CAPABILITIES},
    "rocm": {"gfx942": 90402},
}
"""The machine codes of each family of GPUs: their names and capabilities."""
VENDORS = {"cuda": "NVIDIA", "rocm": "AMD"}
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where Linux describes the processors and GPUs that AMD's driver knows."""


def _gpu(family: str, *capabilities: int) -> Target:
    """The target with machine code for these GPUs of one family; to torch both families are "cuda"."""
    names = ",".join(name for name, capability in GPUS[family].items() if capability in capabilities)
    made = Target(f"{family}:{names}", "cuda", device="cuda", capabilities=capabilities)
    return replace(made, isa="ptx") if family == "cuda" else replace(made, isa="gcn", warp=64)


# Its instructions are those of 8.0, its tiles those of 8.6: newer GPUs need not have the shared memory of 8.0.
PTX = Target("cuda:ptx", "cuda", device="cuda", capabilities=(86,), isa="ptx", portable=True)
INTERPRET = Target("cuda:interpret", "cuda", capabilities=(0,))


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
def amd_gpu() -> int | None:
    """The number of this machine's first AMD GPU (90402 is gfx942), as Linux says; None without a GPU or driver."""
    for node in sorted(KFD_NODES.glob("*/properties"), key=lambda file: int(file.parent.name)):
        with contextlib.suppress(OSError):  # of a GPU that is another container's
            number = dict(line.split() for line in node.read_text().splitlines()).get("gfx_target_version", "0")
            if int(number):  # processors are nodes too, and have none
                return int(number)
    return None


def gpu_here(family: str) -> int | None:
    """The capability of this machine's first GPU of a family."""
    return amd_gpu() if family == "rocm" else gpu_capability()


def gpu_name(family: str, capability: int) -> str:
    """What a GPU is called in texts for people.

    >>> gpu_name("cuda", 90), gpu_name("rocm", 90010)
    ('a GPU of capability 9.0', 'a gfx90a GPU')
    """
    if family == "cuda":
        return f"a GPU of capability {capability / 10}"
    return f"a gfx{capability // 10000}{capability // 100 % 100:x}{capability % 100:x} GPU"


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
    with all their machine codes), "rocm:gfx942", "cuda" or "rocm" for the GPU of this machine, "reference" or
    "reference:<torch device>"."""
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
    if head in GPUS:
        return _gpu_target(head, rest)
    known = ("cpu", "cpu:native", *CPU_LEVELS, "cuda", *gpu_names("cuda"), "rocm", *gpu_names("rocm"), "reference")
    raise ConfigError(f"no target is called '{name}'{near(name, known)}", found=repr(name), expected=", ".join(known))


def gpu_names(family: str) -> list[str]:
    """The targets of one machine code each."""
    return [f"{family}:{name}" for name in GPUS[family]]


def _gpu_target(family: str, rest: str) -> Target:
    """The target whose name is the family's with a colon and `rest` behind it."""
    for special in (PTX, INTERPRET):
        if f"{family}:{rest}" == special.name:
            return special
    if not rest:
        return _own(family)
    named = set()
    for item in rest.split(","):
        if item not in GPUS[family]:
            known = gpu_names(family)
            raise ConfigError(
                f"no target is called '{family}:{item}'{near(f'{family}:{item}', known)}",
                found=repr(f"{family}:{rest}"), expected=", ".join(known) + ", several with commas between",
            )  # fmt: skip
        named.add(GPUS[family][item])
    return _gpu(family, *sorted(named))


def code_here(family: str) -> Target | None:
    """The machine code, of all there are, that this machine's GPU runs best; None where there is no GPU, or none for it."""
    found = gpu_here(family)
    return None if found is None else code_for(found, _gpu(family, *GPUS[family].values()).codes())


def _own(family: str) -> Target:
    """As `code_here`; ConfigError for None."""
    found, code = gpu_here(family), code_here(family)
    if found is None:
        raise ConfigError(
            f"this machine has no {VENDORS[family]} GPU with a driver", found=f"target '{family}'",
            expected="a GPU to compile for", remedy="name what to compile for: " + ", ".join(gpu_names(family)),
        )  # fmt: skip
    if code is None:
        raise ConfigError(
            "this machine's GPU is too old" if family == "cuda" else "there are no kernels for this machine's GPU",
            found=gpu_name(family, found),
            expected=f"{LEAST_CAPABILITY / 10} or more" if family == "cuda" else ", ".join(GPUS[family]),
        )
    return code


def _together(targets: Sequence[Target]) -> Target:
    """One target with the machine codes of several."""
    if len(set(targets)) == 1:
        return targets[0]
    mixed = [each.name for each in targets if each.family != "cuda" or 0 in each.capabilities or each.portable]
    if mixed or not targets:
        raise ConfigError(
            "only CUDA targets can be compiled for together",
            found=", ".join(mixed) or "no target",
            expected="cuda:sm_...",
        )
    return _gpu("cuda", *sorted({number for each in targets for number in each.capabilities}))
