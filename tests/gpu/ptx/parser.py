"""PTX text as instructions: registers are numbered, labels are resolved, and everything knows the line it was on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

CARRY = 0  # the slot of the flag that mad.cc sets and madc reads


class Fault(Exception):
    """What a GPU would not do, or not do reliably; or an instruction that is not known here."""


@dataclass(frozen=True)
class Register:
    """`kind` is "pred", or "b" and the number of its bits."""

    slot: int
    kind: str


@dataclass(frozen=True)
class Immediate:
    """A constant: its bits, as wide as an instruction takes them."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A variable, a label, or a register of the machine such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


Operand = Register | Immediate | Symbol | Address | tuple["Operand | None", ...]


@dataclass(frozen=True)
class Instruction:
    """`name` is split at its dots; `guard` is the predicate in front, and whether it must be false."""

    line: int
    text: str
    guard: tuple[Register, bool] | None
    name: tuple[str, ...]
    operands: tuple[Operand | None, ...]

    def fault(self, problem: str) -> Fault:
        return Fault(f"line {self.line}: {self.text}\n  {problem}")


@dataclass
class Function:
    """An entry: its parameters' names and bytes, its instructions, and where its labels are among them."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=lambda: ["pred"])  # of registers, by slot
    local: dict[str, int] = field(default_factory=dict)  # where variables of a thread lie
    local_bytes: int = 0
    threads: int = 0  # of a block, where the text says so


@dataclass
class Module:
    """A file: its entries, its constants' bytes, and how much shared memory its variables take and where they lie."""

    entries: dict[str, Function] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0


_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}
_VARIABLE = re.compile(r"\.align (\d+) \.[bsuf](\d+) ([\w$%]+)(?:\[(\d*)\])?(?: = \{(.*)\})?$")
_PARAMETER = re.compile(r"\.param \.[a-z](\d+) (?:.*\s)?([\w$]+)$")


def parse(text: str) -> Module:
    """A module as Triton writes it; Fault for what it never writes."""
    module, function, scopes = Module(), None, _Scopes()
    for line, statement in _statements(text):
        if entry := re.match(r"(?:\.visible )?\.entry ([\w$]+)\s*\((.*)\)(.*)$", statement):
            function = Function(entry[1])
            for each in filter(None, (part.strip() for part in entry[2].split(","))):
                found = _PARAMETER.match(each)
                if found is None:
                    raise Fault(f"line {line}: {each}\n  a parameter that is not a number")
                function.parameters[found[2]] = _WIDTHS[found[1]]
            if threads := re.search(r"\.reqntid (\d+)", entry[3]):
                function.threads = int(threads[1])
            module.entries[function.name] = function
        elif statement.startswith((".version", ".target", ".address_size", ".pragma")):
            continue
        elif function is None or statement.startswith(".shared"):
            _variable(module, line, statement)
        else:
            _inside(function, scopes, line, statement)
    return module


def parse_lines(lines: list[str], inputs: dict[str, str]) -> tuple[Function, dict[str, Register]]:
    """Instructions without a function around them, which read registers `inputs` (name to kind) and write others of 32 bits."""
    function, scopes = Function("inline"), _Scopes()
    for name, kind in inputs.items():
        scopes.inner[-1][name] = kind
    for line, text in enumerate(lines, 1):
        for _, statement in _statements(text):
            scopes.inner[0] |= {name: "b32" for name in re.findall(r"\$\d+", statement) if name not in scopes.inner[0]}
            _inside(function, scopes, line, statement)
    return function, {name: scopes.register(function, name) for name in scopes.inner[0]}


def _statements(text: str) -> list[tuple[int, str]]:
    """What semicolons, labels and the braces of blocks end, with its line; comments are left out."""
    out: list[tuple[int, str]] = []
    held, start = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        for piece in re.findall(r"[^;{}:]+|::|[;{}:]", line.split("//")[0]):
            fresh = not held.strip()
            if fresh:
                start = number
            entry = ".entry" in held
            if (piece == "}" and fresh) or (piece == "{" and (fresh or entry)):
                out += [(start, " ".join(held.split()))] * entry + [(number, piece)]
                held = ""
            elif piece == ";" or (piece == ":" and re.fullmatch(r"\s*[\w$]+", held)):
                out.append((start, " ".join(held.split()) + piece.strip(";")))
                held = ""
            elif piece.startswith((".version", ".target", ".address_size")) and fresh:
                out.append((number, piece.strip()))
            else:
                held += piece
        held += " " * bool(held)
    return [(line, statement) for line, statement in out if statement]


class _Scopes:
    """The registers that are declared where the text is: names, and prefixes of numbered names, with their kinds."""

    def __init__(self) -> None:
        self.inner: list[dict[str, str]] = [{}]
        self.numbers: list[int] = [0]
        self.opened = 0
        self.slots: dict[tuple[int, str], Register] = {}

    def open(self) -> None:
        self.opened += 1
        self.inner.append({})
        self.numbers.append(self.opened)

    def close(self) -> None:
        self.inner.pop()
        self.numbers.pop()

    def declare(self, kind: str, names: str) -> None:
        for name in names.split(","):
            self.inner[-1][re.sub(r"<\d+>", "#", name.strip())] = kind

    def register(self, function: Function, name: str) -> Register | None:
        """The register called `name`, of the innermost block that declares it; None where none does."""
        for names, number in zip(reversed(self.inner), reversed(self.numbers), strict=True):
            kind = names.get(name) or names.get(re.sub(r"\d+$", "#", name))
            if kind is not None:
                if (number, name) not in self.slots:
                    self.slots[number, name] = Register(len(function.kinds), kind)
                    function.kinds.append(kind)
                return self.slots[number, name]
        return None


def _variable(module: Module, line: int, statement: str) -> None:
    found = _VARIABLE.search(statement)
    if found is None:
        raise Fault(f"line {line}: {statement}\n  a declaration that is not known")
    size = _WIDTHS[found[2]] * int(found[4] or 0)
    if ".shared" in statement:
        module.shared[found[3]] = at = _aligned(module.shared_bytes, int(found[1]))
        module.shared_bytes = at + size
    else:
        values = [int(each, 0) for each in (found[5] or "").split(",") if each.strip()]
        module.constants[found[3]] = b"".join(each.to_bytes(_WIDTHS[found[2]], "little") for each in values).ljust(
            size, b"\0"
        )


def _aligned(at: int, to: int) -> int:
    return -(-at // to) * to


def _inside(function: Function, scopes: _Scopes, line: int, statement: str) -> None:
    if statement == "{":
        scopes.open()
    elif statement == "}":
        scopes.close()
    elif declared := re.match(r"\.reg \.([a-z]+)(\d*) (.*)", statement):
        scopes.declare("pred" if declared[1] == "pred" else f"b{declared[2]}", declared[3])
    elif statement.startswith(".local"):
        found = _VARIABLE.search(statement)
        assert found is not None
        function.local[found[3]] = at = _aligned(function.local_bytes, int(found[1]))
        function.local_bytes = at + _WIDTHS[found[2]] * int(found[4])
    elif statement.endswith(":"):
        function.labels[statement[:-1]] = len(function.instructions)
    else:
        function.instructions.append(_instruction(function, scopes, line, statement))


def _instruction(function: Function, scopes: _Scopes, line: int, statement: str) -> Instruction:
    found = re.match(r"(?:@(!?)\s*(\S+)\s+)?(\S+)\s*(.*)$", statement)
    assert found is not None
    guard = None
    if found[2]:
        register = scopes.register(function, found[2])
        assert register is not None, statement
        guard = (register, found[1] == "!")
    operands = tuple(_operand(function, scopes, part) for part in _parts(found[4]))
    return Instruction(line, statement, guard, tuple(found[3].split(".")), operands)


def _parts(text: str) -> list[str]:
    """What commas outside of braces and brackets part."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def _operand(function: Function, scopes: _Scopes, text: str) -> Operand | None:
    if text == "_":
        return None
    if text.startswith("{"):
        return tuple(_operand(function, scopes, part) for part in _parts(text.strip("{} ")))
    if "|" in text:
        return tuple(_operand(function, scopes, part) for part in text.split("|"))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        found = _operand(function, scopes, base.strip())
        assert found is not None
        return Address(found, int(offset.strip() or "0", 0))
    if re.match(r"0[fFdD][0-9A-Fa-f]{8}", text):
        return Immediate(int(text[2:], 16))
    if re.match(r"-?\d", text):
        return Immediate(int(text.rstrip("U"), 0) if "." not in text else 0)
    return scopes.register(function, text) or Symbol(text)
