"""From a folder to a compiled model: the data are checked, kernels are made anew or, on request, trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from qcompile.errors import ArtifactError, ConfigError, ToolchainError
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.cache import Builder, build_kernels
from qcompile.runtime.codes import build_codes, code_here, one_code
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.store import read
from qcompile.target import Target
from qcompile.target import target as target_of

_TRUST = 'pip install {}, or load(..., native="trusted") if you trust who made the artifact'


def load(
    path: str | Path,
    target: str | None = None,
    native: Literal["rebuild", "trusted"] = "rebuild",
    *,
    builder_for: Callable[[Target], Builder] | None = None,
    threads: int | None = None,
    verify: bool = True,
    cache: Path | None = None,
) -> CompiledModel:
    """The compiled model in the folder `path`.

    `target` is where it runs: None for the one it was compiled for (of its machine codes for GPUs, the one that this
    machine's GPU runs: its own, else that of a lower minor number, else the PTX), "reference" or "reference:<torch device>"
    for its graph in torch, or another CPU level or machine code. With native="rebuild" nothing in the folder is executed:
    what `builder_for` gives for the target makes the kernels again from data, kept in `cache` (the user's folder, if None)
    by content, and every call of one is compared with what it may touch. With native="trusted" the objects in the folder
    are run as they are: they are programs, which nothing keeps inside their arguments. `verify` compares the digest of the
    weights.
    Errors: ArtifactError for a folder that is damaged or not for this machine, ToolchainError without a compiler.
    """
    if native not in ("rebuild", "trusted"):
        raise ConfigError("native is not known", found=repr(native), expected="'rebuild' or 'trusted'")
    contents = read(path, trusted=native == "trusted", verify=verify)
    artifact = contents.artifact
    on = target_of(artifact.target if target is None else target)
    if on.backend == "reference":
        return CompiledModel(contents, on=on)
    if artifact.executable is None:
        raise ArtifactError("the artifact has no kernels", where=str(path), found=f"target {artifact.target}",
                            remedy=f'target="{artifact.target}"')  # fmt: skip
    if on.family != target_of(artifact.target).family:
        raise ArtifactError("the artifact is for another kind of machine", where=str(path), found=artifact.target,
                            expected=on.name, remedy=f'target="{artifact.target}"')  # fmt: skip
    if on.backend == "cuda":
        on = code_here(on)
    missing = on.missing()
    if missing:
        raise ArtifactError("the artifact is for another machine", where=str(path), found="no " + ", ".join(missing),
                            expected=on.name, remedy='target="reference" runs anywhere')  # fmt: skip
    names = artifact.executable.kernels
    if native == "trusted":
        if on.backend == "cuda":
            one_code(contents.kernels, names, on)
            return CompiledModel(contents, on=on)
        if on.name != target_of(artifact.target).name:
            raise ArtifactError("the objects are for another target", where=str(path), found=artifact.target,
                                expected=on.name, remedy='native="rebuild"')  # fmt: skip
        absent = sorted(names.keys() - contents.kernels.keys())
        if absent:
            raise ArtifactError("the artifact holds no object for a kernel", where=str(path), found=absent[0],
                                remedy='native="rebuild"')  # fmt: skip
        return CompiledModel(contents, on=on, threads=threads)
    remedy = _TRUST.format("triton" if on.backend == "cuda" else "torch-mlir")
    if builder_for is None:
        raise ToolchainError("kernels cannot be built here", where=str(path), found="no compiler", remedy=remedy)
    builder = builder_for(on)
    bounds = Bounds.of(names, builder)
    try:
        if on.backend == "cuda":
            kernels = build_codes(names, (on,), builder, cache)
        else:
            kernels = build_kernels({name: (spec, on.name) for name, spec in names.items()}, builder, cache)
    except ToolchainError as error:
        raise ToolchainError(error.summary, where=error.where or str(path), found=error.found, expected=error.expected,
                             remedy=remedy) from error  # fmt: skip
    return CompiledModel(replace(contents, kernels=kernels), on=on, threads=threads, bounds=bounds)
