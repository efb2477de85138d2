"""How transformers' decoders are made to call `qcompile.attention`, and how their masks are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from qcompile.errors import CaptureError

IMPLEMENTATION = "qcompile"
PROBE = 1 << 20


@dataclass(frozen=True)
class CausalMask:
    """What stands where a mask tensor would: causal, and only the last `window` positions when it is not 0."""

    window: int


def read_mask(mask_function: Callable[..., torch.Tensor]) -> CausalMask:
    """Which mask `mask_function(batch, head, query, key)` is, found by asking it about two late queries.

    CaptureError when it is neither causal nor causal with a sliding window.
    """
    last, found = [PROBE - 1, PROBE], "a mask that depends on more than the places of query and key"
    with _disable_current_modes():
        zero, keys = torch.tensor(0), torch.arange(PROBE)
        try:
            seen = [mask_function(zero, zero, torch.tensor(q - 1), keys).expand(PROBE) for q in last]
            counts = [int(s.sum()) for s in seen]
            latest = [int(s[max(0, end - count) : end].sum()) for s, count, end in zip(seen, counts, last, strict=True)]
        except RuntimeError:  # a chunked mask, for one, looks at where each row begins, which nobody knows here
            latest, counts = [], [0]
        else:
            found = f"query {PROBE - 1} sees {counts[1]} of {PROBE} keys"
        if latest == counts:
            if counts == last:
                return CausalMask(0)
            if counts[0] == counts[1]:
                return CausalMask(counts[0])
    raise CaptureError(
        "the model masks its attention in an unknown way",
        where=getattr(mask_function, "__qualname__", "mask function"),
        found=found,
        expected="a causal mask, or a causal mask with a sliding window",
        remedy="pass example_inputs to export the model as a plain module, without a cache",
    )


def _mask(*, mask_function: Callable[..., torch.Tensor], **_: Any) -> CausalMask:
    return read_mask(mask_function)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if not isinstance(attention_mask, CausalMask) or position_bias is not None:
        raise CaptureError(
            "the attention of the model is not plain causal attention",
            where=type(module).__name__,
            found="a position bias" if position_bias is not None else f"a mask of type {type(attention_mask).__name__}",
            expected="a mask that transformers.masking_utils makes, and no position bias",
            remedy="pass example_inputs to export the model as a plain module, without a cache",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.qcompile.attention(
        query, key, value, scale, True, attention_mask.window, float(softcap or 0.0), s_aux
    )
    return out, None


def register() -> None:
    """Makes `IMPLEMENTATION` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
