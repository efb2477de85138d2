"""The closed table of operators that a program may name, and the literals in their arguments."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError, near

# Pure functions of their arguments: no randomness, no files, nothing written in place.
ATEN = frozenset(
    """
    __and__ __or__ __xor__ _log_softmax _native_batch_norm_legit_no_training _safe_softmax _softmax _to_copy _unsafe_view
    _scaled_dot_product_flash_attention_for_cpu abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d add addcdiv
    addcmul addmm alias all amax amin aminmax any arange argmax argmin argsort as_strided asin asinh atan atan2 atanh
    avg_pool1d avg_pool2d baddbmm batch_norm bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor bmm broadcast_to bucketize cat ceil celu chunk clamp clamp_max clamp_min clone col2im concat
    constant_pad_nd contiguous conv1d conv2d conv3d convolution copy cos cosh count_nonzero cumprod cumsum detach
    detach_copy diagonal diff div dot einsum elu embedding empty_like eq erf erfc erfinv exp exp2 expand expand_as
    expm1 flatten flip floor floor_divide fmod full full_like gather ge gelu glu group_norm gt hardsigmoid hardswish
    hardtanh hypot im2col index index_add index_copy index_fill index_put index_select instance_norm isfinite isinf
    isnan isneginf isposinf layer_norm le leaky_relu lerp lift_fresh_copy linear log log10 log1p log2 log_sigmoid
    log_softmax logaddexp logical_and logical_not logical_or logical_xor logsumexp lt masked_fill masked_scatter
    matmul max max_pool1d max_pool2d maximum mean median meshgrid min minimum mish mm movedim mul mv nan_to_num narrow
    native_group_norm native_layer_norm ne neg new_empty new_full new_ones new_zeros nonzero norm numpy_T one_hot ones
    ones_like outer pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal relu relu6 remainder repeat
    repeat_interleave reshape reshape_as rms_norm roll round rsqrt rsub scalar_tensor scaled_dot_product_attention
    scatter scatter_add scatter_reduce searchsorted select select_scatter selu sigmoid sign silu sin sinc sinh slice
    slice_scatter softmax softplus sort split split_with_sizes sqrt square squeeze stack std sub sum sym_numel
    sym_size sym_stride t take_along_dim tan tanh tensor_split threshold tile to topk transpose tril triu trunc
    type_as unbind unfold unflatten unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean
    vdot view view_as where zeros zeros_like
    """.split()  # noqa: SIM905  a list of quoted names would fill a page
)
QCOMPILE = frozenset(
    {
        "attention", "cached_attention", "dequantize", "embedding", "experts", "linear", "matmul", "rms_norm", "rope",
        "transform",
    }
)  # fmt: skip
MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
SCALAR: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "sym.add": operator.add,
    "sym.sub": operator.sub,
    "sym.mul": operator.mul,
    "sym.floordiv": operator.floordiv,
    "sym.truediv": operator.truediv,
    "sym.mod": operator.mod,
    "sym.neg": operator.neg,
    "sym.eq": operator.eq,
    "sym.ne": operator.ne,
    "sym.lt": operator.lt,
    "sym.le": operator.le,
    "sym.gt": operator.gt,
    "sym.ge": operator.ge,
    "sym.and": operator.and_,
    "sym.or": operator.or_,
    "sym.max": torch.sym_max,
    "sym.min": torch.sym_min,
    "sym.float": torch.sym_float,
    "sym.int": torch.sym_int,
    "sym.not": torch.sym_not,
}


@functools.cache
def eager(name: str) -> Callable[..., Any]:
    """The torch operator called `name`, such as "aten.add.Tensor"; ArtifactError outside the table."""
    parts = name.split(".")
    table = {"aten": ATEN, "qcompile": QCOMPILE}.get(parts[0], frozenset())
    if len(parts) != 3 or parts[1] not in table:
        hint = near(parts[1], table) if len(parts) == 3 else ""
        raise ArtifactError(
            f"an operator is not known{hint}", found=repr(name[:80]), expected="an operator of the closed table"
        )
    if parts[0] == "qcompile":
        import qcompile.experts  # noqa: F401  registers the operators, with those of qcompile.ops
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    if packet is None or parts[2] not in packet.overloads():
        raise ArtifactError(
            "this torch lacks an operator", found=repr(name[:80]), expected="another overload or version"
        )
    found = getattr(packet, parts[2])
    if parts[0] == "aten" and found._schema.is_mutable:
        raise ArtifactError("an operator writes its arguments", found=repr(name[:80]), expected="a pure function")
    return found  # type: ignore[no-any-return]


def reference(name: str) -> Callable[..., Any]:
    """The function of a graph node: an eager operator, or small arithmetic on sizes."""
    found = SCALAR.get(name)
    return eager(name) if found is None else found


def takes_device(operator: Callable[..., Any]) -> bool:
    """Whether an eager operator is told which device its result is on."""
    return any(argument.name == "device" for argument in operator._schema.arguments)  # type: ignore[attr-defined]


def resolve(literal: Any, names: Mapping[str, Callable[[Any], Any]]) -> Any:
    """`literal` with each {"key": x} replaced by names[key](x); lists stay lists; ArtifactError for an unknown key."""
    if isinstance(literal, (list, tuple)):
        return [resolve(item, names) for item in literal]
    if not isinstance(literal, dict):
        return literal
    if len(literal) == 1:
        ((key, value),) = literal.items()
        if key in names:
            return names[key](value)
    raise ArtifactError(
        "an operator's argument is not known", found=repr(literal)[:80], expected=" | ".join(sorted(names))
    )


def dtype(name: Any) -> torch.dtype:
    """The torch dtype called `name`; ArtifactError for another name."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ArtifactError("a dtype is not known", found=repr(name)[:80], expected=", ".join(DTYPES))
    return DTYPES[name]


def number(name: Any) -> float:
    """A float that JSON cannot hold, by name."""
    table = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
    if name not in table:
        raise ArtifactError("a number is not known", found=repr(name)[:80], expected=", ".join(table))
    return table[name]
