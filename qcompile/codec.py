"""Dataclasses to JSON and back, strictly: type hints are the schema, and what they do not allow is an ArtifactError."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qcompile.errors import ArtifactError, near

MAX_INTEGER = 2**62
Decoder = Callable[[Any], Any]


class _Bad(Exception):
    """A value that does not fit, with the path to it, innermost key first."""

    def __init__(self, found: object, expected: str, summary: str = "a value has the wrong type"):
        self.found, self.expected, self.summary, self.path = found, expected, summary, list[str]()


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        keys = [key for key, _ in items]
        raise _Bad(next(key for key in keys if keys.count(key) > 1), "each key once", "a key occurs twice")
    return result


def _constant(text: str) -> Any:
    raise _Bad(text, "finite numbers", "a number is not JSON")


def _float(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _constant(text)


def parse(data: bytes, where: str) -> Any:
    """The JSON value in `data` (UTF-8); ArtifactError for anything but plain JSON with distinct keys."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
    except _Bad as bad:
        raise ArtifactError(bad.summary, where=where, found=_show(bad.found), expected=bad.expected) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError("not a JSON file", where=where, found=str(error)[:200] or type(error).__name__) from None


def render(value: Any) -> bytes:
    """`value` as JSON bytes that depend on it alone: sorted keys, one line, a newline at the end."""
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True) + "\n"
    ).encode()


def encode(value: Any) -> Any:
    """A dataclass tree as JSON values; fields that equal their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if default is dataclasses.MISSING or item != default or type(item) is not type(default):
                result[field.name] = encode(item)
        return result
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the dataclass (or type hint) `kind`; ArtifactError saying where it does not fit."""
    try:
        return _decoder(kind)(value)
    except _Bad as bad:
        path = ".".join(reversed(bad.path))
        place = f"{where}: {path}" if path else where
        raise ArtifactError(bad.summary, where=place, found=_show(bad.found), expected=bad.expected) from None


def _exact(kind: type) -> Decoder:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _Bad(value, {str: "a string", int: "an integer", bool: "true or false", float: "a number"}[kind])
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise _Bad(value, "an integer of at most 62 bits", "a number is too large")
        return value

    return check


def _number(value: Any) -> float:
    if type(value) is float or (type(value) is int and abs(value) <= MAX_INTEGER):
        return float(value)
    raise _Bad(value, "a number")


def _literal(allowed: tuple[Any, ...]) -> Decoder:
    def check(value: Any) -> Any:
        if type(value) is not str or value not in allowed:
            raise _Bad(value, " | ".join(map(repr, allowed)), "a value is not known")
        return value

    return check


def _step(key: str, decoder: Decoder, value: Any) -> Any:
    try:
        return decoder(value)
    except _Bad as bad:
        bad.path.append(key)
        raise


def _array(item: Decoder) -> Decoder:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise _Bad(value, "a list")
        return tuple([_step(str(i), item, each) for i, each in enumerate(value)])

    return check


def _record(items: tuple[Decoder, ...]) -> Decoder:
    def check(value: Any) -> Any:
        if type(value) is not list or len(value) != len(items):
            raise _Bad(value, f"a list of {len(items)}")
        return tuple(_step(str(i), item, each) for i, (item, each) in enumerate(zip(items, value, strict=True)))

    return check


def _mapping(item: Decoder) -> Decoder:
    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise _Bad(value, "an object")
        return {key: _step(key, item, each) for key, each in value.items()}

    return check


def _union(kinds: tuple[Any, ...]) -> Decoder:
    optional = type(None) in kinds
    members = [_decoder(kind) for kind in kinds if kind is not type(None)]

    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        if len(members) == 1:
            return members[0](value)
        for member in members:
            try:
                return member(value)
            except _Bad:
                continue
        raise _Bad(value, " | ".join(getattr(kind, "__name__", str(kind)) for kind in kinds))

    return check


def _dataclass(kind: Any) -> Decoder:
    hints = get_type_hints(kind)
    fields = {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(kind)}
    missing = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]

    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise _Bad(value, f"an object ({kind.__name__})")
        for name in needed:
            if name not in value:
                raise _Bad("nothing", f"a field {name!r}", "a field is missing")
        decoded = {}
        for name, each in value.items():
            if name not in fields:
                hint = ", ".join(sorted(fields)) + near(name, fields)
                raise _Bad(name, hint, f"a field of {kind.__name__} is not known")
            decoded[name] = _step(name, fields[name], each)
        return kind(**decoded)

    return check


@functools.cache
def _decoder(kind: Any) -> Decoder:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if kind is float:
        return _number
    if kind in (str, int, bool):
        return _exact(kind)
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is tuple:
        return _array(_decoder(arguments[0])) if arguments[-1] is Ellipsis else _record(tuple(map(_decoder, arguments)))
    if origin is list:
        items = _array(_decoder(arguments[0]))
        return lambda value: list(items(value))
    if origin is dict:
        return _mapping(_decoder(arguments[1]))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"{kind!r} cannot be a field of an artifact")
