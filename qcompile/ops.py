"""qcompile's own graph operators, each with its eager implementation: a node's meaning and every kernel's oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from qcompile.transform import Transform

SMALLEST_ACTIVATION = 1e-30
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ROUNDED = {"bf16": torch.bfloat16, "f16": torch.float16}
"""The types that a linear may round its results to."""


@dataclass(frozen=True)
class Part:
    """One weight of a linear node: `format` (a format's JSON), `n` rows, `tensors` stored tensors among operands."""

    format: dict[str, Any]
    n: int
    tensors: int


@dataclass(frozen=True)
class LinearSpec:
    """Everything about a `qcompile.linear` node but its tensors.

    y = epilogue(before(prologue(x)) @ cat(W of parts).T + bias).

    `prologue`: None, {"op": "rms_norm", "eps": e, "offset": 0 or 1} (weight + offset multiplies) or
    {"op": "layer_norm", "eps": e}.
    `epilogue`, in order: {"op": "bf16" | "f16"}: rounded to that type; {"op": "silu" | "gelu" | "gelu_tanh" | "relu" |
    "sigmoid" | "tanh"}; {"op": "add"} and {"op": "mul"} (the next extra tensor, shaped like y); {"op": "glu", "act": name}:
    the rows of the two halves of N give act(first half) * second half, so y has N/2 columns.
    `before`: transforms (their JSON) that the method applies to x, in order; their results are rows [..., k] again.
    Extra tensors, in order: bias [N] if `bias`; norm weight [K] (and norm bias [K] for layer_norm) if there is a
    prologue; what the transforms of `before` store; one for each add or mul.
    `accuracy` is "exact" (activations as `before` makes them) or "int8" (without a `before`, activations rounded by
    `round_activations` per `act_group` inputs; value tables by `round_table`).
    """

    k: int
    parts: tuple[Part, ...]
    bias: bool = False
    prologue: dict[str, Any] | None = None
    epilogue: tuple[dict[str, Any], ...] = ()
    accuracy: str = "exact"
    act_group: int = 32
    before: tuple[dict[str, Any], ...] = ()

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def n_out(self) -> int:
        return self.n // 2 if any(e["op"] == "glu" for e in self.epilogue) else self.n

    def transforms(self) -> list[Transform]:
        """Those of `before`."""
        from qcompile.transform import transform_from_json

        return [transform_from_json(data) for data in self.before]

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_text(text: str) -> LinearSpec:
        data = json.loads(text)
        data["parts"] = tuple(Part(**part) for part in data["parts"])
        data["epilogue"] = tuple(data["epilogue"])
        data["before"] = tuple(data.get("before", ()))
        return LinearSpec(**data)


def _format_tensors(
    format_: Mapping[str, Any], tensors: Sequence[Tensor], n: int, k: int
) -> tuple[Any, dict[str, Tensor]]:
    from qcompile.format import format_from_json

    parsed = format_from_json(format_)
    return parsed, {stored.name: tensor for stored, tensor in zip(parsed.stored(n, k), tensors, strict=True)}


@torch.library.custom_op(
    "qcompile::dequantize", mutates_args=(), schema="(Tensor[] stored, str format, int n, int k) -> Tensor"
)
def dequantize(stored: Sequence[Tensor], format: str, n: int, k: int) -> Tensor:
    """The weight f32 [n, k] whose tensors, in the order of `Format.stored`, are `stored`; `format` is its JSON."""
    from qcompile.evaluate import dequantize as evaluate

    parsed, tensors = _format_tensors(json.loads(format), stored, n, k)
    return evaluate(parsed, tensors, n, k)


@dequantize.register_fake
def _(stored: Sequence[Tensor], format: str, n: int, k: int) -> Tensor:
    return stored[0].new_empty((n, k), dtype=torch.float32)


@torch.library.custom_op(
    "qcompile::embedding", mutates_args=(), schema="(Tensor ids, Tensor[] stored, str format, int n, int k) -> Tensor"
)
def embedding(ids: Tensor, stored: Sequence[Tensor], format: str, n: int, k: int) -> Tensor:
    """Rows `ids` (any shape, 0 <= id < n) of the packed weight [n, k]: f32 [..., k]."""
    from qcompile.evaluate import dequantize as evaluate

    parsed, tensors = _format_tensors(json.loads(format), stored, n, k)
    rows, inverse = torch.unique(ids, return_inverse=True)
    return evaluate(parsed, tensors, n, k, rows=rows)[inverse]


@embedding.register_fake
def _(ids: Tensor, stored: Sequence[Tensor], format: str, n: int, k: int) -> Tensor:
    return stored[0].new_empty((*ids.shape, k), dtype=torch.float32)


@torch.library.custom_op(
    "qcompile::transform", mutates_args=(), schema="(Tensor x, Tensor[] stored, str transform) -> Tensor"
)
def transform(x: Tensor, stored: Sequence[Tensor], transform: str) -> Tensor:
    """Rows [..., width(K)] from x [..., K], in x's dtype, computed in float32; `transform` is a transform's JSON."""
    what, tensors = parse_transform(x, stored, transform)
    made: Tensor = what.apply(x.float(), tensors)
    return made.to(x.dtype).contiguous()


@transform.register_fake
def _(x: Tensor, stored: Sequence[Tensor], transform: str) -> Tensor:
    what, _ = parse_transform(x, stored, transform)
    return x.new_empty((*x.shape[:-1], what.width(int(x.shape[-1]))))


def parse_transform(x: Tensor, stored: Sequence[Tensor], text: str) -> tuple[Transform, dict[str, Tensor]]:
    """The transform that `text` describes, and its stored tensors by name, for rows like those of x."""
    from qcompile.transform import transform_from_json

    parsed = transform_from_json(json.loads(text))
    wanted = parsed.stored(int(x.shape[-1]))
    return parsed, {s.name: tensor for s, tensor in zip(wanted, stored, strict=True)}


def activation_group(group: int, k: int) -> int:
    """How many of k inputs share a scale when activations are int8 and weights have scales per `group` inputs.

    The group itself from 32 to 256; else the greatest size up to 128 that divides k and is a multiple of the group, or
    divides it (and then by preference is a multiple of 32, 16, 8 or 4).

    >>> activation_group(128, 4096), activation_group(16, 576), activation_group(576, 576), activation_group(1000, 1000)
    (128, 96, 96, 40)
    """
    if 32 <= group <= 256:
        return group
    if group < 32:
        return max(size for size in range(group, 129, group) if k % size == 0)
    parts = [size for size in range(1, 129) if group % size == 0]
    return next(max(fit) for unit in (32, 16, 8, 4, 1) if (fit := [size for size in parts if size % unit == 0]))


def round_table(table: Sequence[float]) -> tuple[list[int], float]:
    """A value table as int8 codes and the value of code 1, the 127th part of the largest entry."""
    unit = max(abs(value) for value in table) / 127
    return [round(value / unit) if unit else 0 for value in table], unit


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [..., K] with every `group` inputs rounded to int8 codes of one scale max|x| / 127 (half to even), as float.

    A group of nothing but numbers below `SMALLEST_ACTIVATION` becomes 0.
    """
    k = x.shape[-1]
    padded = functional.pad(x, (0, -k % group)).reshape(*x.shape[:-1], -1, group)
    most = padded.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ACTIVATION)
    # A number divided by a tensor would be the number times the reciprocal, with two roundings.
    codes = torch.round(padded * (torch.full_like(most, 127.0) / most))
    rounded: Tensor = (codes * (most / 127.0)).flatten(-2)[..., :k]
    return rounded


@torch.library.custom_op(
    "qcompile::linear", mutates_args=(), schema="(Tensor x, Tensor[] stored, Tensor[] extras, str spec) -> Tensor"
)
def linear(x: Tensor, stored: Sequence[Tensor], extras: Sequence[Tensor], spec: str) -> Tensor:
    """y [..., n_out] in x's dtype from x [..., k]: what `LinearSpec` says, in float32.

    `stored` holds the tensors of the parts one after another, `extras` the bias, norm and epilogue tensors.
    """
    what = LinearSpec.from_text(spec)
    stored_left, extras_left = list(stored), list(extras)
    bias = extras_left.pop(0).float() if what.bias else None
    y = x.float()
    if what.prologue is not None:
        weight, eps = extras_left.pop(0).float(), what.prologue["eps"]
        if what.prologue["op"] == "rms_norm":
            y = _rms_norm(y, weight, eps, what.prologue.get("offset", 0.0))
        else:
            y = functional.layer_norm(y, (what.k,), weight, extras_left.pop(0).float(), eps)
    for each in what.transforms():
        count = len(each.stored(what.k))
        tensors, extras_left = extras_left[:count], extras_left[count:]
        y = transform(y, tensors, json.dumps(each.to_json()))
    if what.accuracy == "int8" and not what.before:
        y = round_activations(y, what.act_group)
    weights = []
    for part in what.parts:
        tensors, stored_left = stored_left[: part.tensors], stored_left[part.tensors :]
        format_ = part.format
        if what.accuracy == "int8" and format_.get("table") is not None:
            codes, unit = round_table(format_["table"])
            format_ = {**format_, "table": [code * unit for code in codes]}
        weights.append(dequantize(tensors, json.dumps(format_), part.n, what.k))
    y = functional.linear(y, weights[0] if len(weights) == 1 else torch.cat(weights), bias)
    for step in what.epilogue:
        if step["op"] == "add":
            y = y + extras_left.pop(0).float()
        elif step["op"] == "mul":
            y = y * extras_left.pop(0).float()
        elif step["op"] == "glu":
            first, second = y.chunk(2, dim=-1)
            y = ACTIVATIONS[step["act"]](first) * second
        elif step["op"] in ROUNDED:
            y = y.to(ROUNDED[step["op"]]).float()
        else:
            y = ACTIVATIONS[step["op"]](y)
    return y.to(x.dtype)


@linear.register_fake
def _(x: Tensor, stored: Sequence[Tensor], extras: Sequence[Tensor], spec: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], LinearSpec.from_text(spec).n_out))


@torch.library.custom_op("qcompile::matmul", mutates_args=(), schema="(Tensor x, Tensor w) -> Tensor")
def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] times the transposed w [N, K], both of one 16-bit dtype: f32 [M, N], summed and kept in float32."""
    if x.is_cuda:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), w.float())


@matmul.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.float32)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """softmax(q k^T * scale) v, grouped heads; `seen` is bool, expandable to [B, H, S, T]; NaN where none is seen."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(heads, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    share = torch.softmax(scores, dim=-1)
    return (share[..., : k.shape[2]] @ v).transpose(1, 2).contiguous().to(q.dtype)


@torch.library.custom_op(
    "qcompile::attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window, float softcap, Tensor? sinks) -> Tensor"
    ),
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention over a whole sequence: q [B, H, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, S, H, Dv].

    Head h reads key head h // (H // Hkv). Query i sees keys j <= i if `causal`, and only j > i - window if window > 0.
    Scores are softcap * tanh(score / softcap) if softcap > 0; `sinks` [H] are logits that take share and add nothing.
    """
    seen = None
    if causal or window:
        query, key = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
        distance = query[:, None] - key[None, :]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            seen &= distance >= 0
        if window:
            seen &= distance < window
    return _attend(q, k, v, seen, scale, softcap, sinks)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


@torch.library.custom_op("qcompile::rope", mutates_args=(), schema="(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, D]: the first R <= D columns turned by cos, sin [B or 1, S, R], halves paired."""
    return _rope(x, cos, sin)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "qcompile::cached_attention",
    mutates_args=("k_cache", "v_cache"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor past, "
        "Tensor start, float scale, int window, float softcap, Tensor? sinks) -> Tensor"
    ),
)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    past: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of S new positions over a cache: q [B, H, S, D], k, v [B, Hkv, S, D or Dv] -> [B, S, H, Dv].

    q and k are turned by `rope` first if cos and sin [B or 1, S, R] are given. Then k, v are written to slots
    past .. past + S - 1 of k_cache [B, Hkv, C, D] and v_cache [B, Hkv, C, Dv]; `past` is i64 [1], `start` i64 [B].
    Query i sees slots start[b] <= j <= past + i, and only j > past + i - window if window > 0. A query in a slot before
    start[b] is padding and gives zeros. Scale, softcap and sinks as in `attention`. past + S must be at most C.
    """
    steps, begin = q.shape[2], int(past)
    end = begin + steps
    if end > k_cache.shape[2]:
        raise ValueError(f"the cache has {k_cache.shape[2]} slots, {end} are needed")
    if cos is not None and sin is not None:
        q, k = _rope(q, cos, sin), _rope(k, cos, sin)
    k_cache[:, :, begin:end] = k
    v_cache[:, :, begin:end] = v
    slot = torch.arange(end, device=q.device)
    at = slot[begin:, None]
    seen = slot[None, None, :] >= start[:, None, None]
    seen = seen & (slot <= at)
    if window:
        seen = seen & (slot > at - window)
    y = _attend(q, k_cache[:, :, :end], v_cache[:, :, :end], seen[:, None], scale, softcap, sinks)
    return torch.where((slot[begin:] >= start[:, None])[:, :, None, None], y, 0.0)


@cached_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    past: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + offset)).to(x.dtype)


@torch.library.custom_op(
    "qcompile::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, float offset) -> Tensor"
)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight [K] + offset) over the rows of x [..., K], in float32, as x's dtype."""
    return _rms_norm(x, weight, eps, offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)
