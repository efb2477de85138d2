"""Every template of the Triton backend compiles to machine code, with kernels as models make them."""

from __future__ import annotations

import functools

import end_to_end_models as tiny
import pytest

from qcompile.artifact import Built, KernelSpec
from qcompile.lowering.triton import templates, toolchain
from qcompile.target import target

MODELS = (("llama", "gptq"), ("gpt-oss", "float"))
OTHERS = {
    "outlier-columns": KernelSpec("outlier-columns", {"k": 96, "padded": 112, "threshold": 6.0}),
    "sparse": KernelSpec("sparse", {"n": 96, "k": 64, "count": 50}),
}
# Their own tests compile these.
ELSEWHERE = {
    "cumsum", "gather", "linear-codebook", "linear-fragments", "linear-generic", "linear-native", "pointwise", "reduce",
    "row-norm", "topk",
}  # fmt: skip


@functools.cache
def _kernels(model: str, config: str) -> dict[str, KernelSpec]:
    return tiny.compiled(model, config, "cuda:interpret").artifact.executable.kernels


def _compile(specs: list[KernelSpec], code: str) -> dict[str, Built]:
    made = toolchain.compile_sources([templates.emit(spec, target(code)) for spec in specs], target(code))
    return {spec.template: kernel for spec, kernel in zip(specs, made, strict=True)}


def test_every_template_compiles():
    first = dict(OTHERS)
    for model in MODELS:
        for spec in _kernels(*model).values():
            first.setdefault(spec.template, spec)
    assert first.keys() | ELSEWHERE == templates.TEMPLATES.keys()
    made = _compile([spec for template, spec in first.items() if template not in ELSEWHERE], "cuda:sm_90")
    assert {template: kernel.launch.spills for template, kernel in made.items()} == dict.fromkeys(made, 0)


@pytest.mark.full
@pytest.mark.parametrize("code", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "cuda:ptx"])
@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_every_kernel_of_a_model_compiles(model, code):
    assert all(kernel.object for kernel in _compile(list(_kernels(*model).values()), code).values())
