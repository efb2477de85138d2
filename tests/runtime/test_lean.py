"""The runtime needs torch, numpy, llvmlite and safetensors' format only: no compiler, and nothing of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import artifacts
import pytest

from qcompile.runtime.model import CompiledModel
from qcompile.target import native

BLOCKED = [
    "torch_mlir", "triton", "transformers", "gguf", "safetensors", "huggingface_hub", "networkx", "click", "rich",
    "qcompile.passes", "qcompile.lowering", "qcompile.methods", "qcompile.capture", "qcompile.compiler",
    "qcompile.sources", "qcompile.ledger", "qcompile.safetensors_folder", "qcompile.program",
]  # fmt: skip

SCRIPT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
before = set(sys.modules)  # torch itself brings some of torch.export
from qcompile.runtime.load import load
x = torch.ones(2, 4)
for model in (load(sys.argv[1], native="trusted"), load(sys.argv[1], "reference")):
    w = model.weight("lin")
    assert torch.equal(model(x=x)["y"], 2 * (1 + w))
lazy = ("torch.export", "torch._dynamo", "torch._inductor", "torch.onnx")
print(sorted(name for name in sys.modules.keys() - before if name.startswith(lazy) or name.split(".")[0] in BLOCKED))
"""


@pytest.fixture
def path(tmp_path):
    CompiledModel(artifacts.contents(target=native().name)).save(tmp_path / "m.qc")
    return tmp_path / "m.qc"


def test_an_artifact_runs_where_nothing_else_is(path):
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    script = SCRIPT.replace("BLOCKED", repr(BLOCKED))
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
