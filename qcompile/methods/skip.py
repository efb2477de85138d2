"""Which modules a method leaves dense: the name patterns and defaults of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

from qcompile.errors import ConfigError

if TYPE_CHECKING:
    from qcompile.program import Module

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def matches(pattern: str, path: str) -> bool:
    """True when a pattern of `modules_to_not_convert` names the module `path`.

    A pattern is a regular expression that reaches from the start of the path to the end of one of its parts, or a plain
    ending of the path (which need not begin at a part).

    >>> matches("model.layers.1", "model.layers.1.mlp"), matches("model.layers.1", "model.layers.11.mlp")
    (True, False)
    >>> matches("k_proj", "model.layers.0.self_attn.k_proj")
    True
    """
    return re.match(rf"(?:{pattern}){_BOUNDARY}", path) is not None or path.endswith(pattern)


def defaults(modules: Mapping[str, Module]) -> dict[str, str]:
    """The patterns that transformers skips by default, each with its reason.

    They are the output embedding, every module with a tied weight, the module of the model's last parameter (when that
    is its weight) and the modules that the architecture keeps in float32.
    """
    found: dict[str, str] = {}
    for path, module in modules.items():
        if module.output_embedding:
            found[path] = "it is the output embedding"
        elif module.tied:
            found[path] = f"its weight is tied to {', '.join(module.tied)}"
        elif module.last_parameter:
            found[path] = "it holds the model's last parameter"
    return found


def dense(
    module: Module,
    modules: Mapping[str, Module],
    field: str,
    patterns: Sequence[str] | None,
    *,
    add_defaults: bool = False,
    kinds: Sequence[str] = ("Linear",),
) -> str | None:
    """Why a method that converts `kinds` leaves `module` dense, or None when it converts it.

    `patterns` is the value of the config's `field`: a list replaces the defaults unless `add_defaults`.
    """
    if module.kind not in kinds:
        return f"{module.kind} is not converted by the method (only {' and '.join(kinds)})"
    for pattern in patterns or ():
        if matches(pattern, module.path):
            return f"{field} has {pattern!r}"
    if patterns is None or add_defaults:
        for pattern, reason in defaults(modules).items():
            if matches(pattern, module.path):
                return f"{reason}, and such modules stay dense by default"
    return "the architecture keeps it in float32" if module.keep_f32 else None


def ends(pattern: str, path: str) -> bool:
    """True when `path` ends with the plain text `pattern`."""
    return path.endswith(pattern)


def check(
    field: str, patterns: Iterable[str], paths: Iterable[str], method: str, rule: Callable[[str, str], bool] = matches
) -> None:
    """Raise ConfigError when a pattern of the config's `field` is no regular expression or, by `rule`, matches none."""
    _check(field, tuple(patterns), tuple(paths), method, rule)


@lru_cache(maxsize=32)  # methods ask again for every module
def _check(
    field: str, patterns: tuple[str, ...], paths: tuple[str, ...], method: str, rule: Callable[[str, str], bool]
) -> None:
    for pattern in patterns:
        try:
            if rule is matches:
                re.compile(pattern)
            hit = any(rule(pattern, path) for path in paths)
        except re.error as error:
            raise ConfigError(
                f"the {method} config has a pattern that is not a regular expression",
                where=f"field {field!r}",
                found=f"{pattern!r} ({error})",
                expected="a module name or a regular expression",
            ) from None
        if not hit:
            known = sorted(
                {*paths, *(path.rsplit(".", 1)[-1] for path in paths if rule(path.rsplit(".", 1)[-1], path))}
            )
            close = get_close_matches(pattern, known, n=3) or [name for name in known if pattern in name][:3]
            raise ConfigError(
                f"the {method} config has a pattern that matches no module",
                where=f"field {field!r}",
                found=repr(pattern),
                expected=f"one of {len(paths)} modules with a weight"
                + (f", such as {', '.join(close)}" if close else ""),
                remedy="correct the pattern, or take it out",
            )
