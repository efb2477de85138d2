"""The same weight in another format: codes, scales and zeros carried over, and the proof that no bit of it changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ConfigError
from qcompile.evaluate import Reader, dequantize
from qcompile.expr import FLOATS, Expr
from qcompile.format import Format, Names, Packed
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.dense import Dense
from qcompile.pack import pack, unpack
from qcompile.simplify import coordinates, interval, simplify

_ROUNDING_ONLY = (
    "codes, scales and zeros are the same, only the rounding behind them differs: allow that with rounded=False"
    " (--unrounded)"
)


@dataclass(frozen=True)
class _Parts:
    """The terms of a weight, each [N, K] or absent: (code - zero) * scale + offset, or table[code] * scale."""

    code: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    offset: torch.Tensor | None
    table: tuple[float, ...] | None

    @staticmethod
    def of(packed: Packed) -> _Parts:
        assert isinstance(packed.format, Affine)  # the caller has looked
        N, K = packed.N, packed.K
        terms = packed.format.terms(Names(**packed.format.located(N, K)))
        reader = Reader(packed.tensors, torch.arange(N), torch.arange(K))

        def at(expr: Expr | None) -> torch.Tensor | None:
            return None if expr is None else reader(simplify(expr, coordinates(N, K))).expand(N, K)

        code, scale = at(terms.code), at(terms.scale)
        assert code is not None and scale is not None  # every weight with terms has both
        scale = scale if terms.factor == 1.0 else scale.float() * terms.factor
        return _Parts(code, scale, at(terms.zero), at(terms.offset), terms.table)


def repack(source: Packed, target: Format, where: str = "", *, rounded: bool = True) -> Packed:
    """`source` in the format `target`, every weight the same bit for bit, and what happens around the matmul as it was.

    Where `target` has a parameter `scale`, the scales' dtype may be the source's instead. With `rounded` false the
    weights are compared before the rounding that each format ends with. ConfigError with the reason where the two formats
    have no such weight in common.
    """
    true, problems = weights(source, rounded), []
    for format_ in _candidates(source, target):
        try:
            made = replace(source, format=format_, tensors=_carried(source, format_))
        except ConfigError as error:
            problems.append(error)
            continue
        found = weights(made, rounded)
        changed = different(found, true)
        if not bool(changed.any()):
            return made
        same_terms = rounded and not bool(different(weights(made, False), weights(source, False)).any())
        count = f"{int(changed.sum())} of {true.numel()} weights would change"
        problems.append(
            ConfigError(
                "the weights are no values of the other format",
                found=f"{count}, by at most {float((found - true).abs().max()):.1e}: {_rounding(source.format, format_)}",
                expected="the same weights, bit for bit",
                remedy=_ROUNDING_ONLY if same_terms else "",
            )
        )
    last = problems[-1]
    raise ConfigError(
        f"a weight of format '{source.format.kind}' cannot be stored as '{target.kind}' without loss: {last.summary}",
        where=", ".join(filter(None, (where, last.where))),
        found=last.found,
        expected=last.expected,
        remedy=last.remedy or "quantize the float model with the other method instead",
    )


def weights(packed: Packed, rounded: bool = True) -> torch.Tensor:
    """The weight f32 [N, K] as its format decodes it, or f64 before the format's last rounding (affine formats only)."""
    if rounded or not isinstance(packed.format, Affine):
        return dequantize(packed.format, packed.tensors, packed.N, packed.K).to(
            torch.float32 if rounded else torch.float64
        )
    parts = _Parts.of(packed)
    if parts.table is not None:
        code = torch.tensor(parts.table, dtype=torch.float64)[parts.code.long()]
    else:
        code = parts.code.double() - (0 if parts.zero is None else parts.zero.double())
    return code * parts.scale.double() + (0 if parts.offset is None else parts.offset.double())


def different(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Where two weights differ; NaN is equal to NaN."""
    return (left != right) & ~(left.isnan() & right.isnan())


def _candidates(source: Packed, target: Format) -> Iterator[Format]:
    yield target
    names = [f.name for f in fields(target) if f.name in ("scale", "dtype")]  # type: ignore[arg-type]
    have = getattr(source.format, "scale", getattr(source.format, "dtype", None))
    if isinstance(target, Affine) and names and have in FLOATS and getattr(target, names[0]) != have:
        yield replace(target, **{names[0]: have})  # type: ignore[type-var]


def _rounding(source: Format, target: Format) -> str:
    def said(format_: Format) -> str:
        terms = format_.terms(Names(**format_.located(64, 512))) if isinstance(format_, Affine) else None
        return "in float32" if terms is None or terms.rounding == "none" else f"rounded ({terms.rounding})"

    return f"{source.kind} computes them {said(source)}, {target.kind} {said(target)}"


def _carried(source: Packed, target: Format) -> dict[str, torch.Tensor]:
    """The stored tensors of `target`, not yet compared with the source."""
    N, K = source.N, source.K
    located = target.located(N, K)
    have = {name: expr.dtype in FLOATS for name, expr in source.format.located(N, K).items()}
    same = have == {name: expr.dtype in FLOATS for name, expr in located.items()}
    if type(target) is type(source.format) and same:
        return pack(target, unpack(source.format, source.tensors, N, K), N, K)
    if isinstance(target, Dense):
        true = weights(source)
        _exact("weight", true, target.dtype)
        return pack(target, {"weight": true}, N, K)
    if not isinstance(source.format, Affine) or not isinstance(target, Affine):
        kind = (target if isinstance(source.format, Affine) else source.format).kind
        raise ConfigError(
            "the two are made in different ways",
            found=f"'{kind}' is not a code times a scale",
            expected="two such formats",
        )
    _same_groups(source, target)
    terms = target.terms(Names(**located))
    parts = _fitted(_Parts.of(source), terms)
    made: dict[str, torch.Tensor] = {}
    for name in ("code", "scale", "zero", "offset"):
        expr, value = getattr(terms, name), getattr(parts, name)
        solved = None if expr is None or expr.op == "const" else _solved(expr, value)
        if solved is not None:
            made[solved[0]] = solved[1]
    if lacking := sorted(located.keys() - made.keys()):
        raise ConfigError(
            "the one does not say all that the other stores", found=source.format.kind, expected=", ".join(lacking)
        )
    for name, expr in located.items():
        if expr.dtype in FLOATS:
            _exact(name, made[name], expr.dtype)
    return pack(target, made, N, K)


def _same_groups(source: Packed, target: Format) -> None:
    have, want = source.format.group_size(source.N, source.K), target.group_size(source.N, source.K)
    if have is None and want is not None:
        raise ConfigError(
            "the source is in act-order",
            found="a stored group for each input",
            expected=f"groups of {want} consecutive inputs",
            remedy="choose a method that stores the group of each input too",
        )
    if have is not None and want is not None and have % want:
        raise ConfigError("the groups differ", found=f"{have} inputs share a scale", expected=f"{want}, or a multiple")


def _fitted(parts: _Parts, terms: Terms) -> _Parts:
    """The same weight with codes, zeros and offsets of the kinds that `terms` has."""
    have, want = _kind(parts.table, NAMES[parts.code.dtype]), _kind(terms.table, terms.code.dtype)
    if have != want:
        raise ConfigError("the codes are of another kind", found=f"{have} codes", expected=f"{want} codes")
    if want != "integer":
        return parts if parts.table == terms.table or terms.table is None else _looked_up(parts, terms.table)
    low, high = interval(terms.code)
    zero: torch.Tensor | int = 0 if parts.zero is None else parts.zero
    lift = (high + 1) // 2 if int(parts.code.min()) < low else 0  # signed codes move up together with their zeros
    if terms.offset is not None:
        offset = 0 if parts.offset is None else parts.offset.float()
        fitted = replace(parts, code=parts.code + lift, zero=None, offset=offset - parts.scale.float() * (zero + lift))
    else:
        if parts.offset is not None:  # a group whose scale is 0 has no zero to find: the comparison tells
            zero = zero - torch.nan_to_num(parts.offset.float() / parts.scale.float(), 0.0, 0.0, 0.0)
        if terms.zero is None or terms.zero.op == "const":
            fixed = 0 if terms.zero is None else int(terms.zero.attr)
            fitted = replace(parts, code=parts.code + fixed - _whole(zero), zero=None, offset=None)
        else:
            zero = (zero if terms.zero.dtype in FLOATS else _whole(zero)) + lift
            zero = (
                zero.expand(parts.code.shape) if isinstance(zero, torch.Tensor) else torch.full_like(parts.code, zero)
            )
            fitted = replace(parts, code=parts.code + lift, zero=zero, offset=None)
    least, most = int(fitted.code.min()), int(fitted.code.max())
    if least < low or most > high:
        raise ConfigError("the codes do not fit", found=f"{least} to {most}", expected=f"{low} to {high}")
    return fitted


def _kind(table: tuple[float, ...] | None, dtype: str) -> str:
    return "table" if table is not None else dtype if dtype in FLOATS else "integer"


def _whole(zero: torch.Tensor | int) -> torch.Tensor | int:
    """Zeros that are whole numbers, as i32."""
    if isinstance(zero, int) or not zero.is_floating_point():
        return zero
    broken = zero != zero.round()
    if bool(broken.any()):
        found = f"{int(broken.sum())} weights with one such as {zero[broken][0].item():.6g}"
        raise ConfigError("the zeros are no whole numbers", found=found, expected="zeros in units of the code")
    return zero.to(torch.int32)


def _looked_up(parts: _Parts, table: tuple[float, ...]) -> _Parts:
    """The same entries under the codes of another table."""
    assert parts.table is not None
    places = {entry: code for code, entry in reversed(list(enumerate(table)))}
    missing = sorted(set(parts.table) - places.keys())
    if missing:
        raise ConfigError(
            "the tables differ", found=f"entries such as {missing[0]}", expected="entries of the other table"
        )
    codes = torch.tensor([places[entry] for entry in parts.table], dtype=torch.int32)
    return replace(parts, code=codes[parts.code.long()], table=table)


def _solved(expr: Expr, value: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """The field of which `expr` is made, and what it must be for `expr` to be `value`; None where that is not plain."""
    while expr.op != "field":
        if expr.op == "cast" and expr.dtype == "f32" and expr.args[0].dtype in FLOATS:
            expr = expr.args[0]
        elif expr.op in ("add", "sub") and expr.args[1].op == "const" and expr.dtype == "i32":
            value = value - expr.args[1].attr if expr.op == "add" else value + expr.args[1].attr
            expr = expr.args[0]
        elif expr.op == "bitcast" and expr.attr in FLOATS and DTYPES[expr.attr].itemsize == 1:
            _exact("scale", value, expr.attr)
            expr, value = expr.args[0], value.to(DTYPES[expr.attr]).view(torch.uint8).to(torch.int32)
        else:
            return None
    return expr.attr, value


def _exact(name: str, value: torch.Tensor, dtype: str) -> None:
    """ConfigError unless `dtype` holds every number of `value`."""
    rounded = value.to(DTYPES[dtype]).to(value.dtype) if value.is_floating_point() else value
    changed = different(rounded, value)
    if bool(changed.any()):
        raise ConfigError(
            f"the {name} would be rounded",
            found=f"{NAMES[value.dtype]} numbers such as {value[changed][0].item()!r}",
            expected=f"numbers of {dtype}",
        )
