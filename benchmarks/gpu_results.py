"""The figures of a run on a GPU, written to a file after each piece of work, so that a run that is cut loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Lost(Exception):
    """This process cannot use the GPU any more."""


def reason(error: Exception) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def nothing() -> None:
    """A device that no error harms."""


class Results:
    """Rows by section, each `of` a piece of work; "ok" is false in one that says what went wrong.

    They are kept in the file `path`, where what other runs found in other sections stays. `alive` raises where the device
    cannot be used any more. With `resume`, work that has rows in the file is not done again.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False, alive: Callable[[], object] = nothing):
        self.path, self.resume, self.alive = path, resume, alive
        self.found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def start(self, section: str) -> None:
        """Forgets what an earlier run found in a section, unless this one goes on with it."""
        if not self.resume or section not in self.found:
            self.found[section] = []

    def rows(self, section: str) -> list[Row]:
        rows: list[Row] = self.found.get(section, [])
        return rows

    def attempt(self, section: str, of: str, work: Callable[[], Iterable[Row]], show: Callable[[Row], str]) -> bool:
        """Adds the rows that `work` makes, printed as `show` says; whether it went to its end.

        An error is a row, and the next work goes on; Lost where no other can.
        """
        rows = self.found[section]
        if any(row["of"] == of for row in rows):
            return True
        made: list[Row] = []
        try:
            for row in work():
                made.append({"of": of} | row)
                print(show(made[-1]), flush=True)
        except Exception as error:  # one kernel that fails must not hide the others
            made.append({"of": of, "ok": False, "failed": reason(error)})
            print(f"FAIL {of}: {reason(error)}", flush=True)
        rows += made
        self._save()
        if "failed" not in made[-1]:
            return True
        try:
            self.alive()
        except Exception as error:
            raise Lost(reason(error)) from error
        return False

    def _save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def failed(self, section: str) -> list[Row]:
        """The rows of a section that say what went wrong."""
        return [row for row in self.rows(section) if not row.get("ok", True)]
