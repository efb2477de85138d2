"""Entries of codebooks as Triton text: the codes of a lane taken out of its words, and what they name gathered.

Entries of two numbers are words in shared memory. Larger ones are gathered from memory: where instructions are NVIDIA's, by one
load each, whose words are operands of tensor cores as they come; elsewhere, and in the interpreter, by loads that Triton writes.
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
    """x, behind an instruction that Triton does not look through when it orders the operands of a product."""
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
    """How the runs of a weight become `weights`, the right operand of tensor cores, in the dtype `compute`.

    `entries` names the pointer to them; `name` begins the names of what is used in several statements.
    """

    def __init__(self, format: Runs, compute: Compute, target: Target, entries: str, name: str):
        self.format, self.compute, self.target, self.entries, self.name = format, compute, target, entries, name

    @property
    def pairs(self) -> bool:
        """Whether entries are single words, which Triton looks up in shared memory."""
        return self.format.size == 2

    def functions(self) -> dict[str, str]:
        """The Triton functions that the statements call, by name."""
        made = {} if self.pairs else {self._named(book): self._gather(book) for book in range(len(self.format.widths))}
        for name, half in (("low", "w"), ("high", "(w >> 16)")):
            made[f"{name}_{self.format.dtype}"] = (
                f'@triton.jit\ndef {name}_{self.format.dtype}(w):\n    """The {name} half of words."""\n'
                f"    return {half}.to(tl.int16).to({DTYPES[self.format.dtype]}, bitcast=True)"
            )
        return made

    def once(self) -> list[str]:
        """The statements in front of the loop."""
        if not self.pairs:
            return []
        pointer = f"{self.entries}.to(tl.pointer_type(tl.int32))"
        books = zip(self.format.starts, self.format.widths, strict=True)
        return [
            f"{self.name}{book} = tl.load({pointer} + {start} + tl.arange(0, {1 << width}))"
            for book, (start, width) in enumerate(books)
        ]

    def statements(self, words: str, book: int, piece: int, warps: int) -> list[str]:
        """The statements for `weights`, a book's entries for a piece of `span` inputs, from the `words` of that name.

        It is [span, outputs] in the order of tensor cores: input 16 s + 8 h + 2 c + e of it is the (4 s + 2 h + e)th that lane
        c has of each output, and output 8 (o warps + w) + r is the oth of row r of warp w.
        """
        format = self.format
        outputs, places = format.outputs // ROWS, format.span // 4
        runs = list(range(format.lane))
        if format.axis == "k":
            own, each = places // format.size, format.lane // outputs  # of an output, in a piece and in all
            runs = [output * each + piece * own + i for output in range(outputs) for i in range(own)]
        codes = [code(format, words, book, run) for run in runs]
        if self.pairs:
            lines, made = self._looked_up(book, codes, ROWS * warps)
        elif plain(self.target):
            lines, made = self._loaded(book, codes, ROWS * warps)
        else:
            lines, made = self._gathered(book, codes)
        shape = f"[{warps}, {ROWS}, 4, {outputs}, {places // 4}, 2, 2]"
        made = f"tl.permute(tl.reshape({made}, {shape}), (4, 5, 2, 6, 3, 0, 1))"
        return [*lines, f"weights = tl.reshape({made}, [{format.span}, {warps * format.outputs}])"]

    # -- the numbers of a lane [rows, 4, those of its first output, those of its second ...], and what they need first --

    def _looked_up(self, book: int, codes: Sequence[str], rows: int) -> tuple[list[str], str]:
        lines = [f"index = tl.reshape({_stacked(codes)}, [{rows * 4 * len(codes)}])"]
        lines.append(f"found = tl.reshape(tl.gather({self.name}{book}, index, 0), [{rows}, 4, {len(codes)}])")
        return lines, f"tl.join({self._number('found', 0)}, {self._number('found', 1)})"

    def _loaded(self, book: int, codes: Sequence[str], rows: int) -> tuple[list[str], str]:
        size, lines, names = self.format.size, list[str](), [f"entry{i}" for i in range(len(codes))]
        for name, number in zip(names, codes, strict=True):
            at = f"({number} + {self.format.starts[book]})[:, :, None] * {size} + tl.arange(0, {size})[None, None, :]"
            entry = f"tl.load({self.entries} + {at}).to(tl.float32)"
            lines.append(f"{name} = {dot_operand(entry, {'compute': self.compute}, self.target)}")
        made = _stacked(names)
        if self.format.axis == "k":
            made = f"tl.permute(tl.reshape({made}, [{rows}, 4, {size}, {len(codes)}]), (0, 1, 3, 2))"
        return lines, made

    def _gathered(self, book: int, codes: Sequence[str]) -> tuple[list[str], str]:
        size, lines, words = self.format.size, list[str](), list[list[str]]()
        for i, number in enumerate(codes):
            words.append([f"entry{i}_{j}" for j in range(size // 2)])
            lines.append(f"{', '.join(words[-1])} = {self._named(book)}({number}, {self.entries})")
        numbers = [[self._number(word, half) for word in entry for half in (0, 1)] for entry in words]
        across = numbers if self.format.axis == "k" else zip(*numbers, strict=True)
        return lines, _stacked([number for some in across for number in some])

    def _number(self, word: str, half: int) -> str:
        """Half a word in the compute dtype."""
        number = f"{('low', 'high')[half]}_{self.format.dtype}({word})"
        if self.format.dtype == self.compute and not interpreted(self.target):
            return number
        return dot_operand(f"{number}.to(tl.float32)", {"compute": self.compute}, self.target)

    def _named(self, book: int) -> str:
        return f"gather{self.format.size}_{self.format.starts[book]}"

    def _gather(self, book: int) -> str:
        """A function of codes and the pointer to the entries that gives the words of a book's entries."""
        size = self.format.size
        registers, start, loads = [f"${i}" for i in range(size // 2)], 2 * size * self.format.starts[book], []
        for first in range(0, len(registers), 4):
            some = registers[first : first + 4]
            loads.append(f"ld.global.nc.v{len(some)}.b32 {{{', '.join(some)}}}, [at+{start + 4 * first}];")
        constraints = ",".join([*["=r"] * len(registers), "r", "l"])
        body = "\n".join(f"        {load}" for load in loads)
        return f'''@triton.jit
def {self._named(book)}(code, entries):
    """The words of entries [{start // (2 * size)} + code] of {size} numbers of 16 bits."""
    return tl.inline_asm_elementwise(
        """
        {{
        .reg .b64 at;
        mad.wide.u32 at, ${len(registers)}, {2 * size}, ${len(registers) + 1};
{body}
        }}
        """,
        "{constraints}", [code, entries.to(tl.int64)], dtype=(tl.int32,) * {len(registers)}, is_pure=True, pack=1,
    )
'''


SETTLED = {"settled": _SETTLED.strip()}
"""What operands go through. x, where it has the compute dtype already: tensor cores take its rows r and r + 8 together, which
Triton would read from shared memory one by one, and move. Weights: for operands that are joined, Triton 3.6 takes another order.
"""


def _stacked(names: Sequence[str]) -> str:
    """The text of tensors side by side in new last dimensions of two, counted with the last one fastest."""
    return names[0] if len(names) == 1 else f"tl.join({_stacked(names[::2])}, {_stacked(names[1::2])})"
