"""Float weights to GGUF's plain blocks, as the gguf package and ggml's reference code round them."""

from __future__ import annotations

import torch

from qcompile.format import Format
from qcompile.pack import pack

# The largest code; where there is no offset, also the code of zero.
SYMMETRIC = {"q4_0": (15, 8), "q5_0": (31, 16)}
WITH_OFFSET = {"q4_1": 15, "q5_1": 31}


def blocks(fmt: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight f32 [N, K] in q4_0, q4_1, q5_0, q5_1 or q8_0; K is a multiple of 32."""
    encoding, (N, K) = fmt.kind.removeprefix("gguf-"), weight.shape
    x = weight.reshape(N, -1, 32)
    if encoding in WITH_OFFSET:
        largest = WITH_OFFSET[encoding]
        least = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - least) / largest
        code, offset = torch.trunc((x - least) * _inverse(scale) + 0.5), {"offset": least}
    elif encoding in SYMMETRIC:
        largest, zero = SYMMETRIC[encoding]
        # The value furthest from 0 gets code 0 whatever its sign, so the scale may be negative.
        scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -zero
        code, offset = torch.trunc(x * _inverse(scale) + (zero + 0.5)), {}
    else:
        scale = x.abs().amax(-1, keepdim=True) / 127
        ratio = x * _inverse(scale)
        size, largest = ratio.abs(), 127
        code, offset = torch.sign(ratio) * (size.floor() + (2 * (size - size.floor())).floor()), {}
    fields = {"code": code.clamp(max=largest).to(torch.int32)}
    fields |= {name: value.to(torch.float16).expand_as(x) for name, value in {"scale": scale, **offset}.items()}
    return pack(fmt, {name: value.reshape(N, K) for name, value in fields.items()}, N, K)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)
