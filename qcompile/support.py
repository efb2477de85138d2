"""Which weight formats there are, what they cost, and which kernels read them, measured from the registries.

`python -m qcompile.support` prints the table; with `--write README.md` it replaces the one between the file's markers, and
with `--methods docs/methods.md` it writes the page of methods.
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.backend import CpuBackend, CudaBackend
from qcompile.dtypes import DTYPES
from qcompile.format import FORMATS, Format, Packed, format_class
from qcompile.formats.fragments import Fragments
from qcompile.formats.lanes import Lanes, LanesDense
from qcompile.formats.native import Native
from qcompile.formats.runs import Runs
from qcompile.methods.index import METHODS, method
from qcompile.ops import activation_group

START, END = "<!-- formats: python -m qcompile.support --write README.md -->", "<!-- end of formats -->"
N, K = 4096, 4096  # the shape whose bits are counted
ROWS = 128  # what a kernel reads depends on K, not on how many rows there are

# Parameters worth a line of their own; formats that are not named here have one, with their default parameters.
EXAMPLES: dict[str, tuple[dict[str, Any], ...]] = {
    "gptq": tuple({"bits": bits} for bits in (2, 3, 4, 8)),
    "hqq": (*({"bits": bits} for bits in (1, 2, 3, 4, 8)), {"bits": 4, "axis": 0}),
    "bnb4": ({"table": "nf4"}, {"table": "fp4"}, {"table": "nf4", "nested": 256}),
}


@dataclass(frozen=True)
class Row:
    """One format with some parameters. `bits` are stored bits a weight at 4096 x 4096, scales included.

    The reference backend reads every format by its formula.
    `exact` and `int8` name the tier of the CPU kernel at that accuracy: "native" (integer dot products), "lanes" (codes
    in a lane layout, float arithmetic) or "generic" (the format's formula as it is); `reason` says why it is no better.
    `cuda` is the tier of the kernel for few rows there, of a linear that rounds no activations: "lanes" (codes in the order of
    tensor cores), "codebook" or "generic".
    """

    format: str
    parameters: str
    methods: tuple[str, ...]
    bits: float
    exact: str
    int8: str
    cuda: str
    reason: str


def rows() -> list[Row]:
    """Every format that a weight may be stored in, in the order of the registry; layouts of kernels are none of them."""
    users = {name: method(name).formats for name in METHODS}
    found = []
    for kind in FORMATS:
        if not issubclass(format_class(kind), Lanes | LanesDense | Fragments | Native | Runs):
            methods = tuple(name for name, kinds in users.items() if kind in kinds)
            found += [_row(format_class(kind)(**chosen), chosen, methods) for chosen in EXAMPLES.get(kind, ({},))]
    return found


def _row(format: Format, chosen: dict[str, Any], methods: tuple[str, ...]) -> Row:
    storage = {s.name: torch.zeros(s.shape, dtype=DTYPES[s.dtype]) for s in format.stored(ROWS, K)}
    packed = Packed(format, storage, ROWS, K)
    layout = CpuBackend().layout(packed)
    read = layout.packed.format
    exact = "lanes" if isinstance(read, Lanes | LanesDense) else "generic"
    problem = layout.reason or _int8_problem(read)
    parameters = ", ".join(f"{name} {value}" for name, value in chosen.items())
    int8 = exact if problem else "native"
    return Row(format.kind, parameters, methods, format.bits_per_weight(N, K), exact, int8, _cuda(packed), problem)


def _cuda(packed: Packed) -> str:
    read = CudaBackend().layout(packed).packed.format
    if isinstance(read, Fragments):
        return "lanes"
    return "codebook" if isinstance(read, Runs) else "generic"


def _int8_problem(read: Format) -> str:
    """Why the integer kernels do not take a layout; empty when they do."""
    from qcompile.lowering.mlir.linear_int8 import Scheme

    if not isinstance(read, Lanes):
        return "the weight is not quantized"
    if read.code != "int":
        return "its codes are floats"
    return Scheme(read, K, activation_group(read.group, K)).problem()


def markdown(table: list[Row]) -> str:
    """The rows as a Markdown table, each method a link to its source."""
    lines = [
        "| format | method | bits a weight | reference | cpu exact | cpu int8 | cuda |",
        "| --- | --- | ---: | --- | --- | --- | --- |",
    ]
    for row in table:
        name = f"{row.format} ({row.parameters})" if row.parameters else row.format
        users = ", ".join(f"[{user}]" for user in row.methods)
        cells = (name, users or "any", f"{row.bits:.2f}", "yes", row.exact, row.int8, row.cuda)
        lines.append(f"| {' | '.join(cells)} |")
    used = {name for row in table for name in row.methods}
    return "\n".join([*lines, "", *(f"[{name}]: {method(name).source}" for name in METHODS if name in used)])


def with_table(text: str) -> str:
    """`text` with the table of today between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"the file has no line {START!r} followed by {END!r}")
    return f"{before}{START}\n{markdown(rows())}\n{END}{after}"


def methods_page() -> str:
    """What every method is, from its own words: the page docs/methods.md."""
    lines = [
        "# Methods",
        "",
        "Every `quant_method` of transformers, from the docstrings of `qcompile/methods/`: `python -m qcompile.support --methods",
        "docs/methods.md`. Weights are those of the original package bit for bit, and activations are computed in float32, where",
        "nothing else is said. [conformance.md](conformance.md) has what was measured.",
    ]  # fmt: skip
    for name in METHODS:
        found = method(name)
        what = inspect.cleandoc(inspect.getmodule(type(found)).__doc__ or "").splitlines()[0]
        _, _, rest = inspect.cleandoc(type(found).__doc__ or "").partition("\n")
        steering = found.Config.steering
        lines += ["", f"## {name}", "", what, "", f"Formats: {', '.join(found.formats)}. Source: {found.source}."]
        lines += ["", rest.strip()] if rest.strip() else []
        if steering:
            lines += ["", "Fields that are accepted and have no effect here:", ""]
            for note in dict.fromkeys(steering.values()):
                fields = ", ".join(f"`{field}`" for field, said in steering.items() if said == note)
                lines.append(f"- {fields}: {note}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table between this file's markers")
    parser.add_argument("--methods", type=Path, metavar="FILE", help="write the page of methods")
    options = parser.parse_args()
    if options.methods is not None:
        options.methods.write_text(methods_page())
    if options.write is not None:
        options.write.write_text(with_table(options.write.read_text()))
    if options.methods is None and options.write is None:
        print(markdown(rows()))


if __name__ == "__main__":
    main()
