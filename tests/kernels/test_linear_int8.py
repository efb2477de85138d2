"""int8 linear kernels, run by their rule, against the eager operator: formats, sizes, norms, epilogues, targets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from int8_linears import HERE, Run, close, kernel, weight

from qcompile import ops
from qcompile.artifact import KernelSpec
from qcompile.formats.lanes import Lanes, pack_lanes
from qcompile.lowering.base import Refuse
from qcompile.lowering.mlir import activation_int8, templates, toolchain
from qcompile.lowering.mlir.linear_int8_rule import lower_int8
from qcompile.ops import LinearSpec, Part, activation_group, round_activations
from qcompile.target import CPU_LEVELS, Target, native

NF4 = (-1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0)


def case(
    m: int, n: int | Sequence[int], k: int, format: Lanes, target: Target | None = None, threads: int = 2, **spec: Any
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """What the kernels give, what the operator gives, and which kernels ran."""
    torch.manual_seed(m + k)
    rows = [n] if isinstance(n, int) else list(n)
    parts = [weight(rows_, format, k) for rows_ in rows]
    what = LinearSpec(
        k, tuple(Part(format.to_json(), rows_, len(part)) for rows_, part in zip(rows, parts, strict=True)),
        accuracy="int8", **{"act_group": activation_group(format.group, k), **spec},
    )  # fmt: skip
    x = torch.randn(m, k)
    extras = [torch.randn(what.n)] if what.bias else []
    if what.prologue:
        extras += [torch.rand(k) + 0.5 for _ in range(1 + (what.prologue["op"] == "layer_norm"))]
    extras += [torch.randn(m, what.n_out) for step in what.epilogue if step["op"] in ("add", "mul")]
    stored = [tensor for part in parts for tensor in part.values()]
    run = Run(torch.full((m, what.n_out), torch.nan), target or native(), threads)
    lower_int8(SimpleNamespace(args=(x, stored, extras, "")), what, run)  # type: ignore[arg-type]
    return run.y, ops.linear(x, stored, extras, what.to_text()), run.ran


@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 33, 513])
def test_rows(m: int) -> None:
    y, expected, ran = case(m, 80, 256, Lanes(4, 64, zero=8.0))
    close(y, expected)
    assert ran == (["linear-int8-gemv"] if m <= 4 else ["activation-int8", "linear-int8-gemm"])


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits(bits: int) -> None:
    for target in HERE:
        close(*case(1 if target == HERE[0] else 6, 40, 288, Lanes(bits, 96, zero=float(1 << (bits - 1))), target)[:2])


@pytest.mark.parametrize(
    "k, format",
    [
        (256, Lanes(4, 64, zero=None)),
        (256, Lanes(4, 64, zero=7.5)),
        (256, Lanes(4, 32, zero="u8", scale="f16")),
        (256, Lanes(3, 128, zero="f16", scale="bf16")),
        (256, Lanes(4, 32, zero=None, offset="f16", factor=0.5)),
        (256, Lanes(8, 256, zero=128.0)),
        (512, Lanes(8, 512, zero="f32", scale="f16")),
        (256, Lanes(4, 64, NF4, None)),
        (256, Lanes(3, 256, NF4[:8], None, factor=2.0)),
        (1024, Lanes(4, 512, zero="u8")),
        (96, Lanes(6, 8, zero="u8")),
        (252, Lanes(1, 36, zero=0.5)),
        (576, Lanes(4, 576, zero=8.0)),
    ],
    ids=lambda item: str(item) if isinstance(item, int) else f"{item.bits}-{item.group}-{item.zero}",
)
def test_formats(k: int, format: Lanes) -> None:
    for target in HERE:
        close(*case(6 if target == HERE[0] else 1, 33, k, format, target)[:2])


@pytest.mark.parametrize("m", [4, 9])
@pytest.mark.parametrize(
    "n, spec",
    [
        (48, {"bias": True}),
        (33, {"bias": True, "epilogue": ({"op": "gelu"}, {"op": "add"})}),
        ((64, 17), {"bias": True, "epilogue": ({"op": "silu"},)}),
        (96, {"epilogue": ({"op": "glu", "act": "silu"}, {"op": "mul"})}),
        ((37, 37), {"bias": True, "epilogue": ({"op": "glu", "act": "gelu_tanh"},)}),
    ],
    ids=str,
)
def test_epilogues(n: Any, spec: dict[str, Any], m: int) -> None:
    close(*case(m, n, 128, Lanes(4, 64, zero=8.0), **spec)[:2])


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize(
    "prologue", [{"op": "rms_norm", "eps": 1e-5, "offset": 1.0}, {"op": "layer_norm", "eps": 1e-5}], ids=str
)
def test_prologues(prologue: dict[str, Any], m: int) -> None:
    # The norm's last bit may differ from the operator's, and an input between two codes then takes the other one.
    close(*case(m, 48, 192, Lanes(4, 64, zero=8.0), prologue=prologue, bias=True)[:2], tolerance=1e-2)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(target: Target) -> None:
    torch.manual_seed(0)
    format = Lanes(4, 64, zero="f16")
    stored = list(weight(70, format, 256).values())
    what = LinearSpec(256, (Part(format.to_json(), 70, len(stored)),), accuracy="int8", act_group=64)
    x, found = torch.randn(13, 256), []
    for rows, threads in ((13, 1), (13, 3), (3, 2), (1, 1)):
        run = Run(torch.empty(rows, 70), target, threads)
        lower_int8(SimpleNamespace(args=(x[:rows], stored, [], "")), what, run)  # type: ignore[arg-type]
        found.append(run.y[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_targets_agree_to_the_last_bit() -> None:
    for format in (Lanes(8, 64, zero="f16"), Lanes(4, 64, NF4, None)):
        for m in (1, 6):
            first, *others = [case(m, 32, 256, format, target)[0] for target in HERE]
            assert all(torch.equal(first, other) for other in others)


def test_extreme_codes_do_not_saturate() -> None:
    for target in HERE:
        for bits in (7, 8):
            format = Lanes(bits, 64, zero=0.0)
            tensors = pack_lanes(format, torch.full((16, 64), (1 << bits) - 1, dtype=torch.uint8), torch.ones(16, 1))
            what = LinearSpec(64, (Part(format.to_json(), 16, len(tensors)),), accuracy="int8", act_group=64)
            run = Run(torch.empty(1, 16), target, 1)
            node = SimpleNamespace(args=(torch.full((1, 64), 127.0), list(tensors.values()), [], ""))
            lower_int8(node, what, run)  # type: ignore[arg-type]
            assert run.y.eq(64 * 127 * ((1 << bits) - 1)).all()


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("k, group, block", [(64, 64, 64), (96, 48, 24), (24, 12, 4)])
def test_rounded_rows_are_those_of_the_operator(k: int, group: int, block: int, tile: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, k) * torch.tensor([[1.0], [1e-3], [1e6], [0.0], [1e-38], [1.0]])
    x[1, 0] = 0.5 * x[1].abs().max()  # 63.5 codes: rounds to even
    r = activation_int8.Rounding(k, group, block, tile, "after")
    tiles = torch.zeros(-(-6 // tile), r.words, dtype=torch.int32)
    params = asdict(r)
    kernel("activation-int8", json.dumps(params), native())([x, tiles], [6], threads=2)
    codes, scales, sums = tiles.split([k // 4 * tile, k // group * tile, k // block * tile], 1)

    def rows(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        per_row = words.unflatten(1, (-1, tile)).transpose(1, 2).contiguous()
        return per_row.view(dtype).flatten(0, 1)[:6].float()

    code, scale = rows(codes, torch.int8), rows(scales, torch.float32)
    assert torch.equal(code.unflatten(1, (-1, block)).sum(-1), rows(sums, torch.float32))
    assert torch.equal((code.unflatten(1, (-1, group)) * scale[..., None]).flatten(1), round_activations(x, group))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_reaches_the_result(bad: float) -> None:
    format = Lanes(4, 32, zero=8.0)
    tensors = weight(16, format, 64)
    what = LinearSpec(64, (Part(format.to_json(), 16, len(tensors)),), accuracy="int8", act_group=32)
    for m in (1, 5):
        x = torch.randn(m, 64)
        x[0, 40] = bad
        run = Run(torch.empty(m, 16), native(), 1)
        lower_int8(SimpleNamespace(args=(x, list(tensors.values()), [], "")), what, run)  # type: ignore[arg-type]
        assert not run.y[0].isfinite().any()
        assert run.y[1:].isfinite().all()


@pytest.mark.parametrize(
    "n, k, format, spec, reason",
    [
        (32, 60, Lanes(4, 10, zero=8.0), {}, "no multiple of 4"),
        (32, 96, Lanes(4, 48, zero=8.0), {"act_group": 32}, "do not nest"),
        (32, 96, Lanes(8, 96, tuple(map(float, range(256))), None), {}, "a table of 256 values"),
        (32, 96, Lanes(4, 48, tuple(map(float, range(16))), "f16"), {}, "the values of a table are moved by zeros"),
        (40, 96, Lanes(4, 48, zero=8.0), {"epilogue": ({"op": "glu", "act": "silu"},)}, "20 rows of each half"),
    ],
)
def test_refusals(n: int, k: int, format: Lanes, spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refuse, match=reason):
        case(1, n, k, format, **spec)


def specs(format: Lanes, target: Target) -> list[KernelSpec]:
    """The kernels of a linear node in `format`, for any number of rows."""
    made: list[KernelSpec] = []

    class Collect(Run):
        def shape(self, x: torch.Tensor) -> tuple[Any, ...]:
            return "m", *x.shape[1:]

        def variants(self, choices: Any) -> None:
            made.extend(KernelSpec(call[0], call[1]) for _, calls in choices for call in calls)

    what = LinearSpec(128, (Part(format.to_json(), 48, 9),), accuracy="int8", act_group=64)
    lower_int8(SimpleNamespace(args=(torch.empty(1, 128), [], [], "")), what, Collect(torch.empty(1), target, 1))
    return made


@pytest.mark.parametrize("format", [Lanes(3, 32, zero="f16"), Lanes(4, 64, NF4, None)], ids=lambda f: str(f.bits))
def test_an_arm_object_is_made_on_any_machine(format: Lanes) -> None:
    level = CPU_LEVELS["cpu:aarch64"]
    for spec in specs(format, level):
        text = templates.emit(spec, level)
        assert "x86" not in text
        assert toolchain.compile_module(text, level).startswith(b"\x7fELF")


def test_inner_loops_use_the_dot_instruction_and_do_not_spill() -> None:
    level = CPU_LEVELS["cpu:x86-64-v4-vnni"]
    for spec in specs(Lanes(4, 64, zero=8.0), level):
        if spec.template == "activation-int8":
            continue
        text = toolchain.assembly(templates.emit(spec, level), level)
        hot = max(re.split(r"\n(?=\.LBB)", text), key=lambda block: block.count("vpdpbusd"))
        assert hot.count("vpdpbusd") >= 16
        assert "Spill" not in hot
        assert "Reload" not in hot
