"""Tiles of a packed weight as Triton text: what every kernel that decodes any format by its expression begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qcompile.artifact import Extent, View
from qcompile.expr import k, substitute, var
from qcompile.format import Format
from qcompile.lowering.base import Context
from qcompile.lowering.triton.linear import Pointer
from qcompile.lowering.triton.render import Renderer, tables
from qcompile.simplify import Fact, simplify
from qcompile.target import Target


@dataclass(frozen=True)
class Tables:
    """The constant tables of some weights [N, K] that kernels read from memory: arguments behind the stored tensors."""

    entries: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(weights: Iterable[tuple[Format, int, int]]) -> Tables:
        return Tables(tuple(tables(simplify(format.weight(n, k)) for format, n, k in weights)))

    @property
    def pointers(self) -> list[Pointer]:
        return [Pointer(f"table{i}", "f32") for i in range(len(self.entries))]

    @property
    def extents(self) -> list[Extent]:
        return [Extent("f32", len(table)) for table in self.entries]

    def names(self) -> dict[str, str]:
        """The pointer of each table by the repr of its entries, as the renderer wants them."""
        return {repr(table): pointer.name for table, pointer in zip(self.entries, self.pointers, strict=True)}

    def views(self, ctx: Context) -> list[View]:
        """The tables, stored with the program's weights, each content once."""
        made = []
        for table in self.entries:
            digest = hashlib.sha256(repr(table).encode()).hexdigest()[:12]
            made.append(ctx.constant(f"table.{digest}", torch.tensor(table, dtype=torch.float32)))
        return made


@dataclass(frozen=True)
class Tile:
    """W[n, k] for rows `n` and inputs k of one step, in a format: a weight [`size`[0], `size`[1]].

    `n` names the rows, an i32 of shape [BN, 1] or a number. k is j, [1, block_k], where one step takes all of K, else k0 + j for
    a multiple k0 of `block_k`. `n_in` names the condition that n is in the weight, empty where it always is; `k_in` is
    that of k, where K is no multiple of `block_k`. `prefix` is that of the names of the values.
    """

    format: Format
    size: tuple[int, int]
    block_k: int
    n: str = "n"
    n_in: str = ""
    prefix: str = ""

    @property
    def looped(self) -> bool:
        """Whether k0 is a variable of a loop."""
        return self.size[1] > self.block_k

    @property
    def ragged(self) -> bool:
        """Whether some k of the last step are not in the weight."""
        return self.size[1] % self.block_k != 0

    def renderer(
        self, target: Target, stored: Sequence[Pointer], tables: Tables, taken: set[str]
    ) -> tuple[Renderer, str]:
        """What writes the tile's statements, and the value: f32, of a shape that broadcasts to [BN, block_k].

        Only where k is in the weight has the value a meaning. `stored` are the pointers of `Format.stored`.
        """
        n_rows, n_inputs = self.size
        steps = -(-n_inputs // self.block_k)
        facts = {"n": Fact(0, n_rows - 1), "j": Fact(0, min(self.block_k, n_inputs) - 1)}
        weight, inside = self.format.weight(n_rows, n_inputs), {"j"}
        if self.looped:
            facts["k0"] = Fact(0, (steps - 1) * self.block_k, self.block_k)
            weight, inside = substitute(weight, {k: var("k0") + var("j")}), {"k0", "j"}
        else:
            weight = substitute(weight, {k: var("j")})
        masks = {frozenset({"n"}): self.n_in} if self.n_in else {}
        if self.ragged:
            masks[frozenset(inside)] = "k_in"
        names = [item.name for item in self.format.stored(n_rows, n_inputs)]
        pointers = dict(zip(names, (pointer.name for pointer in stored), strict=True))
        variables = {"n": self.n, "j": "j", "k0": "k0"}
        render = Renderer(target, pointers, variables, facts, masks, tables.names(), taken, self.prefix)
        return render, render(simplify(weight, facts))
