"""README.md's Python runs, on a tiny checkpoint that stands for the one it names; all pages' links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models
import torch

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the blocks read: the float checkpoint `SmolLM2-135M-Instruct`."""
    place = tmp_path_factory.mktemp("readme")
    tiny_models.decoder("llama").save_pretrained(place / "SmolLM2-135M-Instruct")
    return place


@pytest.fixture(scope="module")
def names():
    """Blocks go on where the ones before ended; these are the names that the text explains in words."""
    return {"input_ids": torch.tensor([[5, 6, 7]])}


@pytest.mark.xdist_group("readme")  # in one process, in order
@pytest.mark.parametrize("text", BLOCKS, ids=lambda text: text.split("\n")[0])
def test_blocks_run(text, place, names, monkeypatch, capsys):
    monkeypatch.chdir(place)
    line = (ROOT / "README.md").read_text().split(text)[0].count("\n")
    exec(compile("\n" * line + text, str(ROOT / "README.md"), "exec"), names)
    shown = capsys.readouterr().out
    assert [expected for expected in re.findall(r"#: (.*)", text) if expected not in shown] == []


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"`((?:qcompile|passes|lowering|runtime|tests|examples|benchmarks|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
