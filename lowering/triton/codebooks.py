"""Entries of codebooks as Triton text: the codes of a lane taken out of its words, and what they name gathered.

Where instructions are NVIDIA's an entry is one load, whose words are operands of tensor cores as they come; elsewhere, and in the
interpreter, it is a load that Triton writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.formats.runs import ROWS, WORDS, Runs
from qcompile.lowering.triton.linear import Compute
from qcompile.lowering.triton.text import DTYPES, dot_operand, interpreted
from qcompile.target import Target

_SETTLED = '''
@triton.jit
def settled(x):
    """x, behind an instruction that keeps Triton from reading it in the order of what follows: it is put in that order first."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
'''


def plain(target: Target) -> bool:
    """Whether the text has no instructions of NVIDIA's in it."""
    return interpreted(target) or target.isa != "ptx"


def words(name: str, loads: int, at: str, rows: int) -> list[str]:
    """The statements for `name`0, `name`1 ... [rows, 4], those of each lane, from pointers `at` [rows, 16] to the first four."""
    lines = []
    for load in range(loads):
        q = [f"{name}{WORDS * load + i}" for i in range(WORDS)]
        lines += [
            f'words = tl.load({at} + {32 * WORDS * load}, eviction_policy="evict_first")',
            f"even, odd = tl.split(tl.reshape(words, [{rows}, 4, 2, 2]))",
            f"{q[0]}, {q[2]} = tl.split(even)",
            f"{q[1]}, {q[3]} = tl.split(odd)",
        ]
    return lines


def code(format: Runs, name: str, book: int, run: int) -> str:
    """The text of a book's code of a lane's `run`, from `words` of that name."""
    width, start = format.widths[book], run * format.total + sum(format.widths[:book])
    word, low = divmod(start, 32)
    high = low + width - 32
    # The shift brings in the sign, which the mask takes out again.
    first = f"({name}{word} >> {low})" if low else f"{name}{word}"
    if high > 0:
        first = f"({first} & {(1 << width - high) - 1} | ({name}{word + 1} << {width - high}))"
    return f"({first} & {(1 << width) - 1})"


class Gathered:
    """How the runs of a weight become `weights`, the right operand of tensor cores, in the dtype `compute`."""

    def __init__(self, format: Runs, compute: Compute, target: Target, entries: str):
        self.format, self.compute, self.target, self.entries = format, compute, target, entries

    def functions(self) -> dict[str, str]:
        """The Triton functions that the statements call, by name."""
        if plain(self.target):
            return {}
        made = {self._entry(book): self._gather(book) for book in range(len(self.format.widths))}
        for name, half in (("low", "w"), ("high", "(w >> 16)")):
            made[f"{name}_{self.format.dtype}"] = (
                f'@triton.jit\ndef {name}_{self.format.dtype}(w):\n    """The {name} half of words."""\n'
                f"    return {half}.to(tl.int16).to({DTYPES[self.format.dtype]}, bitcast=True)"
            )
        return made

    def statements(self, words: str, book: int, piece: int, warps: int) -> list[str]:
        """The statements for `weights`, a book's entries for a piece of `span` inputs, from the `words` of that name.

        It is [span, outputs] in the order of tensor cores: input 16 s + 8 h + 2 c + e of it is the (4 s + 2 h + e)th that lane
        c has of each output, and output 8 (o warps + w) + r is the oth of row r of warp w.
        """
        format, lines = self.format, list[str]()
        outputs, places = format.outputs // ROWS, format.span // 4
        runs = list(range(format.lane))
        if format.axis == "k":
            own = places // format.size  # of an output in a piece
            each = format.lane // outputs
            runs = [output * each + piece * own + i for output in range(outputs) for i in range(own)]
        names = [f"e{book}_{run}" for run in runs]
        if plain(self.target):
            for run, name in zip(runs, names, strict=True):
                at = f"({code(format, words, book, run)} + {format.starts[book]})[:, :, None] * {format.size}"
                entry = f"tl.load({self.entries} + {at} + tl.arange(0, {format.size})[None, None, :]).to(tl.float32)"
                lines.append(f"{name} = {dot_operand(entry, {'compute': self.compute}, self.target)}")
            made = _stacked(names)
            if format.axis == "k":
                shape = f"[{ROWS * warps}, 4, {format.size}, {len(names)}]"
                made = f"tl.permute(tl.reshape({made}, {shape}), (0, 1, 3, 2))"
        else:
            numbers = dict[int, str]()
            for first, (run, name) in enumerate(zip(runs, names, strict=True)):
                parts = [f"{name}_{i}" for i in range(format.size // 2)]
                lines.append(
                    f"{', '.join(parts)} = {self._entry(book)}({code(format, words, book, run)}, {self.entries})"
                )
                for i in range(format.size):
                    place = first * format.size + i if format.axis == "k" else i * places + first
                    numbers[place] = self._number(parts[i // 2], i % 2)
            made = _stacked([numbers[place] for place in range(outputs * places)])
        shape = f"[{warps}, {ROWS}, 4, {outputs}, {places // 4}, 2, 2]"
        made = f"tl.permute(tl.reshape({made}, {shape}), (4, 5, 2, 6, 3, 0, 1))"
        return [*lines, f"weights = tl.reshape({made}, [{format.span}, {warps * format.outputs}])"]

    def _number(self, word: str, half: int) -> str:
        """Half a word in the compute dtype."""
        number = f"{('low', 'high')[half]}_{self.format.dtype}({word})"
        if self.format.dtype == self.compute:
            return number
        return dot_operand(f"{number}.to(tl.float32)", {"compute": self.compute}, self.target)

    def _entry(self, book: int) -> str:
        return f"entry{self.format.size}_{self.format.starts[book]}"

    def _gather(self, book: int) -> str:
        """A function of codes and the pointer to the entries that gives the words of a book's entries."""
        size = self.format.size
        registers, start = [f"${i}" for i in range(size // 2)], 2 * size * self.format.starts[book]
        loads = []
        for first in range(0, len(registers), 4):
            some = registers[first : first + 4]
            at, into = f"[at+{start + 4 * first}]", ", ".join(some)
            loads.append(
                f"ld.global.nc.v{len(some)}.b32 {{{into}}}, {at};"
                if len(some) > 1
                else f"ld.global.nc.b32 {into}, {at};"
            )
        constraints = ",".join([*["=r"] * len(registers), "r", "l"])
        result = f"(tl.int32,) * {len(registers)}" if len(registers) > 1 else "tl.int32"
        body = "\n".join(f"        {load}" for load in loads)
        return f'''@triton.jit
def {self._entry(book)}(code, entries):
    """The words of entries [{start // (2 * size)} + code] of {size} numbers of 16 bits."""
    return tl.inline_asm_elementwise(
        """
        {{
        .reg .b64 at;
        mad.wide.u32 at, ${len(registers)}, {2 * size}, ${len(registers) + 1};
{body}
        }}
        """,
        "{constraints}", [code, entries.to(tl.int64)], dtype={result}, is_pure=True, pack=1,
    )
'''


SETTLED = {"settled": _SETTLED.strip()}
"""What x goes through where it has the compute dtype already: tensor cores take its rows r and r + 8 together, which Triton
would read from shared memory one by one, and move.
"""


def _stacked(names: Sequence[str]) -> str:
    """The text of tensors side by side in new last dimensions of two, counted with the last one fastest."""
    return names[0] if len(names) == 1 else f"tl.join({_stacked(names[::2])}, {_stacked(names[1::2])})"
