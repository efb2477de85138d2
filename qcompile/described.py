"""Things that JSON describes: frozen dataclasses that a closed table finds by their kind."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from qcompile.errors import ArtifactError, near
from qcompile.registry import Registry


class Described:
    """A frozen dataclass whose fields are ints, floats, bools, strings, None and tuples of them, so that it is JSON."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """{"kind": ..., parameter: value}; tuples become lists."""
        values = {f.name: getattr(self, f.name) for f in fields(typing.cast(Any, self))}
        return {"kind": self.kind} | {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def class_of(table: Registry, kind: Any) -> Any:
    """The class that `table` has for `kind`; ArtifactError for an unknown one."""
    if not table.has(kind):
        raise ArtifactError(
            f"unknown {table.what}{near(str(kind), table)}", found=repr(kind), expected=", ".join(table)
        )
    return table.load(kind)


def from_json(table: Registry, data: Mapping[str, Any]) -> Any:
    """What `to_json` described; ArtifactError for an unknown kind, or an unknown or mistyped parameter."""
    cls, what = class_of(table, data.get("kind", "")), table.what
    hints = _hints(cls)
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "kind":
            continue
        if name not in known:
            hint = near(name, known)
            raise ArtifactError(f"{what} '{cls.kind}' has no parameter '{name}'{hint}", expected=", ".join(known))
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[name]):
            expected = str(known[name].type)
            raise ArtifactError(f"{what} '{cls.kind}' has a wrong '{name}'", found=repr(value), expected=expected)
        values[name] = value
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
