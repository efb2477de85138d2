"""Compiling in little memory, and going on after an interruption."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.cli import _bytes
from qcompile.errors import ConfigError
from qcompile.format import Packed
from qcompile.formats.dense import Dense
from qcompile.methods.gptq import Gptq
from qcompile.staging import Spilled, Stage
from qcompile.transform import Applied
from qcompile.transforms.linear import Scale

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 64}

# A compile of everything first, so that all libraries are loaded; then the limit on what a process may write to. What is
# built of kernels does not depend on the size of a model.
LIMITED = """
import resource, sys
import exports
import qcompile
from qcompile import compiler

small, large, out, work, extra, most = sys.argv[1:]
config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
exports.install()
compiler._build = lambda *_: ({}, None)
for target in ("reference", "cuda:sm_90"):
    qcompile.compile(small, config, target=target).save(f"{out}/small-{target}")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + int(extra)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for target in ("reference", "cuda:sm_90"):
    qcompile.compile(large, config, target=target, max_memory=int(most), spill=work).save(f"{out}/{target}")
    print(target, flush=True)
qcompile.compile(large, config, target="reference")
print("there is no limit")
"""


def llama(folder: Path, hidden: int, layers: int) -> int:
    """A Llama with random weights; the bytes of its file."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's RLIMIT_DATA")
def test_a_model_several_times_the_memory_allowed(tmp_path: Path) -> None:
    allowed = 60_000_000
    llama(tmp_path / "small", 128, 1)
    assert llama(tmp_path / "large", 512, 11) > 3 * allowed
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
    paths = [str(tmp_path / name) for name in ("small", "large", "out", "work")]
    args = [sys.executable, "-c", LIMITED, *paths, str(allowed), "30000000"]
    # Each thread of an allocator or a library has memory of its own, which is not what is measured.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(args, capture_output=True, text=True, check=False, env=env)
    assert done.stdout.split() == ["reference", "cuda:sm_90"], done.stderr[-2000:]
    assert done.returncode != 0  # so the limit is one
    assert not list((tmp_path / "work").iterdir())
    qcompile.compile(tmp_path / "large", CONFIG, target="reference").save(tmp_path / "plain")
    weights = [(path / "weights.safetensors").read_bytes() for path in (tmp_path / "plain", tmp_path / "out/reference")]
    assert weights[0] == weights[1]


def test_a_weight_that_does_not_fit_is_an_error_before_any_work(tmp_path: Path) -> None:
    llama(tmp_path / "model", 128, 1)
    with pytest.raises(ConfigError) as error:
        qcompile.compile(tmp_path / "model", CONFIG, target="reference", max_memory=1000)
    assert str(error.value) == (
        "the largest weight does not fit in the memory allowed\n  where:    max_memory\n  found:    1000 bytes\n"
        "  expected: 1572864 bytes or more\n  try:      allow more: a weight is quantized and laid out as a whole"
    )


def test_an_interrupted_compile_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(tmp_path / "model", 64, 2)
    made: list[str] = []
    quantize = Gptq.quantize

    def counted(self: Gptq, config: Any, module: Any, weight: torch.Tensor) -> Packed:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(module.path)
        return quantize(self, config, module, weight)

    monkeypatch.setattr(Gptq, "quantize", counted)
    compile_: Callable[[], Any] = lambda: qcompile.compile(  # noqa: E731
        tmp_path / "model", CONFIG, target="reference", work=tmp_path / "work"
    )
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        compile_()
    stop = 100
    (tmp_path / "work" / "half-written.half").write_bytes(b"torn")
    torn = sorted((tmp_path / "work").glob("*.safetensors"))[0]
    torn.write_bytes(torn.read_bytes()[:100])  # made again
    first = list(made)
    compile_().save(tmp_path / "resumed")
    assert len(made) == 14 + 1 and first == made[:5]
    qcompile.compile(tmp_path / "model", CONFIG, target="reference").save(tmp_path / "plain")
    for name in ("weights.safetensors", "program.json", "graph.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_what_is_staged_comes_back(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    scale = Applied(Scale(), {"scale": torch.rand(6)})
    packed = Packed(Dense("f16"), {"weight": torch.rand(4, 6).half()}, 4, 6, (scale,), bias=torch.rand(4))
    key = stage.key(torch.rand(4, 6), {"bits": 4})
    assert stage.get(key) is None
    stage.put(key, packed)
    found = stage.get(key)
    assert found is not None and found.format == packed.format and found.bias is not None
    assert torch.equal(found.tensors["weight"], packed.tensors["weight"]) and torch.equal(found.bias, packed.bias)
    assert torch.equal(found.before[0].tensors["scale"], scale.tensors["scale"])
    assert stage.key(torch.rand(4, 6), {"bits": 4}) != key != stage.key(torch.rand(4, 6), {"bits": 3})


def test_only_what_was_staged_is_cleared(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "work")
    stage.put(stage.key(torch.rand(2, 3), 1), Packed(Dense(), {"weight": torch.rand(2, 3)}, 2, 3))
    own = tmp_path / "work" / "model.safetensors"
    own.write_bytes(b"somebody's own")
    stage.clear()
    assert list((tmp_path / "work").iterdir()) == [own]
    own.unlink()
    stage.clear()
    assert not (tmp_path / "work").exists()


def test_spilled_tensors_are_equal_and_leave_no_file(tmp_path: Path) -> None:
    large, small = torch.randn(200, 300, dtype=torch.bfloat16), torch.arange(3)
    held = Spilled(tmp_path, {"small": small})
    held["large"] = large
    assert torch.equal(held["large"], large) and held["large"].dtype == large.dtype
    assert held["large"].data_ptr() != large.data_ptr() and held["small"] is small
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 MiB", 1572864), ("77", 77), ("4k", 4000)])
def test_sizes_on_the_command_line(text: str, size: int) -> None:
    assert _bytes(text) == size
