"""The command line on a tiny checkpoint: what is printed where, and what the process ends with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import click
import pytest
import tiny_models
import torch
from click.testing import CliRunner

import qcompile
from qcompile.cli import main
from qcompile.target import native

CONFIG = {"quant_method": "hqq", "nbits": 4, "group_size": 32}
WORDS = {"[UNK]": 0, **{f"w{i}": i for i in range(3, 101)}, "<end>": 2}


def run(*arguments, code=0):
    """The command's stdout and stderr; its exit code must be `code`."""
    result = CliRunner().invoke(main, [str(item) for item in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint with a tokenizer of words w3, w4 ..., which are the tokens 3, 4 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_models.decoder("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="[UNK]")
    made.chat_template = "{% for message in messages %}w5 {{ message['content'] }} w6{% endfor %}"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(folder, tmp_path_factory):
    """The checkpoint compiled for this machine, as a user would."""
    path = tmp_path_factory.mktemp("compiled") / "m.qc"
    out, err = run("compile", folder, "--config", json.dumps(CONFIG), "-o", path)
    assert "model.layers.*.self_attn.q_proj" in out and "16 weights" in out
    assert err == ""
    return path


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """The checkpoint compiled for the reference target, which takes a moment only."""
    path = tmp_path_factory.mktemp("reference") / "m.qc"
    file = path.with_name("config.json")
    file.write_text(json.dumps(CONFIG))
    out, err = run(
        "compile", folder, "--config", file, "-o", path, "--target", "reference", "--json", "--print-after", "quantize"
    )
    report = json.loads(out)
    assert (report["target"], report["method"]) == ("reference", "hqq")
    assert err.startswith("# after quantize\n") and "qcompile.dequantize" in err and "# after normalise" not in err
    return path


def test_compile_prints_graphs_where_they_are_wanted(folder, tmp_path):
    options = ("-o", tmp_path / "m.qc", "--target", "reference")
    out, _ = run("compile", folder, *options, "--print-after", "*")
    shown = [line.removeprefix("# after ") for line in out.splitlines() if line.startswith("# after ")]
    assert shown == ["normalise", "quantize", "read-parameters", "add-kv-cache"]  # those that changed it
    _, err = run("compile", folder, *options, "--print-after", "quantise", code=1)
    assert err.startswith("error: unknown pass, did you mean 'quantize'?\n  found:    'quantise'\n")


@pytest.mark.parametrize("which", ["artifact", "reference"])
def test_run_prints_the_text_that_the_model_generates(which, folder, request):
    path = request.getfixturevalue(which)
    expected = qcompile.load(path).generate(torch.tensor([[7, 8, 9]]), max_new_tokens=12)[0, 3:].tolist()
    count = expected.index(2) + 1 if 2 in expected else 12
    out, err = run("run", path, "w7 w8 w9", "--tokenizer", folder, "--max-new-tokens", 12)
    assert out.split() == [f"w{token}" if token > 2 else "[UNK]" for token in expected[:count] if token != 2]
    assert err.startswith(f"{count} tokens, ") and err.endswith(" tokens/s, reading the prompt's 3 included\n")


def test_run_samples_and_uses_the_chat_template(reference, folder):
    options = ("--tokenizer", folder, "--max-new-tokens", 6)
    drawn = [run("run", reference, "w7", *options, "--temperature", 2, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert run("run", reference, "w7", *options, "--chat")[0] == run("run", reference, "w5 w7 w6", *options)[0]
    _, err = run("run", reference, "w7", *options, "--temperature", 0, code=1)
    assert err.startswith("error: temperature is out of range\n  found:    0.0\n  expected: a number above 0\n")


def test_text_comes_in_whole_characters(capsys):
    from qcompile.cli import _Stream

    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    stream, shown = _Stream(Bytes()), []
    for byte in "aé€".encode()[:-1]:
        stream(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "", ""]
    stream.finish()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n" and stream.count == 5


def test_inspect_shows_report_graph_and_kernels(artifact):
    out, _ = run("inspect", artifact)
    assert "model.layers.*.mlp.down_proj" in out and "lanes" in out
    report = json.loads(run("inspect", artifact, "--json")[0])
    assert report["target"] == native().name and report["accuracy"] == "exact" and report["fallbacks"] == []
    final = run("inspect", artifact, "--graph")[0]
    assert "\ndef forward(input_ids: i64[b, s], " in final and "qcompile.dequantize" not in final
    before = run("inspect", artifact, "--after", "quantize")[0]
    assert "qcompile.dequantize" in before and "cached_attention" not in before
    drawn = run("inspect", artifact, "--dot")[0]
    assert drawn.startswith("digraph program {\n") and drawn.endswith("}\n")
    assert '  "input_ids" [label="input_ids\\ni64[b, s]"];' in drawn and ' -> "output logits";' in drawn
    kernel = report["weights"]["lm_head"]["kernel"]
    assert "func.func @" in run("inspect", artifact, "--kernel", kernel)[0]


def test_inspect_names_what_there_is(artifact):
    _, err = run("inspect", artifact, "--after", "fuse-nrom", code=1)
    assert err.startswith("error: no graph was kept after 'fuse-nrom', did you mean 'fuse-norm'?")
    _, err = run("inspect", artifact, "--kernel", "gemm", code=2)
    assert "Invalid value for --kernel: 'gemm' is not one of " in err and "linear_gemv_" in err


def test_bench_times_a_language_model(artifact):
    out, _ = run("bench", artifact, "--prompt-length", 200, "--new-tokens", 3, "--threads", 1, "--json")
    figures = json.loads(out)
    assert figures.keys() == {"load s", "prefill tokens/s", "decode tokens/s"} and min(figures.values()) > 0
    out, _ = run("bench", artifact, "--prompt-length", 4, "--new-tokens", 2)
    assert [line[:18].strip() for line in out.splitlines()] == list(figures)


def test_formats_and_targets():
    assert (
        "| bnb4 (table nf4) | [bitsandbytes] | 4.50 | yes | lanes | native | lanes |" in run("formats")[0].splitlines()
    )
    rows = json.loads(run("formats", "--json")[0])
    assert {"format": "eetq", "methods": ["eetq"], "exact": "lanes"}.items() <= next(
        row for row in rows if row["format"] == "eetq"
    ).items()
    out, _ = run("targets")
    assert out.startswith(f"cpu and cpu:native mean {native().name} on this machine\n") and "cpu:aarch64" in out
    data = json.loads(run("targets", "--json")[0])
    assert data["native"] == native().name
    assert {"cuda:sm_80", "cuda:sm_120", "cuda:ptx"} < {row["target"] for row in data["targets"]}
    assert {"target": "reference", "runs here": True, "missing": []} in data["targets"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("compile", "nowhere/at/all", "-o", "x"), 1, "error: there is no such model\n  found:    nowhere/at/all\n"),
        (
            ("compile", ".", "-o", "x", "--target", "cpu:z80"),
            1,
            "error: no target is called 'cpu:z80', did you mean 'cpu'?\n",
        ),
        (("compile", ".", "-o", "x", "--config", "{"), 2, "Invalid value for --config: neither a JSON file nor JSON: "),
        (
            ("compile", ".", "-o", "x", "--config", "c.json"),
            2,
            "--config: neither JSON nor a file: [Errno 2] No such file",
        ),
        (
            ("compile", ".", "-o", "x", "--config", "."),
            2,
            "--config: neither JSON nor a file: [Errno 21] Is a directory",
        ),
        (("compile", ".", "-o", "x", "--config", '{"a":' * 100_000), 2, "neither a JSON file nor JSON: "),
        (("compile", ".", "-o", "x", "--schedules", "s"), 1, "error: only kernels for CUDA have schedules\n"),
        (("compile", ".", "-o", "."), 1, "error: something else is in the way\n  where:    .\n"),
        (("compile", ".", "-o", "x", "--accuracy", "int4"), 2, "'int4' is not one of 'exact', 'int8'."),
        (("compile", "."), 2, "Missing option '--output' / '-o'."),
        (("inspect", "nothing.qc"), 1, "error: no artifact is there\n  where:    nothing.qc\n  found:    nothing\n"),
        (("run", "nothing.qc", "hello"), 2, "Missing option '--tokenizer'."),
        (("run", "nothing.qc", "hello", "--tokenizer", "x", "--threads", "0"), 2, "0 is not in the range x>=1."),
        (("bake",), 2, "No such command 'bake'."),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_wrong_use(arguments, code, text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    out, err = run(*arguments, code=code)
    assert text in err and out == "" and [path.name for path in (tmp_path / "here").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[1]", b'"gptq"'])
def test_a_file_that_holds_no_config(content, tmp_path):
    file = tmp_path / "config.txt"
    file.write_bytes(content)
    _, err = run("convert", tmp_path, "-o", tmp_path / "x", "--config", file, code=2)
    assert "Invalid value for --config: " in err


def test_a_folder_that_cannot_be_written(reference, tmp_path):
    (tmp_path / "file").touch()
    _, err = run("export", reference, "-o", tmp_path / "file" / "below", code=1)
    assert err.startswith("error: [Errno ") and err.count("\n") == 1


def test_names_in_an_artifact_do_not_steer_the_terminal(reference, tmp_path):
    from qcompile.runtime.model import CompiledModel
    from qcompile.runtime.store import read

    contents = read(reference)
    row = next(iter(contents.report["weights"].values()))
    hostile = replace(
        contents,
        report={**contents.report, "weights": {"x": {**row, "path": "a\x1b[2J[/b]:smile:\ud800"}}},
        snapshots={"quantize": "line\n\tb\x9b0m\r"},
    )
    CompiledModel(hostile).save(tmp_path / "m.qc")
    assert "a\\x1b[2J[/b]:smile:\\ud800" in run("inspect", tmp_path / "m.qc")[0]
    assert run("inspect", tmp_path / "m.qc", "--graph")[0] == "line\n\tb\\x9b0m\\r\n"


def test_a_config_that_is_wrong_says_so(folder, tmp_path):
    wrong = json.dumps({"quant_method": "hqq", "nbits": 7})
    _, err = run("compile", folder, "-o", tmp_path / "m.qc", "--config", wrong, code=1)
    assert err.startswith("error: the hqq config has a value out of range\n  where:    field 'nbits'\n  found:    7\n")


def test_a_tokenizer_that_is_not_there(reference, tmp_path):
    _, err = run("run", reference, "w7", "--tokenizer", tmp_path, code=1)
    assert err.startswith(f"Error: no tokenizer in {str(tmp_path)!r}: ") and err.count("\n") == 1


def test_an_artifact_that_was_changed(reference, tmp_path):
    path = shutil.copytree(reference, tmp_path / "m.qc")
    (path / "report.json").write_text("{}")
    _, err = run("inspect", path, code=1)
    assert err.startswith("error: a file has the wrong length\n  where:    report.json\n  found:    2 bytes\n")


def test_a_folder_that_is_no_artifact(folder):
    _, err = run("inspect", folder, code=1)
    assert err.startswith(f"error: no artifact is there\n  where:    {folder}\n  found:    a folder without it\n")


@pytest.mark.parametrize(
    "command", ["", "plan", "compile", "run", "inspect", "export", "convert", "bench", "tune", "formats", "targets"]
)
def test_help_explains_every_option(command):
    out, _ = run(*command.split(), "--help")
    if not command:
        assert all(f"\n  {name} " in out for name in main.commands)
    for parameter in (main.commands[command] if command else main).params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name
