"""The schemes that CompressedTensors has names for."""

from __future__ import annotations

from typing import Any


def _floats(bits: int, strategy: str, size: int | None = None, scale: str | None = None, **more: Any) -> dict[str, Any]:
    made = {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": size} | more
    return made | ({"scale_dtype": f"torch.{scale}"} if scale else {})


def _integers(bits: int, strategy: str, size: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size} | more


def _mx(bits: int, **more: Any) -> dict[str, Any]:
    return _floats(bits, "group", 32, "uint8", **more)


def _pairs() -> dict[str, dict[str, Any]]:
    """W<bits>A<bits>: integers in groups of 128, and integers per token where activations are below 16 bits."""
    pairs = [(w, a) for w in range(2, 9) for a in (4, 8, 16) if w <= a and (w, a) != (8, 8)]
    return {
        f"W{w}A{a}": {"weights": _integers(w, "group", 128)}
        | ({"input_activations": _integers(a, "token", dynamic=True)} if a < 16 else {})
        for w, a in pairs
    }


_NVFP4 = _floats(4, "tensor_group", 16, "float8_e4m3fn")
_INT8 = {"weights": _integers(8, "channel"), "input_activations": _integers(8, "token", dynamic=True)}
_FP8_TOKEN = _floats(8, "token", dynamic=True)

PRESETS: dict[str, dict[str, Any]] = {
    "UNQUANTIZED": {},
    "W4A16_ASYM": {"weights": _integers(4, "group", 128, symmetric=False)},
    "W8A8": _INT8,
    "INT8": _INT8,
    "W4AFP8": {"weights": _integers(4, "group", 128), "input_activations": _FP8_TOKEN},
    "FP8": {"weights": _floats(8, "tensor"), "input_activations": _floats(8, "tensor", observer="static_minmax")},
    "FP8_DYNAMIC": {"weights": _floats(8, "channel"), "input_activations": _FP8_TOKEN},
    "FP8_BLOCK": {
        "weights": _floats(8, "block", block_structure=[128, 128]),
        "input_activations": _floats(8, "group", 128, dynamic=True),
    },
    "NVFP4A16": {"weights": _NVFP4},
    "NVFP4": {"weights": _NVFP4, "input_activations": _NVFP4 | {"dynamic": "local", "observer": "static_minmax"}},
    "MXFP4A16": {"weights": _mx(4)},
    "MXFP4": {"weights": _mx(4), "input_activations": _mx(4, dynamic=True)},
    "MXFP4XFP8": {"weights": _mx(4), "input_activations": _floats(8, "group", 128, dynamic=True)},
    "MXFP6A16": {"weights": _mx(6)},
    "MXFP6A8": {"weights": _mx(6), "input_activations": _mx(8, dynamic=True)},
    "MXFP8A16": {"weights": _mx(8)},
    "MXFP8": {"weights": _mx(8), "input_activations": _mx(8, dynamic=True)},
    **_pairs(),
}
