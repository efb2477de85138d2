"""What cannot be captured is refused with the place, the cause and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import decoder
from torch import nn
from torch.export import Dim

from qcompile.capture import capture
from qcompile.capture.attention import CausalMask, read_mask
from qcompile.errors import CaptureError, CheckpointError, ConfigError, QCompileError


def error_of(kind: type[QCompileError], *args: Any, **kwargs: Any) -> QCompileError:
    with pytest.raises(kind) as caught:
        capture(*args, **kwargs)
    return caught.value


class Branch(nn.Module):
    """Asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Picky())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Counter(nn.Module):
    """Changes its own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


class Conditional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.shape[0] > 4, lambda y: y + 1, lambda y: y - 1, (x,))


def test_a_branch_on_a_value():
    error = error_of(CaptureError, Branch(), example_inputs=(torch.randn(2, 4),))
    assert error.summary == "Branch cannot be exported to a graph"
    line = Picky.forward.__code__.co_firstlineno + 1
    assert error.where == f"inner.1, {__file__}:{line} in forward"
    assert "data-dependent" in error.found and len(error.found) <= 600
    assert (
        error.expected
        == "a forward whose control flow depends on shapes and settings only, not on the values of tensors"
    )
    assert error.remedy == (
        "rewrite that line with tensor operators, or make the dimension it names fixed in dynamic_shapes"
    )


def test_a_model_that_writes_to_itself():
    error = error_of(CaptureError, Counter(), example_inputs=(torch.randn(2),))
    assert str(error) == (
        "the model changes its own state when it runs\n"
        "  where:    calls\n"
        "  expected: a model whose outputs depend on its inputs and parameters alone\n"
        "  try:      call model.eval() first, or return the new state as an output"
    )


def test_a_region_of_control_flow():
    shapes = {"x": {0: Dim("n", max=100)}}
    error = error_of(CaptureError, Conditional(), example_inputs=(torch.randn(7),), dynamic_shapes=shapes)
    assert error.summary == "the graph holds a region of the kind 'cond'"
    assert error.remedy.startswith("write the model without torch.cond")


def test_a_module_without_inputs():
    assert str(error_of(ConfigError, nn.Linear(2, 2))) == (
        "example_inputs are needed to export a module\n"
        "  where:    Linear\n"
        "  try:      pass example_inputs=(tensor, ...) and dynamic_shapes, as for torch.export"
    )


def test_a_size_that_the_model_fixes():
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(6)

    shapes = {"x": {0: Dim("n")}}
    error = error_of(CaptureError, Fixed(), example_inputs=(torch.randn(6),), dynamic_shapes=shapes)
    assert error.summary == "Fixed cannot be exported to a graph" and "n" in error.found


def test_a_module_that_cannot_be_copied():
    model = nn.Linear(2, 2)
    model.lock = (x for x in ())
    error = error_of(CaptureError, model, example_inputs=(torch.randn(1, 2),))
    assert error.summary == "Linear cannot be copied" and "generator" in error.found


def test_inputs_for_a_checkpoint(tmp_path):
    error = error_of(ConfigError, tmp_path, example_inputs=(torch.zeros(1),))
    assert error.summary == "example_inputs and dynamic_shapes are for modules"


@pytest.mark.parametrize("name", ["no/such/folder", "../up", "", "a b"])
def test_a_path_that_is_nothing(name):
    error = error_of(CheckpointError, name)
    assert str(error).startswith("there is no such model\n")
    assert error.expected == "a folder, a .gguf file, or the id of a model on the Hub"


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def fail(name: str, **_: Any) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert str(error_of(CheckpointError, "someone/model")) == (
        "the model is no folder here and cannot be downloaded\n"
        "  where:    someone/model\n"
        "  found:    OSError: no network\n"
        "  try:      check the name and the network, or pass the path of a folder"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoder("llama").save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_folder_without_config(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert str(error_of(CheckpointError, tmp_path)) == (
        "there is no config.json\n"
        f"  where:    {tmp_path}\n"
        "  found:    notes.txt\n"
        "  expected: a folder as save_pretrained writes it"
    )
    (tmp_path / "notes.txt").unlink()
    assert error_of(CheckpointError, tmp_path).found == "an empty folder"


def test_a_file_of_a_checkpoint_is_no_model(folder):
    error = error_of(CheckpointError, folder / "model.safetensors")
    assert (error.found, error.remedy) == ("a file .safetensors", f"pass the folder: {folder}")


@pytest.mark.parametrize(
    "content, summary", [("{", "config.json is not JSON"), ("[1]", "config.json is not a JSON object")]
)
def test_a_broken_config(folder, content, summary):
    (folder / "config.json").write_text(content)
    assert error_of(CheckpointError, folder).summary == summary


def test_an_unknown_architecture(folder):
    edit(folder, architectures=["EvilForCausalLM"], auto_map={"AutoModelForCausalLM": "evil.EvilForCausalLM"})
    (folder / "evil.py").write_text("raise SystemExit('this must never run')")
    error = error_of(CaptureError, folder)
    assert error.summary == "the architecture is not known" and error.found == "EvilForCausalLM"
    assert error.expected.startswith("LlamaForCausalLM, ")
    assert error.remedy == "update transformers; models that bring their own code are not supported"


def test_a_class_of_another_config_is_not_an_architecture(folder):
    edit(folder, architectures=["GPT2LMHeadModel"])
    assert error_of(CaptureError, folder).found == "GPT2LMHeadModel"


def test_an_unknown_model_type(folder):
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    error = error_of(CaptureError, folder)
    assert error.summary == "the config is not one that transformers reads" and "evil" in error.found
    edit(folder, model_type=None)
    assert error_of(CaptureError, folder).summary == "config.json names no model_type"


def test_a_config_that_makes_no_model(folder):
    edit(folder, num_attention_heads=0)
    assert error_of(CaptureError, folder).summary in (
        "the config is not one that transformers reads",
        "LlamaForCausalLM cannot be built from its config.json",
    )


def test_example_inputs_that_are_one_tensor():
    error = error_of(ConfigError, torch.nn.Linear(4, 4), example_inputs=torch.ones(1, 4))
    assert (error.found, error.remedy) == ("Tensor", "for a single input, pass example_inputs=(tensor,)")


def test_more_layers_than_tensors(folder):
    edit(folder, num_hidden_layers=10**9)
    assert str(error_of(CheckpointError, folder)) == (
        "the config has more layers than the checkpoint has tensors\n"
        f"  where:    the checkpoint {folder}\n"
        "  found:    num_hidden_layers = 1000000000\n"
        "  expected: at most 21\n"
        "  try:      check that the checkpoint is complete and belongs to this config"
    )


def rewrite(folder: Path, drop: str = "", **more: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items() if name != drop}
    save_file(tensors | more, file)


def test_a_missing_tensor(folder):
    rewrite(folder, "model.layers.1.mlp.up_proj.weight")
    assert str(error_of(CheckpointError, folder)) == (
        "1 tensors of the architecture are not in the checkpoint\n"
        f"  where:    the checkpoint {folder}\n"
        "  found:    20 tensors\n"
        "  expected: model.layers.1.mlp.up_proj.weight\n"
        "  try:      check that the checkpoint is complete and belongs to this config.json"
    )


def test_a_tensor_of_another_shape(folder):
    rewrite(folder, **{"model.norm.weight": torch.ones(32)})
    assert str(error_of(CheckpointError, folder)) == (
        "tensor 'model.norm.weight' has another shape than the architecture\n"
        f"  where:    the checkpoint {folder}\n"
        "  found:    [32]\n"
        "  expected: [64]\n"
        "  try:      check that the checkpoint belongs to this config.json"
    )


def test_an_extra_tensor_stays_in_the_ledger(folder):
    rewrite(folder, **{"model.layers.0.extra": torch.ones(2)})
    program = capture(folder)
    for name in program.tensors:
        program.load(name, name)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.extra: not used"):
        program.ledger.check()


def test_a_model_object_that_is_quantized_already():
    model = decoder("llama")
    model.hf_quantizer = object()
    error = error_of(CaptureError, model)
    assert error.summary == "the model object is quantized already"
    assert error.remedy == "pass the folder of the quantized checkpoint, or the float model and a config"


def test_a_decoder_with_position_biases():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=101, hidden_size=64, n_layer=1, n_head=4)
    error = error_of(CaptureError, BloomForCausalLM(config).eval())
    assert str(error) == (
        "BloomForCausalLM takes no position_ids\n"
        "  where:    BloomForCausalLM\n"
        "  expected: a decoder with rotary or learned positions\n"
        "  try:      pass example_inputs to export it as a plain module, without a cache"
    )


def test_masks_are_read_or_refused():
    from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function
    from transformers.masking_utils import sliding_window_causal_mask_function as sliding

    assert read_mask(causal_mask_function) == CausalMask(0)
    assert read_mask(sliding(17)) == CausalMask(17)
    chunked = chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64))
    for function in (chunked, lambda b, h, q, k: k % 2 == 0, lambda b, h, q, k: k >= 0):
        with pytest.raises(CaptureError) as caught:
            read_mask(function)
        assert caught.value.summary == "the model masks its attention in an unknown way"
        assert caught.value.expected == "a causal mask, or a causal mask with a sliding window"
