"""The Triton text of linear kernels over `Fragments` weights: W on the left of tensor cores, decoded in registers.

    y[m, n] = epilogue(sum over k of W[n, k] x[m, k] + bias[n])

A program computes a tile of outputs. A step takes 128 inputs, or several times that; each word of W is loaded once, and
becomes operands of tensor cores in the thread that loaded it. `fragment_way` says where scales come in, `fragment_stream`
writes what is done with a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.formats.fragments import INPUTS, Fragments
from qcompile.lowering.triton import prologue, schedule, split, text
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.fragment_stream import FUNCTIONS, Stream
from qcompile.lowering.triton.fragment_way import SKINNY, Way, kind_of, value_of
from qcompile.lowering.triton.linear import Section, Shape, types
from qcompile.lowering.triton.source import Source
from qcompile.target import Target


class Text:
    """Writes one kernel."""

    def __init__(self, shape: Shape, most: int, split_k: int, target: Target):
        self.shape, self.most, self.split_k, self.target = shape, most, split_k, target
        self.sections, self.formats = shape.sections(), [f for f in shape.parse() if isinstance(f, Fragments)]
        self.ways = [Way(format, shape.k, shape.compute, most) for format in self.formats]
        self.steps = -(-shape.k // INPUTS)
        widest = max(self.formats, key=lambda format: format.bits)
        group = 0 if widest.group == shape.k else widest.group
        self.plan = schedule.choose(
            kind_of(most), max(section.rows for section in self.sections), shape.k, most, widest.bits, target.capability,
            value=value_of(widest), group=group, split_k=split_k, streams=2 if shape.glu else 1,
        )  # fmt: skip
        self.block_n = self.plan.block_n
        self.block_m = self.plan.block_m
        self.together = self.plan.block_k // INPUTS
        self.few = most <= SKINNY
        # Where warps have tensor cores of their own, Triton lets them share outputs, and decode the same weights; but where one
        # product adds to another's sum it gives each warp outputs of its own.
        self.alone = target.capability // 10 not in (9, 10)
        self.halves = 2 if self.alone and not self.few else 1
        self.ragged_k = shape.k % INPUTS != 0
        self.pointers = [*shape.pointers(), *(split.POINTERS if split_k > 1 else [])]
        self.names = [pointer.name for pointer in self.pointers]
        # A sum can be multiplied by a row's rate after all products, unless they might overflow without it.
        norm = shape.prologue
        self.late = norm is not None and norm["op"] == "rms_norm" and shape.compute == "bf16"

    def source(self) -> Source:
        tiles = [-(-section.rows // self.block_n) for section in self.sections]
        bodies = [self._section(section) for section in self.sections]
        lines, parts = text.dispatch(bodies, tiles, [*self.names, "d0"])
        entry = f"linear_{kind_of(self.most)}"
        helpers = self._helpers("\n".join(line for body in bodies for line in body)) + parts
        made = text.module(entry, self._about(), self.names, 1, "\n".join(lines), self.target, helpers)
        rows = 1 if self.most <= self.block_m else f"(d0 + {self.block_m - 1})//{self.block_m}"
        plan = self.plan
        return Source(made, entry, types(self.pointers), 1, (sum(tiles), rows, self.split_k), plan.warps, plan.stages)

    def _helpers(self, body: str) -> str:
        decoders = [way.decoder.text(f"decode{part}", self.target) for part, way in enumerate(self.ways)]
        return "\n\n".join(
            each.strip() + "\n" for each in (*decoders, text.called(FUNCTIONS, body), functions(body)) if each
        )

    def _about(self) -> str:
        shape = self.shape
        parts = ", ".join(f"[{n}, {shape.k}] in {f}" for f, n in zip(self.formats, shape.rows, strict=True))
        y = (f"{shape.prologue['op']}(x)" if shape.prologue else "x") + " @ W.T" + (" + bias" if shape.bias else "")
        steps = [step["act"] + " gate" if step["op"] == "glu" else step["op"] for step in shape.epilogue]
        scales = "the sums of groups" if any(way.on_sums for way in self.ways) else "weights"
        if all(way.whole for way in self.ways):
            scales = "sums"
        return (
            f"y = {', '.join([y, *steps])}; W {parts}\n\n"
            f"Tiles of {self.block_n} outputs x {self.block_m} rows, {self.together * INPUTS} inputs a step, K in "
            f"{self.split_k} parts; {shape.compute} products, scales on {scales}, f32 sums."
        )

    # -- one section --

    def _section(self, section: Section) -> list[str]:
        """The statements for tile number `tile` of a section."""
        bn, bm, k = self.block_n, self.block_m, self.shape.k
        streams = [Stream(self, i, part, first) for i, (part, first) in enumerate(section.streams)]
        lines = [
            f"i = tl.arange(0, {bn})",
            f"n = tile * {bn} + i[:, None]",
            *self._rows(),
        ]
        norm = self.shape.prologue
        if norm is not None:
            lines += prologue.statistics(norm, k, self.most)
            lines += [self._by_row(name) for name in ("rate", "mean")[: 1 + (norm["op"] == "layer_norm")]]
        for stream in streams:
            lines += stream.places(section.rows)
        part = self.steps // self.split_k
        first, last = ("0", str(self.steps)) if self.split_k == 1 else ("first", f"first + {part}")
        lines += [f"first = tl.program_id(2) * {part}"] * (self.split_k > 1)
        lines += [f"{stream.total} = tl.zeros([{bn}, {bm}], tl.float32)" for stream in streams]
        # With few rows the next step's scales are loaded while this step computes. Where they multiply weights, Triton would
        # move decoded weights through shared memory if they came from the step before.
        body = []
        if self.few:
            lines += [line for stream in streams for line in stream.fetched(first, "")]
            body = [f"ahead = tl.minimum(step + {self.together}, {last} - {self.together})"]
            body = body * any(stream.groups for stream in streams)
        body += [
            line for stream in streams for line in stream.fetched(*(("ahead", "_next") if self.few else ("step", "")))
        ]
        for u in range(self.together):
            body += self._step(u, streams)
        body += [f"{name} = {name}_next" for stream in streams for name in stream.groups] * self.few
        loop = f"for step in range({first}, {last}, {self.together}):"
        lines += [loop, *(f"    {line}" for line in body)]
        lines += [line for stream in streams for line in stream.after(self.late)]
        return [*lines, *self._ending(section, [stream.total for stream in streams])]

    def _rows(self) -> list[str]:
        """The statements for `m` [1, BM], the rows of y, `x_row`, where those of x begin, and, of few, `live`: which exist."""
        start = "" if self.most <= self.block_m else f"tl.program_id(1) * {self.block_m} + "
        return [
            f"m = {start}tl.arange(0, {self.block_m})[None, :]",
            *["live = m < d0"] * self.few,
            f"x_row = x + {'m' if self.few else 'tl.minimum(m, d0 - 1)'}.to(tl.int64) * {self.shape.k}",
        ]

    def _ending(self, section: Section, sums: Sequence[str]) -> list[str]:
        """The statements that make y of the f32 tensors `sums` [BN, BM] and store it."""
        ragged = section.rows % self.block_n != 0
        ending = finish(self.shape, section, sums, ragged=ragged)
        return split.add_up(self.shape, section, sums, self.split_k, ending, self.target, ragged=ragged)

    def _by_row(self, name: str) -> str:
        made = f"{name}{self.most - 1}"
        for row in reversed(range(self.most - 1)):
            made = f"tl.where(m == {row}, {name}{row}, {made})"
        return f"{name} = {made}"

    def _step(self, u: int, streams: Sequence[Stream]) -> list[str]:
        """The statements for 128 inputs; the streams agree in where their groups end, or take them at the finer ends."""
        pieces = max([self.halves, *(stream.way.pieces for stream in streams if stream.way.on_sums)])
        lines = [f"at = (step + {u}) * {INPUTS}" if u else f"at = step * {INPUTS}"]
        for stream in streams:
            lines += stream.weights(u, pieces)
        for piece in range(pieces):
            lines += self._x(piece, INPUTS // pieces)
            for stream in streams:
                lines += stream.products(u, piece, pieces)
        return lines

    def _x(self, piece: int, inputs: int) -> list[str]:
        """The statements that give `x_tile` [inputs, BM] in the compute dtype."""
        shape = self.shape
        start = f"at + {piece * inputs}" if piece else "at"
        lines = [f"k = {start} + tl.arange(0, {inputs})[:, None]"]
        # Rows that are not there cost nothing to leave out, or, where most are there, repeat the last one.
        mask = " & ".join([*["live"] * self.few, *[f"(k < {shape.k})"] * self.ragged_k])
        lines.append(f"x_tile = tl.load(x_row + k{f', mask={mask}, other=0.0' if mask else ''})")
        norm = shape.prologue
        if norm is not None:
            lines += prologue.weights(norm, f"k < {shape.k}" if self.ragged_k else "")
            if self.late:
                lines.append("x_tile = x_tile * norm_scale")
            elif norm["op"] == "rms_norm":
                lines.append("x_tile = x_tile * rate * norm_scale")
            else:
                lines.append("x_tile = tl.where(live, (x_tile - mean) * rate * norm_scale + norm_shift, 0.0)")
                if self.ragged_k:
                    lines.append(f"x_tile = tl.where(k < {shape.k}, x_tile, 0.0)")
        if shape.x == "f32":
            lines.append(f"x_tile = {text.dot_operand('x_tile', {'compute': shape.compute}, self.target)}")
        elif text.interpreted(self.target):
            lines.append("x_tile = x_tile.to(tl.float32)")
        return lines
