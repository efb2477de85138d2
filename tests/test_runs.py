"""The layout of codebooks for GPUs holds exactly the weight it was made from, and gives its format back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from format_cases import CASES, random_storage

from qcompile.artifact import Module, Origin, WeightRecord
from qcompile.backend import CudaBackend
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.codebook import Aqlm, Vptq
from qcompile.formats.higgs import Higgs
from qcompile.formats.runs import CODEBOOKS, Runs, runs_for, runs_form
from qcompile.original import original
from qcompile.pack import pack, unpack
from qcompile.passes.layout_experts import LayoutExperts, _Piece

MORE: list[tuple[Format, int, int]] = [
    (Aqlm(1, 16), 40, 264),
    (Aqlm(1, 12, scale="bf16"), 33, 520),
    (Higgs(3, 256), 512, 512),
    (Vptq(4, 4096), 25, 70),
    (Vptq(16, 2048, 1024, norm=False), 40, 33),
    (Vptq(8, 128, norm=False), 16, 65),
]
WEIGHTS = [*(case for case in CASES if isinstance(case[0], CODEBOOKS)), *MORE]


def back(made: Packed, format: Format) -> Packed:
    module = Module("m", "Linear", made.N, made.K, "m.weight")
    record = WeightRecord(
        made.format.to_json(), {name: name for name in made.tensors}, made.N, made.K, 0, made.N,
        origin=Origin(module, format.to_json()),
    )  # fmt: skip
    return original(record, made.tensors)


@pytest.mark.parametrize(("format", "N", "K"), WEIGHTS, ids=[f"{f.kind}-{i}" for i, (f, _, _) in enumerate(WEIGHTS)])
def test_a_weight_lies_in_runs_and_gets_its_format_back(format: Format, N: int, K: int) -> None:
    packed = Packed(format, random_storage(format, N, K), N, K)
    made, form = runs_for(packed), runs_form(format, N, K)
    if isinstance(made, str):
        assert made == form
        return
    made.check()
    assert made.format == form
    want, got = (dequantize(each.format, each.tensors, N, K) for each in (packed, made))
    assert torch.equal(want.view(torch.int32), got.view(torch.int32))
    again = back(made, format)
    assert torch.equal(want.view(torch.int32), dequantize(format, again.tensors, N, K).view(torch.int32))
    # Bits that hold no code are 0; entries that no code names are there too.
    assert all(
        torch.equal(again.tensors[s.name], packed.tensors[s.name]) for s in format.stored(N, K) if s.dtype == "f16"
    )


LAYOUTS = [
    (Runs("k", 8, (16,), scale="f16"), 40, 160),
    (Runs("k", 2, (6,), scale="f16", group=64), 33, 192),
    (Runs("n", 8, (11, 5), norm=True), 70, 90),
]


@pytest.mark.parametrize(("format", "N", "K"), LAYOUTS, ids=lambda each: getattr(each, "axis", ""))
def test_its_addresses_say_what_it_stores(format: Runs, N: int, K: int) -> None:
    fields = unpack(format, random_storage(format, N, K), N, K)
    stored = pack(format, fields, N, K)
    again = unpack(format, stored, N, K)
    assert all(torch.equal(fields[name], again[name]) for name in fields)


def test_memory_grows_by_no_more_than_padding() -> None:
    kept = (
        Aqlm(1, 16),
        Aqlm(2, 8),
        Aqlm(4, 8, 1, 16),
        Higgs(2),
        Higgs(3),
        Higgs(4),
        Vptq(8, 256, 256),
        Vptq(8, 2**16, 256),
    )
    for format in kept:
        layout = runs_form(format, 4096, 4096)
        assert isinstance(layout, Runs) and layout.bits_per_weight(4096, 4096) == format.bits_per_weight(4096, 4096)
    odd = runs_form(Vptq(16, 2**16, 2**15), 4096, 4096)
    assert isinstance(odd, Runs) and (sum(odd.widths), odd.total) == (31, 32)
    narrow = runs_form(Aqlm(1, 12), 4096, 4096)  # 12 bits, which AQLM stores in 16
    assert (
        isinstance(narrow, Runs) and narrow.bits_per_weight(4096, 4096) == Aqlm(1, 12).bits_per_weight(4096, 4096) - 0.5
    )


def test_what_has_no_runs() -> None:
    assert runs_form(Aqlm(1, 8, 2, 8), 8, 64) == "entries of 2 x 8 weights"
    assert runs_form(Vptq(groups=2), 8, 64) == "0 columns with outliers, 2 groups"
    assert runs_form(Vptq(6), 12, 64) == "runs of 6 weights"
    assert runs_form(Aqlm(3, 16), 8, 64) == "codes of 48 bits"
    assert runs_form(Aqlm(1, 8, dtype="f32"), 8, 64) == "entries of f32"
    assert runs_form(Higgs(2, 8), 128, 64) == "scales of 8 inputs"


def test_experts_with_books_of_their_own_stay_apart_and_the_report_says_so() -> None:
    format, tensors, pieces = Aqlm(1, 8), dict[str, torch.Tensor](), []
    for expert in "ab":
        held = random_storage(format, 32, 64)
        tensors |= {f"{expert}.{name}": tensor for name, tensor in held.items()}
        nodes: Any = tuple(SimpleNamespace(meta={"tensor": f"{expert}.{name}"}) for name in held)
        pieces.append(_Piece(expert, WeightRecord(format.to_json(), {}, 32, 64, 0, 32), nodes, format))
    program: Any = SimpleNamespace(tensors=tensors)
    found = LayoutExperts()._layout(SimpleNamespace(backend=CudaBackend()), program, pieces, 64)  # type: ignore[arg-type]
    assert found == "its 2 parts have codebooks of their own"
