"""Tables of names whose classes are imported when they are needed, and what other packages add to them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qcompile.errors import ConfigError, InternalError

GROUP = "qcompile.methods"  # entry points: functions without arguments that call `qcompile.register_method`


class Registry(dict[str, str]):
    """Name -> "module:Class" for one kind of thing (`what`). Names that are not there are looked for in entry points."""

    def __init__(self, what: str, entries: Mapping[str, str]):
        super().__init__(entries)
        self.what, self._added = what, dict[str, type]()

    def add(self, name: str, cls: type) -> None:
        """Adds a class of another package; ConfigError when the name has another owner already. Twice is once."""
        owner = f"{cls.__module__}:{cls.__qualname__}"
        if self.setdefault(name, owner) != owner:
            raise ConfigError(
                f"two {self.what}s have the same name",
                where=repr(name),
                found=f"{self[name]} and {owner}",
                expected="one owner of a name",
                remedy="rename one of them, or uninstall its package",
            )
        self._added[name] = cls

    def has(self, name: Any) -> bool:
        """True for a known name; other packages' entry points are asked when it is not known yet."""
        if isinstance(name, str) and name not in self:
            discover()
        return isinstance(name, str) and name in self

    def load(self, name: str) -> Any:
        """The class of a known name."""
        if name in self._added:
            return self._added[name]
        module, _, attribute = self[name].partition(":")
        found = getattr(import_module(module), attribute)
        known = getattr(found, "kind", getattr(found, "name", name))
        if known != name:
            raise InternalError(f"the table of {self.what}s names the wrong class", found=known, expected=name)
        return found


@functools.cache
def discover() -> None:
    """Calls the entry points of other packages, once; ConfigError that names the one that fails."""
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else "?"
        try:
            point.load()()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                "a method of another package cannot be registered",
                where=f"entry point {point.name!r} of {package}: {point.value}",
                found=f"{type(error).__name__}: {error}",
                expected="a function that calls qcompile.register_method",
                remedy=f"correct or uninstall {package}",
            ) from error
