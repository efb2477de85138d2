"""The machine codes of an artifact for GPUs: kernels built for each of a target's codes, and those that one GPU runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from qcompile.artifact import Built, KernelSpec
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime.cache import Builder, build_kernels
from qcompile.target import GPUS, PTX, VENDORS, Target, code_for, gpu_here, gpu_name
from qcompile.target import target as target_of


def coded(kernel: str, code: Target) -> str:
    """The name of a kernel's code in an artifact.

    >>> coded("reduce_1a2b", PTX)
    'reduce_1a2b.ptx'
    """
    return f"{kernel}.{code.code}"


def parts(name: str) -> tuple[str, str]:
    """The kernel's name, and the target of one code, that `coded` made `name` from; the target is "" for a CPU kernel."""
    kernel, _, code = name.partition(".")
    family = "rocm" if code in GPUS["rocm"] else "cuda"
    return kernel, code and f"{family}:{code}"


def for_gpu(target: str) -> bool:
    """Whether an artifact for `target` has kernels for GPUs."""
    return target.partition(":")[0] in GPUS


def codes_of(target: str) -> Collection[str]:
    """What `parts` may find behind the kernels of an artifact for `target`; ArtifactError for a target that is not known."""
    if not for_gpu(target):
        return ("",)
    try:
        return {code.name for code in target_of(target).codes()}
    except ConfigError as error:
        raise ArtifactError("the target is not known", found=error.found, expected=error.expected) from error


def build_codes(
    specs: Mapping[str, KernelSpec], codes: Iterable[Target], builder: Builder, folder: Path | None = None
) -> dict[str, Built]:
    """Every kernel of `specs` in every one of `codes`, by `coded` names; cached as `build_kernels` does."""
    wanted = {coded(name, code): (spec, code.name) for code in codes for name, spec in specs.items()}
    return build_kernels(wanted, builder, folder)


def code_here(target: Target) -> Target:
    """The code of a GPU's target that this machine's GPU runs; ArtifactError where it runs none."""
    if 0 in target.capabilities:
        return target
    found = gpu_here(target.family)
    code = None if found is None else code_for(found, target.codes())
    if code is None:
        raise ArtifactError(
            "the artifact is for another machine",
            found=f"no {VENDORS[target.family]} GPU with a driver" if found is None else gpu_name(target.family, found),
            expected=", ".join(each.name for each in target.codes()),
            remedy='target="reference" runs anywhere',
        )
    return code


def one_code(kernels: Mapping[str, Built], names: Collection[str], code: Target) -> dict[str, Built]:
    """The kernels called `names` in one code, by those names; ArtifactError for one that is not there."""
    absent = sorted(name for name in names if coded(name, code) not in kernels)
    if absent:
        raise ArtifactError(
            "the artifact holds no object for a kernel", found=coded(absent[0], code), remedy='native="rebuild"'
        )
    return {name: kernels[coded(name, code)] for name in names}


def file_names(name: str) -> tuple[str, str]:
    """The files that hold the text and the object of what is called `name` (`coded`, or a CPU kernel's name)."""
    _, code = parts(name)
    if not code:
        return f"kernel-{name}.mlir", f"kernel-{name}.o"
    ending = "" if code == PTX.name else ".hsaco" if code.startswith("rocm") else ".cubin"
    return f"kernel-{name}.py", f"kernel-{name}{ending}"
