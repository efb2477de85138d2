"""From the layout of a target back to the format that a method packed the weight in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.artifact import TransformRecord, WeightRecord
from qcompile.dtypes import DTYPES
from qcompile.errors import ConfigError, InternalError
from qcompile.evaluate import Reader, dequantize, row_chunks
from qcompile.expr import FLOATS, Expr, walk
from qcompile.format import Format, Names, Packed, format_from_json
from qcompile.formats.affine import Affine
from qcompile.formats.coded import Coded
from qcompile.formats.dense import Dense
from qcompile.formats.runs import Runs, from_runs
from qcompile.simplify import coordinates, interval, simplify
from qcompile.transform import Applied, transform_from_json

Tensors = Mapping[str, torch.Tensor]
PARTS = ("code", "scale", "zero", "offset")


def beside(format: Format, N: int, K: int) -> frozenset[str]:
    """The stored tensors of `format` that a lane layout of the same weight does not say, and that are not its codes.

    They are small: scales of scales, the group of each input. With them and the layout the weight can be stored again
    as it was, unless one of them holds the codes too.
    """
    said = _said(format, N, K)
    if said is None:
        return frozenset()
    located = format.located(N, K)
    whole = {s.name for s in format.stored(N, K)}
    read = {name: _tensors(expr) for name, expr in located.items()}
    lost = {name for field, names in read.items() if field not in said for name in names}
    return frozenset((lost | (whole - set().union(*read.values()))) - _codes(said, read))


def original(record: WeightRecord, tensors: Tensors) -> Packed:
    """The weight as its method packed it, with what happens around the matmul, from the tensors of an artifact.

    What was repacked is decoded and compared with the layout bit for bit. ConfigError where the layout has lost what
    the format stores.
    """
    origin = record.origin
    if origin is None:
        raise ConfigError(
            "the artifact does not say what its weights were made from", remedy="compile the model again: it is too old"
        )
    path, format_ = origin.module.path, format_from_json(origin.format)
    held = {stored: tensors[name] for stored, name in record.tensors.items()}
    if record.format != origin.format:
        kept = {stored: tensors[name] for stored, name in origin.kept.items()}
        order = None if record.order is None else tensors[record.order].long()
        layout = Packed(format_from_json(record.format), held, record.n, record.k)
        rows = torch.arange(record.row, record.row + record.rows)
        held = _restored(path, layout, rows, order, format_, kept)

    def applied(each: TransformRecord) -> Applied:
        return Applied(transform_from_json(each.transform), {s: tensors[name] for s, name in each.tensors.items()})

    packed = Packed(
        format_,
        held,
        record.rows,
        record.k,
        tuple(map(applied, record.before)),
        tuple(map(applied, origin.after)),
        None if record.residual is None else applied(record.residual),
        None if origin.bias is None else tensors[origin.bias],
    )
    packed.check(path)
    return packed


def _restored(
    path: str, layout: Packed, rows: torch.Tensor, order: torch.Tensor | None, format_: Format, kept: Tensors
) -> dict[str, torch.Tensor]:
    weight = _in_place(dequantize(layout.format, layout.tensors, layout.N, layout.K, rows), order)
    if isinstance(format_, Dense):
        return {"weight": weight.to(DTYPES[format_.dtype])}
    if isinstance(layout.format, Runs):
        made = from_runs(layout, rows, format_)
        _compare(path, format_, dequantize(format_, made, len(rows), layout.K), weight)
        return made
    gone = lost(format_, len(rows), layout.K)
    if gone or not isinstance(layout.format, Coded) or not isinstance(format_, Affine):
        raise ConfigError(
            "the layout of the target has not kept all that the format stores",
            where=path,
            found=f"{layout.format.kind}, made from {format_.kind}" + (f" ({', '.join(gone)})" if gone else ""),
            expected=f"the stored tensors of {format_.kind}",
            remedy='compile for target="reference", which keeps them',
        )
    made = _repacked(layout, rows, order, format_, kept)
    _prove(path, format_, made, weight)
    return made


def _prove(path: str, format_: Affine, tensors: Tensors, weight: torch.Tensor) -> None:
    """InternalError unless the terms of `format_` say the same weight, bit for bit."""
    N, K = weight.shape
    value = simplify(format_.terms(Names(**format_.located(N, K))).value(), coordinates(N, K))
    for rows in row_chunks(N, K):
        _compare(path, format_, Reader(tensors, rows, torch.arange(K))(value).expand(len(rows), K), weight[rows])


def _compare(path: str, format_: Format, made: torch.Tensor, wanted: torch.Tensor) -> None:
    if not bool(((made == wanted) | (made.isnan() & wanted.isnan())).all()):
        raise InternalError("a weight was changed on its way back to its format", where=path, found=format_.kind)


def _repacked(
    layout: Packed, rows: torch.Tensor, order: torch.Tensor | None, format_: Affine, kept: Tensors
) -> dict[str, torch.Tensor]:
    from qcompile.pack import pack

    assert isinstance(layout.format, Coded)
    N, K = len(rows), layout.K
    reader = Reader(layout.tensors, rows, torch.arange(K))
    lanes = layout.format.terms(Names(**layout.format.located(layout.N, K)))
    located, said = format_.located(N, K), _said(format_, N, K) or {}
    # Layouts hold codes from 0 on: signed ones and their zeros were moved up together.
    code, middle = format_.terms(Names(**located)).code, 1 << layout.format.bits - 1
    moved = {"code": middle, "zero": middle} if code.dtype == "i32" and interval(code)[0] < 0 else {}
    there = Reader(kept, torch.arange(N), torch.arange(K))
    fields = {}
    for name, expr in located.items():
        if name not in said:
            fields[name] = there(expr).expand(N, K)
            continue
        found = getattr(lanes, said[name])
        assert found is not None  # the layout was made from these terms
        value = _in_place(reader(found).expand(N, K), order)
        value = value - moved[said[name]] if said[name] in moved else value
        fields[name] = value.to(DTYPES[expr.dtype] if expr.dtype in FLOATS else torch.int32)
    return {**pack(format_, fields, N, K), **kept}


def _in_place(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Columns that were put in `order`, where they were."""
    return values if order is None else torch.empty_like(values).index_copy_(1, order, values)


def _said(format: Format, N: int, K: int) -> dict[str, str] | None:
    """The fields that a lane layout says exactly, with the part of its terms that does; None where it says no code."""
    if not isinstance(format, Affine):
        return None
    terms = format.terms(Names(**format.located(N, K)))
    said = {}
    for part in PARTS:
        if part == "zero" and terms.table is not None:  # a table may have taken it in
            continue
        expr = getattr(terms, part)
        while expr is not None and expr.op == "cast" and expr.dtype == "f32" and expr.args[0].dtype in FLOATS:
            expr = expr.args[0]
        if expr is not None and expr.op == "field":
            said[expr.attr] = part
    return said if "code" in said.values() else None


def lost(format: Format, N: int, K: int) -> list[str]:
    """The stored tensors that neither a lane layout nor what is kept beside it says."""
    said = _said(format, N, K)
    if said is None:
        return [s.name for s in format.stored(N, K)]
    read = {name: _tensors(expr) for name, expr in format.located(N, K).items()}
    return sorted(_codes(said, read) & {name for field, names in read.items() if field not in said for name in names})


def _codes(said: Mapping[str, str], read: Mapping[str, set[str]]) -> set[str]:
    """The tensors that hold the codes."""
    return next(read[name] for name, part in said.items() if part == "code")


def _tensors(expr: Expr) -> set[str]:
    return {node.attr[0] for node in walk(expr) if node.op == "load"}
