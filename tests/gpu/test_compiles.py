"""Every template of the Triton backend compiles to machine code, with kernels as models make them, and of every format."""

from __future__ import annotations

import functools

import end_to_end_models as tiny
import format_cases
import pytest

from qcompile.artifact import KernelSpec
from qcompile.format import Format
from qcompile.lowering.triton import linear_generic, schedule, templates, tiles, toolchain
from qcompile.lowering.triton.linear import Shape
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


def _spills(specs, code):
    """Bytes of a thread that each kernel keeps in memory, 0 for PTX, of which that is not known."""
    made = toolchain.compile_sources([templates.emit(spec, target(code)) for spec in specs], target(code))
    assert all(built.object for built in made)
    return [built.launch.spills for built in made]


def test_every_template_compiles():
    first = dict(OTHERS)
    for model in MODELS:
        for spec in _kernels(*model).values():
            first.setdefault(spec.template, spec)
    assert first.keys() | ELSEWHERE == templates.TEMPLATES.keys()
    made = {template: spec for template, spec in first.items() if template not in ELSEWHERE}
    assert dict(zip(made, _spills(made.values(), "cuda:sm_90"), strict=True)) == dict.fromkeys(made, 0)


@pytest.mark.full
@pytest.mark.parametrize("code", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "cuda:ptx"])
@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_every_kernel_of_a_model_compiles(model, code):
    kernels = _kernels(*model)
    assert dict(zip(kernels, _spills(kernels.values(), code), strict=True)) == dict.fromkeys(kernels, 0)


def _generic(format: Format, n: int, k: int, most: int) -> KernelSpec:
    """The linear kernel of any format for up to `most` rows, 0: the one that decodes; of a weight 1024 x 1024 where it can be."""
    if not format.check(1024, 1024):
        n = k = 1024
    if not most:
        return KernelSpec("dequantize", {"format": format.to_json(), "n": n, "k": k, "y": "bf16"})
    shape = Shape((format.to_json(),), (n,), k)
    return KernelSpec("linear-generic", shape.params(most=most, split_k=schedule.split(n, k, most)))


@pytest.mark.full
@pytest.mark.parametrize("most", [0, 1, tiles.FEW, linear_generic.MIDDLE, schedule.OPEN])
@pytest.mark.parametrize("code", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100"])
def test_every_kind_of_format_compiles(code, most):
    """The generic tier; the tests of the faster tiers compile those of their formats."""
    kinds = {case[0].kind: _generic(*case, most) for case in reversed(format_cases.CASES)}
    assert dict(zip(kinds, _spills(kinds.values(), code), strict=True)) == dict.fromkeys(kinds, 0)
