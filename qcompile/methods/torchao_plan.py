"""What a torchao recipe makes of a weight: one of the tensor classes, or a reason to leave it dense."""

from __future__ import annotations

from functools import singledispatch

from qcompile.errors import ConfigError
from qcompile.methods import torchao_recipes as recipes
from qcompile.methods.torchao_floats import Float8Act, Float8Tensor, MXTensor, NVFP4Tensor, Small
from qcompile.methods.torchao_integers import Int4Tensor, Int4TilePackedTo4dTensor, Int8Tensor, IntxUnpackedToInt8Tensor
from qcompile.methods.torchao_recipes import FP4, ROW, Per, Recipe
from qcompile.methods.torchao_tensors import SHORT, AoTensor


@singledispatch
def plan(recipe: Recipe, n: int, k: int, dtype: str) -> AoTensor | str:
    """The tensor class for a weight [n, k] of `dtype`, or why torchao leaves it dense; ConfigError where it would fail."""
    raise ConfigError(
        f"torchao's {recipe.name if isinstance(recipe, recipes.Calibrated) else type(recipe).__name__} quantizes nothing here",
        where="field 'quant_type'",
        expected="a config whose result depends on the weight alone",
        remedy="quantize the model with torchao itself: its checkpoint is read",
    )


def fit(per: Per, n: int, k: int) -> tuple[int, int]:
    """The block that shares a scale; ConfigError unless blocks fill the weight."""
    rows, columns = per.block(n, k)
    if n % rows or k % columns:
        raise _does_not_fit(n, k, f"multiples of [{rows}, {columns}], the block of {per}")
    return rows, columns


def _does_not_fit(n: int, k: int, expected: str) -> ConfigError:
    return ConfigError(
        "torchao cannot quantize a weight of this shape",
        found=f"[{n}, {k}]",
        expected=expected,
        remedy="choose another granularity, or leave the module dense by modules_to_not_convert",
    )


@plan.register
def _(recipe: recipes.Int8WeightOnlyConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    return Int8Tensor(n, k, dtype, fit(recipe.granularity, n, k))


@plan.register
def _(recipe: recipes.Int8DynamicActivationInt8WeightConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    x, w = recipe.pair
    reduced = bool(recipe.reduce_range)
    return Int8Tensor(n, k, dtype, fit(w, n, k), (x, recipe.act_mapping_type, reduced), reduced)


def _intx(
    n: int, k: int, dtype: str, per: Per, bits: str, act: bool, mapping: str, scale: str | None, how: str
) -> AoTensor:
    name = "" if scale is None else SHORT[scale]
    hqq = how == "HQQ_SCALE_ONLY"
    return IntxUnpackedToInt8Tensor(n, k, dtype, fit(per, n, k), int(bits[3:]), act, mapping, name, hqq)


@plan.register
def _(recipe: recipes.IntxWeightOnlyConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    how, scale = recipe.intx_choose_qparams_algorithm, recipe.scale_dtype
    return _intx(n, k, dtype, recipe.granularity, recipe.weight_dtype, False, recipe.mapping_type, scale, how)


@plan.register
def _(recipe: recipes.Int8DynamicActivationIntxWeightConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    how, scale, mapping = recipe.intx_choose_qparams_algorithm, recipe.weight_scale_dtype, recipe.weight_mapping_type
    return _intx(n, k, dtype, recipe.weight_granularity, recipe.weight_dtype, True, mapping, scale, how)


@plan.register
def _(recipe: recipes.Int4WeightOnlyConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    if k % recipe.group_size:
        return f"torchao leaves it dense: its {k} inputs are not a multiple of the group, {recipe.group_size}"
    if recipe.int4_packing_format == "PLAIN":
        return Int4Tensor(n, k, dtype, recipe.group_size)
    return Int4TilePackedTo4dTensor(n, k, "bf16", recipe.group_size, recipe.int4_choose_qparams_algorithm == "HQQ")


@plan.register
def _(recipe: recipes.Float8WeightOnlyConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    per = recipe.granularity or ROW
    return Float8Tensor(n, k, dtype, fit(per, n, k), _small(recipe.weight_dtype))


@plan.register
def _(recipe: recipes.Float8DynamicActivationFloat8WeightConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    if n % 16 or k % 16:
        return f"torchao leaves it dense: its shape [{n}, {k}] is not a multiple of 16"
    x, w = recipe.pair
    act = Float8Act(x, _small(recipe.activation_dtype), recipe.activation_value_lb, recipe.activation_value_ub)
    return Float8Tensor(n, k, dtype, fit(w, n, k), _small(recipe.weight_dtype), act)


@plan.register
def _(recipe: recipes.MXDynamicActivationMXWeightConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    if k % 32:
        raise _does_not_fit(n, k, "a multiple of 32 inputs")
    element = "e2m1" if recipe.weight_dtype == FP4 else _small(recipe.weight_dtype)
    return MXTensor(n, k, dtype, element, mode=recipe.scaling_mode)


def _nvfp4(n: int, k: int, dtype: str, whole: bool, act: bool | None) -> AoTensor:
    if n % 16 or k % 16:
        raise _does_not_fit(n, k, "multiples of 16")
    return NVFP4Tensor(n, k, dtype, whole=whole, act=act)


@plan.register
def _(recipe: recipes.NVFP4WeightOnlyConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    return _nvfp4(n, k, dtype, recipe.use_dynamic_per_tensor_scale, None)


@plan.register
def _(recipe: recipes.NVFP4DynamicActivationNVFP4WeightConfig, n: int, k: int, dtype: str) -> AoTensor | str:
    if recipe.step is not None:
        raise recipes.wrong(
            "NVFP4DynamicActivationNVFP4WeightConfig", "step", recipe.step, "None", "a static scale of x needs data"
        )
    whole = recipe.use_dynamic_per_tensor_scale
    return _nvfp4(n, k, dtype, whole, whole)


def _small(name: str) -> Small:
    return "f8e5m2" if name == "float8_e5m2" else "f8e4m3"
