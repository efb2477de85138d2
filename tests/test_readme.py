"""README.md's Python runs, on a tiny checkpoint that stands for the one it names; all pages' links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())


def test_blocks_run(tmp_path, monkeypatch, capsys):
    """One after the other: each goes on where the ones before ended."""
    tiny_models.decoder("llama").save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    monkeypatch.chdir(tmp_path)
    readme, names = (ROOT / "README.md").read_text(), dict[str, object]()
    assert len(BLOCKS) >= 2
    for text in BLOCKS:
        line = readme.split(text)[0].count("\n")
        exec(compile("\n" * line + text, str(ROOT / "README.md"), "exec"), names)
        shown = capsys.readouterr().out
        assert [expected for expected in re.findall(r"#: (.*)", text) if expected not in shown] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"`((?:qcompile|passes|lowering|runtime|tests|examples|benchmarks|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
