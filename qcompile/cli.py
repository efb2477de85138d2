"""The command line: compile, run, inspect, bench, formats, targets.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 an error of qcompile's own kind, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qcompile.errors import QCompileError


class Commands(click.Group):
    """Prints qcompile's own errors as they are, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QCompileError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qcompile")
def main() -> None:
    """Compile quantized models ahead of time, and run what came out."""


def _config(text: str | None) -> Any:
    """A quantization config from JSON text or from the path of a JSON file."""
    if text is None:
        return None
    path = Path(text)
    source = path.read_text() if path.suffix == ".json" and path.exists() else text
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"neither a JSON file nor JSON: {error}", param_hint="--config") from None


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[str, str], None] | None]:
    """A line on stderr that says what is being done and for how long; nothing when stderr is not a terminal."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda stage, on: progress.update(task, description=f"{stage}  {on}")


@main.command("compile")
@click.argument("model")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The artifact folder to write.")
@click.option("--config", help="Quantization config: JSON, or a JSON file. Default: the checkpoint's own.")
@click.option("--target", default="cpu", show_default=True, help="See `qcompile targets`.")
@click.option("--accuracy", type=click.Choice(["exact", "int8"]), default="exact", show_default=True)
@click.option("--strict", is_flag=True, help="An operation without a kernel is an error instead of a fallback.")
@click.option("--print-after", "print_after", multiple=True, metavar="PASS", help="Print the graph after this pass.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def compile_command(
    model: str, output: Path, config: str | None, target: str, accuracy: str, strict: bool,
    print_after: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Compile MODEL: a Hugging Face folder or hub id, or a .gguf file."""
    import qcompile

    def show(name: str, text: str) -> None:
        click.echo(f"# after {name}\n{text}")

    with _progress(not as_json) as progress:
        compiled = qcompile.compile(
            model, _config(config), target=target, accuracy=accuracy, strict=strict,
            print_after=print_after, show=show, progress=progress,
        )  # fmt: skip
        compiled.save(output)
    click.echo(json.dumps(compiled.report.to_json(), indent=1) if as_json else str(compiled.report))


def _load(artifact: Path, target: str | None, trusted: bool) -> Any:
    import qcompile

    return qcompile.load(artifact, target=target, native="trusted" if trusted else "rebuild")


def _tokenizer(path: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise click.ClickException("text needs a tokenizer: pip install 'qcompile[transformers]'") from None
    if path.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    return AutoTokenizer.from_pretrained(path)


trusted_option = click.option(
    "--trusted", is_flag=True, help="Run the native code in the artifact instead of building the kernels again."
)
target_option = click.option("--target", help="Run on this target instead of the artifact's own.")


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.argument("prompt")
@click.option("--tokenizer", required=True, help="Folder, hub id or .gguf file that holds the tokenizer.")
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--temperature", type=float, help="Sample at this temperature; greedy without it.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chat/--no-chat", default=False, help="Wrap the prompt in the tokenizer's chat template.")
@trusted_option
@target_option
def run(
    artifact: Path, prompt: str, tokenizer: str, max_new_tokens: int, temperature: float | None, seed: int, chat: bool,
    trusted: bool, target: str | None,
) -> None:  # fmt: skip
    """Generate text from PROMPT with a compiled language model, as it comes."""
    model, words = _load(artifact, target, trusted), _tokenizer(tokenizer)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = words(prompt, return_tensors="pt").input_ids
    made: list[int] = []

    def stream(token: Any) -> None:
        before = words.decode(made)
        made.append(int(token))
        click.echo(words.decode(made)[len(before) :], nl=False)

    start = time.perf_counter()
    model.generate(
        ids, max_new_tokens=max_new_tokens, do_sample=temperature is not None, temperature=temperature or 1.0,
        seed=seed, streamer=stream,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    click.echo()
    click.echo(f"{len(made)} tokens, {len(made) / seconds:.1f} tokens/s with the prompt's {ids.shape[1]}", err=True)


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--kernel", help="Print the source of this kernel.")
@click.option("--graph", is_flag=True, help="Print the final graph.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def inspect(artifact: Path, kernel: str | None, graph: bool, as_json: bool) -> None:
    """Show what an artifact holds: every weight, kernel and fallback. Runs nothing of it."""
    from qcompile.runtime import store

    opened = store.read(artifact)
    if kernel is not None:
        if kernel not in opened.sources:
            raise click.BadParameter(f"the artifact has {', '.join(sorted(opened.sources))}", param_hint="--kernel")
        click.echo(opened.sources[kernel])
    elif graph:
        click.echo(opened.graph_text)
    elif as_json:
        click.echo(json.dumps(opened.report.to_json(), indent=1))
    else:
        click.echo(str(opened.report))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt-length", default=128, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@trusted_option
@target_option
def bench(
    artifact: Path, prompt_length: int, new_tokens: int, as_json: bool, trusted: bool, target: str | None
) -> None:
    """Time loading, prefill and decode of a compiled language model on this machine."""
    import torch

    start = time.perf_counter()
    model = _load(artifact, target, trusted)
    result = {"load s": time.perf_counter() - start}
    ids = torch.arange(1, prompt_length + 1)[None]
    model.generate(ids, max_new_tokens=2)
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=new_tokens + 1, eos_token_id=-1)
    decode = time.perf_counter() - start - prefill
    result |= {"prefill tokens/s": prompt_length / prefill, "decode tokens/s": new_tokens / decode}
    lines = [f"{name:18} {value:10.2f}" for name, value in result.items()]
    click.echo(json.dumps(result) if as_json else "\n".join(lines))


@main.command()
@click.option("--json", "as_json", is_flag=True)
def formats(as_json: bool) -> None:
    """List every storage format with its bits per weight, and the backends that run it."""
    from qcompile.support import format_rows, markdown

    click.echo(json.dumps(format_rows()) if as_json else markdown(format_rows()))


@main.command()
@click.option("--json", "as_json", is_flag=True)
def targets(as_json: bool) -> None:
    """List the targets, and which of them run on this machine."""
    from qcompile.target import CPU_LEVELS, native, target

    known = [*CPU_LEVELS.values(), target("reference")]
    rows = [{"target": item.name, "runs here": not item.missing(), "missing": item.missing()} for item in known]
    if as_json:
        click.echo(json.dumps({"native": native().name, "targets": rows}))
        return
    click.echo(f"cpu and cpu:native mean {native().name} on this machine")
    for row in rows:
        state = "runs here" if row["runs here"] else f"cross-compiles; here lacks {', '.join(row['missing'])}"
        click.echo(f"{row['target']:22} {state}")
