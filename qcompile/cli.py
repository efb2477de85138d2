"""The command line: plan, compile, run, inspect, export, convert, bench, tune, formats, targets.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 an error of qcompile's own kind, 2 wrong usage.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.errors import QCompileError

if TYPE_CHECKING:
    from qcompile.compiler import Accuracy
    from qcompile.runtime.model import CompiledModel


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _plain(text: object) -> str:
    """`text` with control characters as escapes: names in a stranger's file must not steer the terminal."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(text))


class Commands(click.Group):
    """Prints qcompile's own errors, and those of files and folders, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (QCompileError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # whoever reads the output has seen enough
                raise
            click.echo(f"error: {_plain(error)}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qcompile")
def main() -> None:
    """Compile quantized models ahead of time, and run what came out."""


def _config(text: str | None) -> dict[str, Any] | None:
    """A quantization config from JSON text, which starts with a brace, or from the path of a JSON file."""
    if text is None:
        return None
    try:
        config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"neither JSON nor a file: {error}", param_hint="--config") from None
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"neither a JSON file nor JSON: {error}", param_hint="--config") from None
    if not isinstance(config, dict):
        raise click.BadParameter(f"the file {text} holds no JSON object", param_hint="--config")
    return config


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[str, str], None] | None]:
    """A line on stderr that says what is being done and for how long; nothing when stderr is not a terminal."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda stage, on: progress.update(task, description=_plain(f"{stage}  {on}"))


def _bytes(text: str) -> int:
    """Bytes from "2GB", "512MiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no size, such as 2GB or 512MiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(unit or " "))


@contextmanager
def _spill_folder(max_memory: int | None, output: Path) -> Iterator[Path | None]:
    """A folder for large tensors on the disk of the output (a temporary folder may be memory itself), if it is needed."""
    if max_memory is None:
        yield None
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        yield Path(folder)


@main.command("compile")
@click.argument("model")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The artifact folder to write.")
@click.option("--config", help="Quantization config: JSON, or a JSON file. Default: the checkpoint's own.")
@click.option("--target", default="cpu", show_default=True, help="See `qcompile targets`.")
@click.option(
    "--accuracy", type=click.Choice(["exact", "int8"]), default="exact", show_default=True,
    help="Inputs of quantized layers on a CPU: float32, or rounded to int8 in groups.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="An operation without a kernel is an error instead of a fallback.")
@click.option(
    "--print-after", "print_after", multiple=True, metavar="PASS", help="Print the graph after this pass (* is all)."
)
@click.option(
    "--max-memory", callback=lambda _, __, text: text and _bytes(text), metavar="SIZE",
    help="Tensors in memory at a time, such as 2GB; the others lie in files beside the output (or in --work).",
)  # fmt: skip
@click.option(
    "--work", type=click.Path(path_type=Path),
    help="Folder for what is made of float weights: started again with it, an interrupted compile goes on. Gone at the end.",
)  # fmt: skip
@click.option(
    "--schedules", type=click.Path(path_type=Path),
    help="For GPUs: a table that `qcompile tune --write` made. Default: that of the cache folder, if there is one.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def compile_command(
    model: str, output: Path, config: str | None, target: str, accuracy: Accuracy, strict: bool,
    print_after: tuple[str, ...], max_memory: int | None, work: Path | None, schedules: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compile MODEL: a Hugging Face folder or hub id, or a .gguf file."""
    import qcompile
    from qcompile.runtime.folder import check_free
    from qcompile.staging import Stage

    def show(name: str, text: str) -> None:
        click.echo(_plain(f"# after {name}\n{text}"), err=as_json)

    check_free(output)  # now, and not when all is done
    with _progress(not as_json) as progress, _spill_folder(max_memory, output) as spill:
        compiled = qcompile.compile(
            model, _config(config), target=target, accuracy=accuracy, strict=strict, work=work,
            max_memory=max_memory, spill=spill, schedules=schedules, print_after=print_after, show=show,
            progress=progress,
        )  # fmt: skip
        compiled.save(output)
    if work is not None:
        Stage(work).clear()
    click.echo(json.dumps(compiled.report.to_json(), indent=1) if as_json else _plain(compiled.report))


@main.command()
@click.argument("model")
@click.option("--config", help="Quantization config: JSON, or a JSON file. Default: the checkpoint's own.")
@click.option("--target", default="cpu", show_default=True, help="See `qcompile targets`.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(model: str, config: str | None, target: str, as_json: bool) -> None:
    """Show what compiling MODEL would make of every weight, from headers alone. Problems make the exit code 1."""
    import qcompile

    found = qcompile.plan(model, _config(config), target=target)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else _plain(found))
    if found.problems:
        sys.exit(1)


def _load(artifact: Path, target: str | None, trusted: bool, threads: int | None) -> CompiledModel:
    import qcompile

    return qcompile.load(artifact, target, "trusted" if trusted else "rebuild", threads=threads)


def _tokenizer(path: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise click.ClickException("text needs a tokenizer: pip install 'qcompile[transformers]'") from None
    try:
        if path.endswith(".gguf"):
            return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"no tokenizer in {path!r}: {' '.join(str(error).split())}") from None


class _Stream:
    """Prints the text of tokens as they come; a character whose bytes have not all come waits for the rest."""

    def __init__(self, words: Any):
        self.words, self.count = words, 0
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, token: Any) -> None:
        self.count += 1
        self.tokens.append(int(token))
        text = self.words.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def finish(self) -> None:
        self._show(self.words.decode(self.tokens, skip_special_tokens=True))
        click.echo()

    def _show(self, text: str) -> None:
        click.echo(_plain(text[len(self.shown) :]), nl=False)
        self.shown = text


def execution_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options about how a finished artifact is run."""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="Processors to use; all without it."),
        click.option("--target", help="Run on this target instead of the artifact's own."),
        click.option("--trusted", is_flag=True, help="Run the artifact's native code; kernels are not built again."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--tokenizer", required=True, help="Folder, hub id or .gguf file that holds the tokenizer.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Where to stop at the latest."
)
@click.option("--temperature", type=float, help="Sample at this temperature; greedy without it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers that sampling draws.")
@click.option("--chat/--no-chat", default=False, help="Wrap the prompt in the tokenizer's chat template.")
@execution_options
def run(
    artifact: Path, prompt: str, tokenizer: str, max_new_tokens: int, temperature: float | None, seed: int, chat: bool,
    trusted: bool, target: str | None, threads: int | None,
) -> None:  # fmt: skip
    """Generate text from PROMPT with a compiled language model, as it comes."""
    model, words = _load(artifact, target, trusted, threads), _tokenizer(tokenizer)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # A template writes the special tokens itself.
    ids = words(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    stream, start = _Stream(words), time.perf_counter()
    model.generate(
        ids, max_new_tokens=max_new_tokens, do_sample=temperature is not None,
        temperature=1.0 if temperature is None else temperature, seed=seed, streamer=stream,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    stream.finish()
    rate = f"{stream.count / seconds:.1f} tokens/s, reading the prompt's {ids.shape[1]} included"
    click.echo(f"{stream.count} tokens, {rate}", err=True)


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--kernel", metavar="NAME", help="Print the source of this kernel.")
@click.option("--graph", is_flag=True, help="Print the final graph.")
@click.option("--after", metavar="PASS", help="Print the graph after this pass.")
@click.option("--dot", is_flag=True, help="Print the final graph for Graphviz: ... --dot | dot -Tsvg > graph.svg")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def inspect(artifact: Path, kernel: str | None, graph: bool, after: str | None, dot: bool, as_json: bool) -> None:
    """Show what an artifact holds: every weight, kernel and fallback. Runs nothing of it."""
    from qcompile.runtime.model import CompiledModel
    from qcompile.runtime.store import read

    model = CompiledModel(read(artifact))
    if kernel is not None:
        kernels = model.kernels()
        if kernel not in kernels:
            known = ", ".join(sorted(kernels)) or "no kernels"
            raise click.BadParameter(f"{kernel!r} is not one of {known}", param_hint="--kernel")
        click.echo(_plain(kernels[kernel].source))
    elif graph or after is not None:
        click.echo(_plain(model.graph(after)))
    elif dot:
        click.echo(model.dot(), nl=False)
    elif as_json:
        click.echo(json.dumps(model.report.to_json(), indent=1))
    else:
        click.echo(_plain(model.report))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The checkpoint folder to write.")
def export(artifact: Path, output: Path) -> None:
    """Write ARTIFACT as a checkpoint of its quantization method, for the method's own package. Runs nothing of it."""
    from qcompile.runtime.model import CompiledModel
    from qcompile.runtime.store import read

    CompiledModel(read(artifact)).export_checkpoint(output)


@main.command()
@click.argument("source")
@click.option("--to", "method", metavar="METHOD", help="The method to convert to; its config is found from the source.")
@click.option("--config", help="The whole config to convert to: JSON, or a JSON file.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The checkpoint folder to write.")
@click.option(
    "--unrounded", is_flag=True, help="Compare weights before the rounding that each method's decoding ends with."
)
@click.option("--json", "as_json", is_flag=True, help="Print the proof as JSON.")
def convert(source: str, method: str | None, config: str | None, output: Path, unrounded: bool, as_json: bool) -> None:
    """Repack the quantized checkpoint SOURCE for another method; no weight changes, or it is an error that says why."""
    import qcompile

    given = _config(config)
    if given is not None:
        wanted: Any = {**given, **({} if method is None else {"quant_method": method})}
    elif method is not None:
        wanted = method
    else:
        raise click.UsageError("one of --to and --config is needed")
    done = qcompile.convert(source, wanted, output, rounded=not unrounded)
    click.echo(json.dumps(done.to_json(), indent=1) if as_json else _plain(done))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt-length", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of prefill.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to decode.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@execution_options
def bench(
    artifact: Path, prompt_length: int, new_tokens: int, as_json: bool, trusted: bool, target: str | None,
    threads: int | None,
) -> None:  # fmt: skip
    """Time loading, prefill and decode of a compiled language model on this machine: the best of three."""
    import torch

    start = time.perf_counter()
    model = _load(artifact, target, trusted, threads)
    result = {"load s": time.perf_counter() - start}
    ids = (torch.arange(prompt_length) % model.artifact.model_config.get("vocab_size", prompt_length))[None]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, eos_token_id=[])
        return time.perf_counter() - start

    seconds(2)
    prefill = min(seconds(1) for _ in range(3))
    decode = min(seconds(new_tokens + 1) for _ in range(3)) - prefill
    result |= {"prefill tokens/s": prompt_length / prefill, "decode tokens/s": new_tokens / decode}
    lines = [f"{name:18} {value:10.2f}" for name, value in result.items()]
    click.echo(json.dumps(result) if as_json else "\n".join(lines))


def _shapes(_: Any, __: Any, text: str | None) -> list[tuple[int, int]]:
    """(N, K) pairs from "4096x4096,14336x4096"."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in (text or "").split(",") if part.strip()]
    if None in found:
        raise click.BadParameter(f"{text!r} is no list of shapes, such as 4096x4096,14336x4096")
    return [(int(match[1]), int(match[2])) for match in found if match is not None]


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--shapes", callback=_shapes, metavar="NxK,...", help="Linear layers of these sizes instead of ARTIFACT.")
@click.option("--config", help="With --shapes: the quantization config, as for compile.")
@click.option("--target", default="cuda", show_default=True, help="One GPU; `cuda` is that of this machine.")
@click.option(
    "--write", "output", type=click.Path(path_type=Path),
    help="The table to write; what it has of other kernels stays. Default: schedules.json in qcompile's cache folder.",
)  # fmt: skip
@click.option("--most", type=click.IntRange(min=1), default=12, show_default=True, help="Schedules to time a kernel.")
@click.option("--dry-run", is_flag=True, help="Show the candidates and their modelled times; needs no GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the candidates as JSON.")
def tune(
    artifact: Path | None, shapes: list[tuple[int, int]], config: str | None, target: str, output: Path | None,
    most: int, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time schedules of ARTIFACT's linear kernels on this machine's GPU, and keep the fastest for later compiles."""
    from qcompile import tuning
    from qcompile.lowering.triton import tables
    from qcompile.runtime.cache import cache_folder
    from qcompile.runtime.store import read

    if (artifact is None) == (not shapes):
        raise click.UsageError("one of ARTIFACT and --shapes is needed")
    code = tuning.code_of(target)
    timer = None if dry_run else tuning.GpuTimer(code)
    models = [read(artifact)] if artifact is not None else tuning.layers(shapes, _config(config))
    place = tables.user_file(cache_folder()) if output is None else output

    def keep(rows: Sequence[tuning.Row]) -> None:
        assert timer is not None
        tables.write(place, tuning.best(rows, code.capability, timer.name))

    with _progress(not as_json) as progress:
        rows = tuning.tune(models, code, timer, most, progress, keep)
    click.echo(json.dumps([row.to_json() for row in rows], indent=1) if as_json else tuning.show(rows))
    if timer is not None:
        click.echo(f"written to {place}", err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def formats(as_json: bool) -> None:
    """List every storage format with its bits a weight, and the kernels that read it."""
    from qcompile.support import markdown, rows

    click.echo(json.dumps([asdict(row) for row in rows()], indent=1) if as_json else markdown(rows()))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the targets as JSON.")
def targets(as_json: bool) -> None:
    """List the targets, and which of them run on this machine."""
    from qcompile.target import CPU_LEVELS, GPUS, PTX, code_here, gpu_names, target

    gpus = [*map(target, gpu_names("cuda")), PTX, *map(target, gpu_names("rocm"))]
    known = [*CPU_LEVELS.values(), *gpus, target("reference")]
    native = next((item.name for item in known if not item.missing() and item.backend == "cpu"), None)
    table = [{"target": item.name, "runs here": not item.missing(), "missing": item.missing()} for item in known]
    own = {family: code.name for family in GPUS if (code := code_here(family)) is not None}
    if as_json:
        click.echo(json.dumps({"native": native, "gpu": next(iter(own.values()), None), "targets": table}, indent=1))
        return
    click.echo(f"cpu and cpu:native mean {native or 'nothing'} on this machine")
    click.echo(f"cuda means {own.get('cuda', 'nothing')} and rocm {own.get('rocm', 'nothing')} on this machine")
    for item in known:
        lacks = ", ".join(item.missing())
        click.echo(f"{item.name:22} {f'here lacks {lacks}' if lacks else 'runs here'}")
    click.echo("reference:DEVICE runs on any torch device; every other target can be compiled for anywhere")
    click.echo(
        "cuda:sm_80,sm_90 compiles for several GPUs at once; cuda:ptx, which newer ones run, is always with them"
    )
