"""All CPU timings in one run: `python -m benchmarks.cpu [--layers] [--models] [--threads N] [--seconds S] [--write]`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import layers, machine, smollm2

RESULTS = Path(__file__).parent / "results"


def layer_tables(seconds: float, shapes: Sequence[tuple[int, int]], row_counts: Sequence[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for accuracy in layers.CONTENDERS:
        for n, k in shapes:
            for m in row_counts:
                times = layers.time_shape(n, k, m, accuracy, seconds)
                own, read, size = times[f"qcompile {accuracy}"], times.pop(layers.READ), layers.bytes_of(n, k)
                for name, value in times.items():
                    rows.append(
                        {
                            "accuracy": accuracy, "N": n, "K": k, "M": m, "contender": name, "us": value * 1e6,
                            "gflop_s": 2 * m * n * k / value / 1e9, "int4_gb_s": size / value / 1e9,
                            "bandwidth_share": read / value, "ratio_to_ours": value / own,
                        }
                    )  # fmt: skip
                print(f"{accuracy:6} N={n} K={k} M={m}: memory reads {size / read / 1e9:.2f} GB/s in these turns")
                for name, value in sorted(times.items(), key=lambda item: item[1]):
                    print(
                        f"    {name:18} {value * 1e6:10.1f} us  {2 * m * n * k / value / 1e9:8.1f} GFLOP/s"
                        f"  {size / value / 1e9:6.2f} GB/s of int4 ({read / value:4.0%})  {value / own:6.2f} x qcompile's time"
                    )
    return rows


def shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", action="store_true", help="single layers only")
    parser.add_argument("--models", action="store_true", help="SmolLM2 only")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=layers.SHAPES, help="layers N x K, such as 4096x4096"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=layers.ROWS, help="rows of x")
    parser.add_argument("--threads", type=int, help="processors that everybody may use; all of them without it")
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long each comparison may take")
    parser.add_argument("--write", action="store_true", help=f"write the figures to {RESULTS.name}/cpu.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.threads is not None:  # thread pools, which start later, look at the processors that they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine.describe()}
    print(json.dumps(result["machine"], indent=1))
    if options.layers or not options.models:
        result["layers"] = layer_tables(options.seconds, options.shapes, options.rows)
    if options.models or not options.layers:
        with tempfile.TemporaryDirectory() as folder:
            result["smollm2"] = smollm2.time_models(Path(folder), options.seconds)
        for name, row in result["smollm2"].items():
            print(f"{name:28}" + "  ".join(f"{key} {value:9.2f}" for key, value in row.items()))
    if options.write:
        path = RESULTS / "cpu.json"
        RESULTS.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
