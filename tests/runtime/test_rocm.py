"""HIP against a library that records what it is asked: other names than the NVIDIA driver's, other limits, the same errors."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from fake_driver import FakeHip, built

from qcompile import target as targets
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime import rocm
from qcompile.runtime.cuda import CudaDevice, Kernel
from qcompile.runtime.rocm import HipDriver
from qcompile.target import amd_gpu, target


def test_a_kernel_is_loaded_without_asking_for_shared_memory():
    fake = FakeHip()
    driver = HipDriver(fake)
    assert driver.attribute(0, driver.interface.most_shared) == 65536
    kernel = driver.load("linear_1", built(shared=65536), 65536)
    assert kernel.function == 2000
    ((_, image, count, options, _),) = fake.named("hipModuleLoadDataEx")
    assert image == b"\x7fELF...\0" and count == 2 and list(options) == [5, 6]
    ((_, module, entry),) = fake.named("hipModuleGetFunction")
    assert module.value == 1000 and entry == b"kernel"
    assert {name for name, _ in fake.calls} == {
        "hipInit", "hipDeviceGet", "hipDeviceGetAttribute", "hipModuleLoadDataEx", "hipModuleGetFunction",
    }  # fmt: skip


def test_a_warp_has_64_threads():
    fake = FakeHip()
    pointers, numbers = np.array([2**40 + 16], dtype=np.int64), np.array([7], dtype=np.int64)
    HipDriver(fake).launcher(Kernel("k", 2000, built(shared=64).launch), (3, 2, 1), pointers, numbers)(99)
    ((function, *shape, arguments, extra),) = fake.named("hipModuleLaunchKernel")
    assert function == 2000 and shape == [3, 2, 1, 256, 1, 1, 64, 99] and extra is None
    places = list(arguments)
    assert ctypes.c_int64.from_address(places[0]).value == 2**40 + 16
    assert ctypes.c_int32.from_address(places[1]).value == 7
    assert [ctypes.c_int64.from_address(at).value for at in places[2:]] == [0, 0]


def test_a_grid_has_fewer_than_4_billion_threads_along_an_axis():
    none = np.zeros(0, dtype=np.int64)
    driver, kernel = HipDriver(FakeHip()), Kernel("k", 1, built().launch)
    driver.launcher(kernel, (2**24 - 1, 1, 1), none, none)
    with pytest.raises(ArtifactError, match="a kernel needs more programs than a GPU starts at once\n  where:    k"):
        driver.launcher(kernel, (2**24, 1, 1), none, none)


def test_the_device_of_torch_is_made_the_threads_own():
    fake = FakeHip()
    driver = HipDriver(fake)
    driver.enter(driver.context(3))
    assert fake.named("hipSetDevice") == [(3,)]


def test_the_library_is_the_one_that_torch_has_loaded(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    maps.write_text("7f0-7f1 r-xp 00000000 08:01 7    /x/torch/lib/libamdhip64.so.6\n7f2-7f3 rw-p 00000000 00:00 0\n")
    opened = []

    def missing(name):
        opened.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(rocm, "MAPS", maps)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ArtifactError, match="this machine has no AMD driver"):
        HipDriver()
    maps.write_text("")
    with pytest.raises(ArtifactError) as error:
        HipDriver()
    assert opened == ["/x/torch/lib/libamdhip64.so.6", "libamdhip64.so"]
    assert str(error.value) == (
        "this machine has no AMD driver\n  where:    libamdhip64.so\n"
        "  found:    libamdhip64.so: cannot open shared object file\n  expected: a GPU with its driver\n"
        "  try:      target='reference' runs anywhere"
    )


def test_errors_name_the_function_and_the_target():
    with pytest.raises(ArtifactError) as error:
        HipDriver(FakeHip(hipInit=100))
    assert (error.value.summary, error.value.where) == ("this machine has no AMD GPU", "hipInit")
    with pytest.raises(ArtifactError) as error:
        HipDriver(FakeHip(hipModuleLoadDataEx=209)).load("linear_1", built(), 65536)
    assert error.value.found.startswith("hipModuleLoadDataEx: ") and "target='rocm'" in error.value.remedy


@pytest.mark.skipif(torch.version.hip is not None, reason="this torch is built for ROCm")
def test_a_torch_without_rocm():
    with pytest.raises(ArtifactError, match="torch cannot use the GPU of this machine") as error:
        CudaDevice(driver=HipDriver(FakeHip()))
    assert error.value.found == f"torch {torch.__version__} without ROCm"
    assert error.value.expected == "a torch for the driver's ROCm version"


def node(folder, number, version):
    (folder / str(number)).mkdir(parents=True)
    (folder / str(number) / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")


def test_linux_says_which_gpu_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "KFD_NODES", tmp_path / "nodes")
    amd_gpu.cache_clear()
    try:
        assert amd_gpu() is None
        amd_gpu.cache_clear()
        node(tmp_path / "nodes", 0, 0)  # a processor
        node(tmp_path / "nodes", 10, 110000)
        node(tmp_path / "nodes", 9, 90402)
        assert amd_gpu() == 90402 and target("rocm") == target("rocm:gfx942")
        assert target("rocm:gfx942").missing() == ()
    finally:
        amd_gpu.cache_clear()


def test_rocm_means_a_gpu_that_there_are_kernels_for(monkeypatch):
    monkeypatch.setattr(targets, "amd_gpu", lambda: 110000)
    with pytest.raises(ConfigError) as error:
        target("rocm")
    assert (
        str(error.value) == "there are no kernels for this machine's GPU\n  found:    a gfx1100 GPU\n  expected: gfx942"
    )
    assert target("rocm:gfx942").missing() == ("a gfx942 GPU",)
    monkeypatch.setattr(targets, "amd_gpu", lambda: None)
    with pytest.raises(ConfigError, match="this machine has no AMD GPU with a driver"):
        target("rocm")


@pytest.mark.parametrize("name", ["rocm:gfx90", "rocm:gfx942,sm_90", "rocm:sm_90"])
def test_names_of_other_gpus(name):
    with pytest.raises(ConfigError, match="rocm:gfx942"):
        target(name)
    with pytest.raises(ConfigError, match="only CUDA targets can be compiled for together"):
        target(["rocm:gfx942", "cuda:sm_90"])
