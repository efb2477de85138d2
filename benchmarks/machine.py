"""What this machine is and what it can do at best: processor, threads, memory read bandwidth, float32 throughput."""

from __future__ import annotations

import platform
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RIVALS = ("onnxruntime", "openvino", "auto-round-lib", "llama-cpp-python")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory_mb() -> float:
    """The largest resident size of this process so far."""
    try:  # the kernel's own count starts anew with a program; getrusage's is handed down from the parent
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def read_bandwidth(mib: int = 1024, repeats: int = 7) -> float:
    """GB/s at which all threads of torch read a float32 array far larger than any cache: the best of `repeats`."""
    array = torch.ones(mib * 2**18)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return array.numel() * 4 / best / 1e9


def float32_gflops(size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of torch's float32 matrix product of two size x size matrices: the best of `repeats`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def describe() -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "read_gb_s": round(read_bandwidth(), 1),
        "float32_gflop_s": round(float32_gflops(), 1),
        "versions": versions("qcompile", "torch", "llvmlite", "torch-mlir", *RIVALS),
    }
