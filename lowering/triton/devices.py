"""The GPUs that schedules are made for, as numbers: one a capability, the one that most people compile for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU as the cost model sees it.

    `processors` are its multiprocessors, `clock` what they run at under load in Hz, `bandwidth` that of its memory in bytes/s
    and `dense` what its tensor cores do in bf16 with f32 sums, in flop/s without sparsity. `shared` is the most shared
    memory of one program and `processor_shared` that of a multiprocessor, in bytes; `warps` the most of a multiprocessor.
    `int8` and `fp8` say how much faster a dot of 8-bit numbers is than one of bf16 (1 where there is none in float), and
    `lanes` how many lanes' instructions a multiprocessor starts at every clock.
    """

    name: str
    capability: int
    processors: int
    clock: float
    bandwidth: float
    dense: float
    shared: int
    processor_shared: int
    warps: int
    int8: float = 2.0
    fp8: float = 2.0
    lanes: int = 128

    @property
    def instructions(self) -> float:
        """Instructions of one lane a second."""
        return self.processors * self.lanes * self.clock


_KIB = 1024

# From NVIDIA's data sheets and its table of compute capabilities, and AMD's data sheet and white paper of CDNA 3.
DEVICES: dict[int, Device] = {
    device.capability: device
    for device in (
        Device("A100 SXM 80 GB", 80, 108, 1.41e9, 2.039e12, 312e12, 163 * _KIB, 164 * _KIB, 64, fp8=1.0),
        Device("A10", 86, 72, 1.695e9, 0.600e12, 125e12, 99 * _KIB, 100 * _KIB, 48, fp8=1.0),
        Device("RTX 4090", 89, 128, 2.52e9, 1.008e12, 165e12, 99 * _KIB, 100 * _KIB, 48, int8=4.0),
        Device("H100 SXM", 90, 132, 1.755e9, 3.35e12, 989e12, 227 * _KIB, 228 * _KIB, 64),
        Device("B200", 100, 148, 1.85e9, 8.0e12, 2250e12, 227 * _KIB, 228 * _KIB, 64),
        Device("RTX 5090", 120, 170, 2.41e9, 1.792e12, 210e12, 99 * _KIB, 100 * _KIB, 48, int8=4.0),
        Device("MI300X", 90402, 304, 2.1e9, 5.3e12, 1307e12, 64 * _KIB, 64 * _KIB, 32, fp8=1.0, lanes=64),
    )
}


def device(capability: int) -> Device:
    """The GPU that `capability` stands for; an H100 for 0, the interpreter, which has no speed."""
    return DEVICES[capability or 90]
