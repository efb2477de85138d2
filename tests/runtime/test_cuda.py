"""The driver's interface against a driver that records what it is asked: the calling convention, and every error."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest
import torch
from fake_driver import NAMES, FakeDriver, built

from qcompile.artifact import Built
from qcompile.errors import ArtifactError, InternalError
from qcompile.runtime import cuda
from qcompile.runtime.cuda import CudaDevice, Driver, Kernel


def test_a_kernel_is_loaded_and_allowed_what_shared_memory_it_needs():
    fake = FakeDriver()
    driver = Driver(fake)
    kernel = driver.load("linear_1", built(shared=65536), 101376)
    assert kernel == Kernel("linear_1", 2000, built(shared=65536).launch)
    ((_, image, count, options, _),) = fake.named("cuModuleLoadDataEx")
    assert image == b"\x7fELF...\0" and count == 2 and list(options) == [5, 6]
    ((_, module, entry),) = fake.named("cuModuleGetFunction")
    assert module.value == 1000 and entry == b"kernel"
    ((function, attribute, size),) = fake.named("cuFuncSetAttribute")
    assert (function.value, attribute, size) == (2000, 8, 65536)
    driver.load("linear_2", built(shared=49152), 101376)
    assert len(fake.named("cuFuncSetAttribute")) == 1


def test_arguments_are_pointers_then_i32_numbers_then_null_pointers():
    fake = FakeDriver()
    pointers, numbers = np.array([2**40 + 16, 32], dtype=np.int64), np.array([7, -1, 2**31 - 1], dtype=np.int64)
    start = Driver(fake).launcher(Kernel("k", 2000, built(shared=64).launch), (3, 2, 1), pointers, numbers)
    pointers[1] = 48  # a call may bind other memory
    start(99)
    ((function, *shape, arguments, extra),) = fake.named("cuLaunchKernel")
    assert function == 2000 and shape == [3, 2, 1, 128, 1, 1, 64, 99] and extra is None
    places = list(arguments)
    assert len(places) == 7
    assert [ctypes.c_int64.from_address(at).value for at in places[:2]] == [2**40 + 16, 48]
    assert [ctypes.c_int32.from_address(at).value for at in places[2:5]] == [7, -1, 2**31 - 1]
    assert [ctypes.c_int64.from_address(at).value for at in places[5:]] == [0, 0]


def test_an_empty_grid_starts_nothing_and_one_too_large_is_an_error():
    fake, none = FakeDriver(), np.zeros(0, dtype=np.int64)
    kernel = Kernel("k", 1, built().launch)
    Driver(fake).launcher(kernel, (4, 0, 1), none, none)(0)
    assert not fake.named("cuLaunchKernel")
    with pytest.raises(ArtifactError, match="a kernel needs more programs than a GPU starts at once\n  where:    k"):
        Driver(fake).launcher(kernel, (1, 65536, 1), none, none)


def test_the_context_of_torch_is_made_current_once():
    fake = FakeDriver()
    driver = Driver(fake)
    context = driver.context(0)
    driver.enter(context)
    driver.enter(context)
    assert context == 77 and len(fake.named("cuCtxSetCurrent")) == 1


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    monkeypatch.setattr(cuda.platform, "system", lambda: "Linux")
    with pytest.raises(ArtifactError) as error:
        Driver()
    assert str(error.value) == (
        "this machine has no NVIDIA driver\n  where:    libcuda.so.1\n"
        "  found:    libcuda.so.1: cannot open shared object file\n  expected: a GPU with its driver\n"
        "  try:      target='reference' runs anywhere"
    )


def test_no_device():
    with pytest.raises(ArtifactError) as error:
        Driver(FakeDriver(cuInit=100))
    assert str(error.value) == (
        "this machine has no NVIDIA GPU\n  where:    cuInit\n"
        "  found:    CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)\n"
        "  expected: a GPU that the driver sees\n  try:      target='reference' runs anywhere"
    )


def test_a_driver_that_does_not_start():
    with pytest.raises(
        ArtifactError, match="the NVIDIA driver does not start\n  where:    cuInit\n  found:    error 999"
    ):
        Driver(FakeDriver(cuInit=999))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
def test_a_torch_without_cuda():
    with pytest.raises(ArtifactError, match="torch cannot use the GPU of this machine") as error:
        CudaDevice(driver=Driver(FakeDriver()))
    assert torch.__version__ in error.value.found and "target='reference'" in error.value.remedy


def refused(kernel, **errors):
    fake = FakeDriver(**errors)
    fake.log = b"ptxas fatal: Unsupported .version 9.4"
    with pytest.raises((ArtifactError, InternalError)) as error:
        Driver(fake).load("linear_1", kernel, 101376)
    return error.value


def test_code_for_another_gpu():
    assert str(refused(built(), cuModuleLoadDataEx=209)) == (
        "a kernel is not for this GPU or driver\n  where:    linear_1\n"
        "  found:    cuModuleLoadDataEx: CUDA_ERROR_NO_BINARY_FOR_GPU (no kernel image is available for execution on the "
        "device); ptxas fatal: Unsupported .version 9.4\n  expected: code for this GPU\n"
        "  try:      compile for it (target='cuda'), or a newer driver; target='reference' runs anywhere"
    )
    assert "CUDA_ERROR_INVALID_PTX" in refused(built(), cuModuleLoadDataEx=218).found
    of_a_link_between_gpus = refused(built(), cuModuleLoadDataEx=220)
    assert of_a_link_between_gpus.summary == "the NVIDIA driver refuses a call"


def test_too_little_memory():
    error = refused(built(), cuModuleLoadDataEx=2)
    assert error.summary == "not enough memory on the GPU" and error.where == "linear_1"
    assert "a GPU with more memory" in error.remedy
    shared = refused(built(shared=200_000))
    assert shared.summary == "a kernel needs more shared memory than this GPU has"
    assert (shared.found, shared.expected) == ("200000 bytes", "at most 101376")


def test_a_kernel_for_a_processor():
    assert refused(Built("text", b"", "entry")).summary == "a kernel is not for a GPU"


@pytest.mark.parametrize(
    ("code", "kind", "summary"),
    [
        (700, InternalError, "a kernel ran outside its memory"),
        (701, ArtifactError, "a kernel needs more of this GPU than it has"),
        (1, InternalError, "the NVIDIA driver refuses a call"),
    ],
)
def test_launches_are_checked(code, kind, summary):
    none = np.zeros(0, dtype=np.int64)
    start = Driver(FakeDriver(cuLaunchKernel=code)).launcher(Kernel("k", 1, built().launch), (1, 1, 1), none, none)
    with pytest.raises(kind) as error:
        start(0)
    assert error.value.summary == summary and error.value.where == "k"
    assert error.value.found == f"cuLaunchKernel: {NAMES[code][0].decode()} ({NAMES[code][1].decode()})"
    # What an earlier kernel did may be said of a later one.
    assert ("CUDA_LAUNCH_BLOCKING=1" in error.value.remedy) == (code == 700)


class Recording:
    """torch.cuda.graph of a recording that its end finds broken; what its stream was is noted in `streams`."""

    def __init__(self, streams, graph, stream, capture_error_mode):
        streams.append(stream)

    def __enter__(self):
        pass

    def __exit__(self, *error):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_a_recording_that_fails_says_what_failed_first(monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "graph", functools.partial(Recording, streams))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "aside")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "usual")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    device = CudaDevice.__new__(CudaDevice)
    device.torch = torch.device("cuda", 0)

    def run():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        device.capture(run)
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        device.capture(lambda: None)
    assert streams == ["aside", "usual"] * 2
