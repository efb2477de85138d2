"""The parameters of the attention kernel: what it computes, what it may be asked for, and what it touches."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside, require, strided
from qcompile.lowering.mlir.memory import FLOATS

STACK = 1 << 18  # float32 elements that a kernel may take of it


@dataclass(frozen=True)
class Attention:
    """What one attention kernel computes; the params of its KernelSpec.

    `group` query heads share one of `kv_heads` key heads; `d` and `dv` are the widths of keys and values. `queries` is
    how many positions make a block. `causal`, `window` (0: none), `softcap` (0: none) as in qcompile.attention.
    `mask`: dtype of an additive mask, "bool" for one that says which keys are seen, "" for none. `rope`: columns of q
    that are turned (0: none). `cached`: positions begin at `past`, and keys before `start[b]` are not seen.
    `sinks`: dtype of the logits that only take share, "" for none. `split`: keys of one part, 0 to keep keys together.
    """

    group: int
    kv_heads: int
    d: int
    dv: int
    queries: int
    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    mask: str = ""
    rope: int = 0
    cached: bool = False
    sinks: str = ""
    split: int = 0
    q: str = "f32"
    k: str = "f32"
    v: str = "f32"
    turn: str = "f32"
    y: str = "f32"

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def keys(self) -> int:
        """Keys of a block: its transposed copy is 32 KiB at most."""
        return 64 if self.d <= 128 else 32

    def args(self) -> list[str]:
        """The arguments in order."""
        extra = (["mask"] if self.mask else []) + (["cos", "sin"] if self.rope else [])
        extra += (["past", "start"] if self.cached else []) + (["sinks"] if self.sinks and not self.split else [])
        return ["q", "k", "v", *extra, "y"]

    def dims(self) -> list[str]:
        """The dimensions in order: sizes, then strides in elements of what is not contiguous."""
        strides = [f"{tensor}_{axis}" for tensor in "qkv" for axis in ("b", "h", "s")]
        strides += ["mask_b", "mask_h", "mask_s"] if self.mask else []
        strides += ["turn_b", "turn_s"] if self.rope else []
        return ["b", "s", "t", *strides, *(["parts"] if self.split else [])]

    def problem(self) -> str:
        """Which parameter is out of range; empty when none is."""
        rows, few = self.queries * self.group, 1 << 16
        return outside(
            self,
            group=1 <= self.group < few,
            kv_heads=1 <= self.kv_heads < few,
            d=1 <= self.d <= 4096,
            dv=1 <= self.dv <= 4096,
            queries=self.queries >= 1 and (rows + 8) * (self.d + self.dv + 24) + self.keys * self.d <= STACK,
            window=0 <= self.window < 2**48,
            rope=0 <= self.rope <= self.d and self.rope % 2 == 0,
            split=0 <= self.split < few and self.split % self.keys == 0 and (self.cached or not self.split),
            mask=self.mask in ("", "bool", *FLOATS),
            sinks=self.sinks in ("", *FLOATS),
            **{name: getattr(self, name) in FLOATS for name in ("q", "k", "v", "turn", "y")},
        )


def extents(params: Attention, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, dim = params, dict(zip(params.dims(), numbers(dims, len(params.dims())), strict=True))
    b, s, t = dim["b"], dim["s"], dim["t"]

    def of(tensor: str, dtype: str, *sizes: int) -> Extent:
        strides = [dim[name] for axis in "bhs" if (name := f"{tensor}_{axis}") in dim]
        return Extent(dtype, strided(sizes, strides))

    parts = dim.get("parts", 1)
    require(not p.split or parts * p.split >= t, "keys are in more parts than there is room for", t, parts)
    wide = parts * (p.dv + 2) if p.split else p.dv
    found = {
        "q": of("q", p.q, b, p.heads, s, p.d), "k": of("k", p.k, b, p.kv_heads, t, p.d),
        "v": of("v", p.v, b, p.kv_heads, t, p.dv),
        "cos": of("turn", p.turn, b, s, p.rope), "sin": of("turn", p.turn, b, s, p.rope),
        "past": Extent("i64", 1), "start": Extent("i64", b), "sinks": Extent(p.sinks, p.heads),
        "y": Extent("f32" if p.split else p.y, b * s * p.heads * wide, True),
    }  # fmt: skip
    if p.mask:
        found["mask"] = of("mask", p.mask, b, p.heads, s, t)
    return [found[name] for name in p.args()]
