"""Tables of schedules that were measured, in files: the one that ships, and a user's own, which `qcompile tune` writes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qcompile import codec
from qcompile.errors import ArtifactError, ConfigError
from qcompile.lowering.triton.devices import DEVICES
from qcompile.lowering.triton.tiles import KINDS, Problem, Schedule, illegal

SCHEMA = 1
MOST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Entry:
    """The schedule of a problem on GPUs of one capability, and what it took on `device`, if it was measured."""

    capability: int
    problem: Problem
    schedule: Schedule
    microseconds: float = 0.0
    device: str = ""


@dataclass(frozen=True)
class _File:
    schema: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """Schedules by capability and problem."""

    entries: dict[tuple[int, Problem], Entry] = field(default_factory=dict)

    def find(self, problem: Problem, capability: int) -> Schedule | None:
        """The schedule of exactly this problem; None where the table has none."""
        found = self.entries.get((capability, problem))
        return None if found is None else found.schedule

    def over(self, other: Table) -> Table:
        """This table, and what `other` has beside it."""
        return Table.of((other.entries | self.entries).values())

    @staticmethod
    def of(entries: Iterable[Entry]) -> Table:
        return Table({(each.capability, each.problem): each for each in entries})


def parse(data: bytes, where: str) -> Table:
    """The table in `data`; ConfigError for anything but a table whose schedules can be made."""
    try:
        file: _File = codec.decode(_File, codec.parse(data, where), where)
    except ArtifactError as error:
        raise ConfigError(error.summary, where=error.where, found=error.found, expected=error.expected) from None
    if file.schema != SCHEMA:
        raise ConfigError("a table of schedules has another schema", where=where, found=file.schema, expected=SCHEMA)
    seen = set[tuple[int, Problem]]()
    for number, entry in enumerate(file.entries):
        problem = _problem(entry) or ("the same problem twice" if (entry.capability, entry.problem) in seen else "")
        if problem:
            raise ConfigError("a schedule cannot be used", where=f"{where}: entries.{number}", found=problem)
        seen.add((entry.capability, entry.problem))
    return Table.of(file.entries)


def _problem(entry: Entry) -> str:
    """Why no kernel can be made with the entry; empty when one can."""
    problem, schedule = entry.problem, entry.schedule
    if entry.capability not in DEVICES:
        return f"capability {entry.capability}; known are {', '.join(map(str, DEVICES))}"
    if problem.kind not in KINDS:
        return f"kind {problem.kind!r}; known are {', '.join(KINDS)}"
    counts = (problem.n, problem.k, problem.m, problem.bits, problem.split_k, problem.streams, *vars(schedule).values())
    if min(counts) < 1 or problem.group < 0:
        return "a number below 1"
    kind = KINDS[problem.kind]
    for name, allowed in (("block_n", kind.block_n), ("block_k", kind.block_k), ("warps", kind.warps)):
        if getattr(schedule, name) not in allowed:
            return f"{name} {getattr(schedule, name)}; a {problem.kind} kernel takes {', '.join(map(str, allowed))}"
    rows = schedule.block_m
    if rows & (rows - 1) or not kind.least_m <= rows <= kind.most_m or schedule.stages > 8:
        return f"block_m {rows}, stages {schedule.stages}; powers of two from {kind.least_m} to {kind.most_m}, at most 8 stages"
    return illegal(problem, schedule, DEVICES[entry.capability])


def render(table: Table) -> bytes:
    """The table as a file, which depends on nothing but its entries."""
    entries = sorted(table.entries.values(), key=lambda each: (each.capability, *map(str, vars(each.problem).values())))
    lines = ",\n".join("  " + codec.render(codec.encode(each)).decode().strip() for each in entries)
    return f'{{"schema": {SCHEMA}, "entries": [\n{lines}\n]}}\n'.encode()


def read(path: str | os.PathLike[str]) -> Table:
    """The table in a file; ConfigError if there is none, or it is no table."""
    place = Path(path)
    try:
        if place.stat().st_size > MOST_BYTES:
            raise ConfigError(
                "a table of schedules is too large", where=str(place), expected=f"{MOST_BYTES} bytes at most"
            )
        data = place.read_bytes()
    except OSError as error:
        raise ConfigError("a table of schedules cannot be read", where=str(place), found=str(error)) from None
    return parse(data, str(place))


def write(path: Path, table: Table) -> None:
    """Puts `table` into a file, over what that has; ConfigError where the file is there and is no table."""
    known = read(path) if path.exists() else Table()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(table.over(known)))


def user_file(folder: Path) -> Path:
    """Where a user's own table lies in the folder of qcompile's caches."""
    return folder / "schedules.json"


def user(folder: Path) -> Table:
    """The user's own table; an empty one where there is none."""
    place = user_file(folder)
    return read(place) if place.exists() else Table()


@functools.cache
def shipped() -> Table:
    """The table that comes with this package."""
    return read(Path(__file__).with_name("schedules.json"))
