"""What a pass is, what it may use, and the runner that checks the graph after each one."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch.fx import Node

from qcompile.backend import Backend, ReferenceBackend
from qcompile.errors import InternalError, QCompileError
from qcompile.passes.graph import infer, operator_name
from qcompile.program import Program
from qcompile.report import Refusal, Report
from qcompile.show import show

if TYPE_CHECKING:
    from qcompile.methods.base import Method, MethodConfig
    from qcompile.staging import Stage


@dataclass
class Context:
    """What passes share: the report, the backend they ask, the quantization method, and how the pipeline is watched.

    `fuel` is the number of rewrites still allowed (None: no limit); lowering it until a fault goes away finds the guilty
    rewrite. Text of the graph after each pass named in `keep` (all of them, when it holds "*") is kept in `snapshots`, and
    given to `show` as (pass, text) when the pass changed something. `progress` is called with a pass name and what is
    being worked on. `reproducers` is the folder for reproducers (a temporary one by default). `stage` keeps what is quantized
    on disk.
    """

    report: Report
    backend: Backend = field(default_factory=ReferenceBackend)
    method: Method | None = None
    config: MethodConfig | None = None
    fuel: int | None = None
    keep: frozenset[str] = frozenset()
    snapshots: dict[str, str] = field(default_factory=dict)
    show: Callable[[str, str], None] | None = None
    progress: Callable[[str, str], None] | None = None
    reproducers: Path | None = None
    stage: Stage | None = None

    def take(self) -> bool:
        """True when one more rewrite is allowed; it is then used up."""
        if self.fuel is None:
            return True
        self.fuel -= 1
        return self.fuel >= 0

    def refuse(self, pattern: str, node: Node, reason: str) -> None:
        """Keeps why `pattern` was not applied at `node`."""
        self.report.refuse(Refusal(pattern, node.name, node.meta.get("module", ""), reason))

    def working(self, name: str, on: str) -> None:
        """Tells a watcher that pass `name` is now at `on`."""
        if self.progress is not None:
            self.progress(name, on)


class Pass(Protocol):
    """A change of the graph that keeps its meaning. Passes are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]

    def run(self, program: Program, ctx: Context) -> int:
        """Changes `program` in place and returns the number of rewrites."""
        ...


def _reproducer(before: str, program: Program, pass_: Pass, ctx: Context) -> Path:
    """Writes what is needed to look at a failed pass, and returns the folder."""
    folder = ctx.reproducers or Path(tempfile.mkdtemp(prefix="qcompile-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pass.txt").write_text(f"{pass_!r}\n")
    (folder / "before.py.txt").write_text(before)
    (folder / "error.txt").write_text(traceback.format_exc())
    try:
        (folder / "after.py.txt").write_text(show(program))
    except Exception as error:
        (folder / "after.py.txt").write_text(f"the graph cannot be printed: {error!r}\n")
    return folder


def check(program: Program) -> None:
    """InternalError unless the graph is legal: nodes in order, tensors known, and every value has its type."""
    program.graph.graph.lint()
    infer(program)
    for node in program.graph.graph.nodes:
        if node.op == "get_attr" and node.meta.get("tensor") not in program.tensors:
            raise InternalError("a stored tensor is not known to the program", where=node.name)


def run_pipeline(program: Program, passes: Iterable[Pass], ctx: Context) -> None:
    """Runs `passes` in order and checks the graph after each one.

    A mistake in the user's input (any QCompileError) goes through as it is; anything else is an InternalError that names
    the pass and a folder with the graph before and after it.
    """
    check(program)
    text = show(program)
    for pass_ in passes:
        before = text
        try:
            count = pass_.run(program, ctx)
            if count:
                drop_unused(program)
            check(program)
        except QCompileError as error:
            if not isinstance(error, InternalError):
                raise
            raise _broken(pass_, _reproducer(before, program, pass_, ctx), error) from error
        except Exception as error:
            raise _broken(pass_, _reproducer(before, program, pass_, ctx), error) from error
        ctx.report.passes.append((pass_.name, count))
        text = show(program)
        if {"*", pass_.name} & ctx.keep:
            ctx.snapshots[pass_.name] = text
            if ctx.show is not None and count:
                ctx.show(pass_.name, text)
    program.graph.recompile()


def _broken(pass_: Pass, folder: Path, error: Exception) -> InternalError:
    first = (str(error).splitlines() or [""])[0]
    return InternalError(
        f"the pass '{pass_.name}' failed",
        where=str(folder),
        found=f"{type(error).__name__}: {first}",
        remedy="report this, with that folder; compile with less fuel to find the rewrite",
    )


def drop_unused(program: Program) -> int:
    """Removes nodes whose value nobody uses, then stored tensors that nothing names any more; how many nodes went."""
    graph, dropped = program.graph.graph, 0
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr", "call_module") and not node.users and not node.is_impure():
            graph.erase_node(node)
            dropped += 1
    targets = {node.target for node in graph.nodes if node.op in ("get_attr", "call_module")}
    for name in [*program.graph._buffers, *program.graph._parameters, *program.graph._modules]:
        if name not in targets:
            delattr(program.graph, name)
    named = {node.meta["tensor"] for node in graph.nodes if node.op == "get_attr"}
    for record in program.weights.values():
        named |= record.names()
    for name in program.tensors.keys() - named:
        del program.tensors[name]
    return dropped


def only_users(node: Node, allowed: Sequence[Node]) -> str | None:
    """The reason why `node` may not disappear into another: it has a user outside `allowed`; None when it may."""
    others = [user for user in node.users if user not in allowed]
    if not others:
        return None
    return f"{operator_name(node)} ({node.name}) is also used by {', '.join(user.name for user in others)}"
