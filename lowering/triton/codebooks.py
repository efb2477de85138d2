"""What formats with codebooks say about a run of weights that one code names: AQLM, VPTQ, HIGGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompile.expr import Expr, const
from qcompile.format import Format
from qcompile.formats.codebook import Aqlm, Vptq
from qcompile.formats.higgs import Higgs


@dataclass(frozen=True)
class Vectors:
    """Runs of `size` weights along `axis`: the sum of entry `index` of each book's `tensor`, times `scale`.

    Expressions are over n and k, the coordinates of a run's first weight. An entry is `size` numbers of dtype `dtype`, one after
    another. `scale` does not change along k within `group` inputs. Where `columns` are named, the weights of input k are
    then times the first of these tensors at k, plus the second.
    """

    axis: Literal["n", "k"]
    size: int
    dtype: str
    books: tuple[tuple[str, Expr], ...]
    scale: Expr | None
    group: int
    columns: tuple[str, str] | None = None


def vectors(format: Format, N: int, K: int) -> Vectors | str:
    """The runs of a weight [N, K], or why it has none."""
    located = format.located(N, K)
    match format:
        case Aqlm():
            if format.rows != 1 or not _whole(format.columns):
                return f"entries of {format.rows} x {format.columns} weights"
            books = ((located[f"code{i}"] + const(i << format.width)) for i in range(format.books))
            named = tuple(("codebooks", index) for index in books)
            return Vectors("k", format.columns, format.dtype, named, located["scale"], K)
        case Higgs():
            return Vectors("k", 2, format.dtype, (("tables2", located["pair"]),), located["scale"], format.group)
        case Vptq():
            if format.outliers or format.groups > 1 or not _whole(format.vector) or N % format.vector:
                return f"{format.outliers} columns with outliers, {format.groups} groups, entries of {format.vector} weights"
            named = (("centroids", located["index"]),)
            if format.residuals:
                named += (("res_centroids", located["residual_index"]),)
            columns = ("scale", "bias") if format.norm else None
            return Vectors("n", format.vector, format.dtype, named, None, K, columns)
    return f"a weight of format '{format.kind}' has no codebook of runs"


def _whole(size: int) -> bool:
    return size in (2, 4, 8, 16)
