"""An AMD GPU: the same as in `cuda`, through HIP, whose functions are NVIDIA's by other names. To torch it is "cuda" as well."""

from __future__ import annotations

from pathlib import Path

from qcompile.runtime.cuda import CudaDevice, Driver, Interface
from qcompile.target import Target

HIP = Interface(
    "AMD", "rocm", "rocminfo", "hip", "hip", 64, 64 * 1024, most_shared=74, most_threads=2**32 - 1,
    names={
        "GetErrorName": "DrvGetErrorName", "GetErrorString": "DrvGetErrorString", "LaunchKernel": "ModuleLaunchKernel",
    },
)  # fmt: skip
LIBRARY = "libamdhip64.so"
MAPS = Path("/proc/self/maps")  # the files that this process has loaded


class HipDriver(Driver):
    """The HIP library. It has no contexts to hold on to: a thread has a current device."""

    interface = HIP

    def context(self, index: int) -> int:
        return index

    def enter(self, context: int) -> None:
        self.call("SetDevice", context)

    def _library(self) -> str:
        """The file that torch has loaded, which may be one of its own: another's streams would mean nothing to it."""
        loaded = MAPS.read_text().splitlines() if MAPS.exists() else []
        return next((line.split(maxsplit=5)[5] for line in loaded if f"/{LIBRARY}" in line), LIBRARY)


def device_of(target: Target) -> CudaDevice:
    """The GPU of this machine that runs a target's code; ArtifactError where that, its driver or torch's part is missing."""
    return CudaDevice(driver=HipDriver() if target.family == "rocm" else None)
