"""Dimensions that are known only when a model runs: integer expressions over named sizes, as text.

The grammar is integers, names, `+ - * // %` and parentheses, nothing else: text from an artifact is parsed here and
never given to Python. `Dim` is either an int or such a text.

>>> evaluate("2*(b + 1)//3", {"b": 4})
3
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qcompile.errors import ArtifactError

Dim = int | str
_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|(//|[-+*%()]))")
MAX_LENGTH, MAX_DEPTH = 4096, 64


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.rstrip()
    if len(text) > MAX_LENGTH:
        raise ArtifactError("a dimension expression is too long", found=len(text), expected=f"at most {MAX_LENGTH}")
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ArtifactError(
                "not a dimension expression", found=repr(text), expected="integers, names, + - * // % ( )"
            )
        tokens.append(match.group().strip())
        at = match.end()
    return tokens


class _Parser:
    def __init__(self, text: str, sizes: Mapping[str, int]):
        self.text, self.sizes, self.tokens, self.at, self.depth = text, sizes, _tokens(text), 0, 0

    def fail(self) -> ArtifactError:
        return ArtifactError(
            "not a dimension expression", found=repr(self.text), expected="integers, names, + - * // % ( )"
        )

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def sum(self) -> int:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> int:
        value = self.atom()
        while self.peek() in ("*", "//", "%"):
            op, right = self.take(), self.atom()
            if op == "*":
                value *= right
            elif right == 0:
                raise ArtifactError("a dimension expression divides by zero", found=repr(self.text))
            else:
                value = value // right if op == "//" else value % right
        return value

    def atom(self) -> int:
        token = self.take()
        if token.isdigit():
            return int(token)
        if token in ("-", "("):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.fail()
            value = self.sum() if token == "(" else -self.atom()
            if token == "(" and self.take() != ")":
                raise self.fail()
            self.depth -= 1
            return value
        if token.isidentifier():
            if token not in self.sizes:
                raise ArtifactError("a dimension is not known", found=token, expected=", ".join(sorted(self.sizes)))
            return self.sizes[token]
        raise self.fail()


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The value of `dim` when the named sizes are `sizes`; ArtifactError for text outside the grammar."""
    if isinstance(dim, int):
        return dim
    parser = _Parser(dim, sizes)
    value = parser.sum()
    if parser.peek():
        raise parser.fail()
    return value


def names(dim: Dim) -> set[str]:
    """The size names that `dim` mentions."""
    return set() if isinstance(dim, int) else {token for token in _tokens(dim) if token.isidentifier()}


def _atom(dim: Dim) -> str:
    text = str(dim)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def times(*dims: Dim) -> Dim:
    """The product, folded where numbers are known.

    >>> times("b", 2, 3), times(), times("b+1", 0)
    ('6*b', 1, 0)
    """
    number, texts = 1, []
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        else:
            texts.append(dim)
    if not texts or number == 0:
        return number
    parts = ([str(number)] if number != 1 else []) + [_atom(text) for text in texts]
    return texts[0] if parts == [_atom(texts[0])] and len(texts) == 1 else "*".join(parts)


def plus(left: Dim, right: Dim) -> Dim:
    """The sum, folded where numbers are known."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if left == 0:
        return right
    return left if right == 0 else f"{left} + {right}" if not str(right).startswith("-") else f"{left} + ({right})"
