"""benchmarks/gpu.py: its checks on small shapes through the interpreter, its weights, and what it makes of times."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from gpu.device import Interpreter

from benchmarks import gpu, gpu_formats, gpu_layers, gpu_models, gpu_rivals
from benchmarks.gpu_results import Lost, Results, Row
from benchmarks.gpu_weights import KINDS
from qcompile.evaluate import dequantize
from qcompile.methods.index import METHODS
from qcompile.runtime.codes import one_code
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.model import CompiledModel
from qcompile.target import INTERPRET

CPU = torch.device("cpu")
TINY = {
    **gpu_models.SMOLLM2, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_method_stays() -> Iterator[None]:
    yield
    METHODS.pop("given", None)
    METHODS._added.pop("given", None)


def open_session(model: CompiledModel) -> CudaSession:
    executable, contents = model.artifact.executable, model.contents
    assert executable is not None
    kernels = one_code(contents.kernels, executable.kernels, INTERPRET)
    device = Interpreter(executable.kernels)
    return CudaSession(executable, contents.tensors, kernels, device, sizes=model.artifact.sizes, bounds=model.bounds)


def prepare(model: CompiledModel) -> CompiledModel:
    model.__dict__["session"] = open_session(model)
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_are_worth_what_their_format_says(kind):
    weights = kind.random(24, 256)
    packed = kind.packed(weights)
    assert torch.equal(dequantize(packed.format, packed.tensors, 24, 256), kind.dense(weights))
    assert kind.size(24, 256) == sum(tensor.nbytes for tensor in packed.tensors.values())


def test_decoding_first_is_the_same_weight():
    for kind in KINDS.values():
        weights = kind.random(24, 256)
        codes = weights.codes if kind.name in ("int8", "fp8") else gpu_rivals.pairs(weights.codes, 0)
        made = gpu_rivals.decode(kind.name, codes, weights.scales)
        assert (
            torch.equal(made, kind.dense(weights).bfloat16()) or gpu_layers.distance(made, kind.dense(weights)) < 3e-3
        )
        x = torch.randn(3, 256).bfloat16()
        y = gpu_rivals.cublas(kind.name, weights, CPU)(x)
        assert gpu_layers.distance(y, x.double() @ kind.dense(weights).double().T) < gpu_layers.BOUND


def checked(results: Results, **which: object) -> list[Row]:
    results.start("checks")
    options = {"layers": [], "shape": TINY, "tokens": (3, 2)} | which
    gpu.check(results, INTERPRET.name, CPU, open_session, prepare, rows=(1, 5), **options)
    return results.rows("checks")


def test_layers_are_checked_in_the_interpreter_and_one_that_fails_is_said(capsys):
    results = Results()
    formats = gpu_formats.cases(every=False)[:2]
    rows = checked(results, layers=[("nf4", 24, 64), ("no such", 1, 1)], formats=formats)
    text = capsys.readouterr().out
    assert [row["of"] for row in results.failed("checks")] == ["no such 1x1 for cuda:interpret"]
    assert [row.get("what") for row in rows[-2:]] == ["gptq 33x64", "awq 24x64"]
    assert "nf4 24x64 M=5" in text and "FAIL no such 1x1 for cuda:interpret: KeyError" in text


def test_formats_that_fail_together_are_checked_one_by_one(monkeypatch):
    check_formats = gpu_formats.check_formats

    def fails(which, *rest):
        if any(sample.name == "awq 24x64" for sample in which):
            raise RuntimeError("no kernel")
        return check_formats(which, *rest)

    monkeypatch.setattr(gpu_formats, "check_formats", fails)
    rows = checked(Results(), formats=gpu_formats.cases(every=False)[:2])
    assert [(row["of"].removesuffix(" for cuda:interpret"), row["ok"]) for row in rows] == [
        ("formats 0 to 1", False), ("format 0, gptq 33x64", True), ("format 1, awq 24x64", False),
    ]  # fmt: skip


def test_figures_are_kept_after_each_step_and_a_run_goes_on(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"llama": [{"of": "8 layers"}], "checks": [{"of": "old"}]}')
    dead = []

    def alive():
        if dead:
            raise RuntimeError("CUDA error: an illegal memory access")

    def work(fails):
        yield {"ok": True}
        dead[:] = [1] * fails
        if fails:
            raise ValueError("wrong")

    results = Results(path, alive=alive)
    results.start("checks")
    assert results.attempt("checks", "a", lambda: work(0), str)
    assert json.loads(path.read_text()) == {"llama": [{"of": "8 layers"}], "checks": [{"of": "a", "ok": True}]}
    with pytest.raises(Lost, match="RuntimeError: CUDA error: an illegal memory access"):
        results.attempt("checks", "b", lambda: work(1), str)
    again = Results(path, resume=True)
    again.start("checks")
    assert again.failed("checks") == [{"of": "b", "ok": False, "failed": "ValueError: wrong"}]
    for of in "abc":
        again.attempt("checks", of, lambda: work(0), str)
    assert [row["of"] for row in json.loads(path.read_text())["checks"]] == ["a", "b", "b", "c"]


def test_a_run_does_what_is_most_wanted_first(tmp_path, monkeypatch, capsys):
    device, asked = Interpreter({}), []
    machine = gpu_layers.Machine("a GPU", 1e12, 1e14)

    def check(results, target, *rest, layers, formats=(), models=(), **options):
        asked.append((target, layers[0], len(layers), len(formats), models))

    def time_layer(which, kind, n, k, rows, target, device):
        name, times = ("qcompile", 10.0) if which is None else (which.name, 20.0)
        if name == "tinygemm":
            raise RuntimeError("not here")
        return {m: gpu_layers.Timed(name, times) for m in rows}

    monkeypatch.setattr(gpu, "CudaDevice", lambda: device)
    monkeypatch.setattr(gpu, "target_of", lambda name: INTERPRET)
    monkeypatch.setattr(gpu, "check", check)
    monkeypatch.setattr(gpu_layers, "measured", lambda device: machine)
    monkeypatch.setattr(gpu_layers, "time_layer", time_layer)
    monkeypatch.setattr(gpu_models, "time_llama", lambda target, bandwidth, layers: {"layers": layers})
    monkeypatch.setattr(gpu_models, "smollm2", lambda: None)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--output", str(path), "--rows", "1"]) == 1  # one failed
    assert [call[:3] for call in asked] == [
        ("cuda:interpret", ("int4", 192, 640), 7),
        ("cuda:ptx", ("int4", 192, 640), 2),
    ]
    found = json.loads(path.read_text())
    assert found["machine"]["device"] == "a GPU" and found["llama"] == [{"of": "8 layers", "layers": 8}]
    rows = found["layers"]
    assert [row["of"] for row in rows[:8:2]] == [
        "cuBLAS bf16 int4 4096x4096", "cuBLAS bf16 nf4 4096x4096", "qcompile int4 4096x4096", "qcompile nf4 4096x4096",
    ]  # fmt: skip
    assert rows[4]["times_bf16"] == 2.0 and {row["of"] for row in rows if not row.get("ok", True)} == {
        "tinygemm int4 4096x4096",
        "tinygemm int4 8192x8192",
    }
    assert "FAIL tinygemm int4 4096x4096: RuntimeError: not here" in capsys.readouterr().out


@pytest.mark.full
def test_models_are_checked_in_the_interpreter():
    rows = checked(Results(), models=["int8"])
    assert all(row["ok"] for row in rows) and [row["what"].split(", ")[2] for row in rows] == [
        "prefill", "decode", "tokens of two runs that differ",
    ]  # fmt: skip


def test_a_wrong_result_fails():
    right = torch.randn(3, 8).double()
    assert gpu_layers.distance(right.float(), right) < gpu_layers.BOUND
    assert gpu_layers.distance(right.float() * 1.01, right) > gpu_layers.BOUND
    assert gpu_layers.distance(torch.full((3, 8), torch.nan), right) == float("inf")


def test_rows_of_the_table():
    machine = gpu_layers.Machine("a GPU", 1e12, 1e14)
    kind = KINDS["int4"]
    times = [
        gpu_layers.Timed("qcompile", 20.0), gpu_layers.Timed("cuBLAS bf16", 40.0),
        gpu_layers.Timed("gemlite", error="ModuleNotFoundError: No module named 'gemlite'"),
    ]  # fmt: skip
    own, dense, absent = (gpu_layers.table_row(machine, kind, 4096, 4096, 1, item, 40.0) for item in times)
    assert own["times_bf16"] == 2.0 and dense["times_bf16"] == 1.0
    assert own["share_of_limit"] == pytest.approx(own["limit_us"] / 20, abs=1e-3)
    assert own["limit_us"] == pytest.approx((kind.size(4096, 4096) + 2 * 8192) / 1e6, abs=0.01)
    assert machine.limit(kind, 4096, 4096, 2048) == pytest.approx(2 * 2048 * 4096**2 / 1e14 * 1e6)
    assert "skipped: ModuleNotFoundError" in gpu.line(absent) and "2.00 x bf16" in gpu.line(own)


def test_a_contender_that_is_not_installed_says_so():
    gemlite = next(rival for rival in gpu_rivals.RIVALS if rival.name == "gptqmodel Marlin")
    found = gpu_layers.rival(gemlite, KINDS["int4"], KINDS["int4"].random(64, 128), (1, 4), Interpreter({}))
    assert {m: item.error.split(":")[0] for m, item in found.items()} == dict.fromkeys((1, 4), "ModuleNotFoundError")


def test_a_kernel_is_timed_over_copies_of_its_weights():
    model = gpu_layers.compiled([KINDS["nf4"].packed(KINDS["nf4"].random(16, 64))], INTERPRET.name)
    device = Interpreter(model.artifact.executable.kernels)
    sessions = [
        CudaSession(
            model.artifact.executable, model.contents.tensors,
            one_code(model.contents.kernels, model.artifact.executable.kernels, INTERPRET), device,
        )
        for _ in range(2)
    ]  # fmt: skip
    (name,) = (port.name for port in sessions[0].executable.inputs)
    runs = [session.again({name: torch.randn(1, 64)}) for session in sessions]
    assert gpu_layers.seconds(device, runs, least=0.0, rounds=1) > 0
    assert len({pointers for _, pointers, _ in device.launches}) == 2 and device.replays > 2


def test_options():
    quick = gpu.options_of(["--quick", "--shapes", "64x128"])
    assert quick.shapes == [(64, 128)] and quick.rows == gpu.QUICK_ROWS and quick.kinds == gpu.QUICK_KINDS
    full = gpu.options_of([])
    assert full.shapes == gpu_layers.SHAPES and list(full.kinds) == list(KINDS)
    assert json.dumps(vars(full), default=str)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main(["--check-only"]) == 2
    assert "error: this machine has no NVIDIA" in capsys.readouterr().err
