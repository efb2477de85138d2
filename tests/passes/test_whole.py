"""Whole models through the whole pipeline: the shape of the result, and its numbers after every pass."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_programs import ops

from qcompile.backend import CpuBackend
from qcompile.capture import capture
from qcompile.errors import CaptureError
from qcompile.passes.base import Context, run_pipeline
from qcompile.passes.graph import arguments
from qcompile.passes.linears import linears
from qcompile.passes.pipelines import FULL, make, pipeline
from qcompile.show import show

transformers = pytest.importorskip("transformers")
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def model(kind: str, **more):
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=96, **sizes)
        made = transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        made = transformers.BertModel(transformers.BertConfig(vocab_size=96, max_position_embeddings=64, **WIDTHS))
    elif kind == "vit":
        made = transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **WIDTHS)
        )
    else:
        more |= {"vocab_size": 96, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
        config = getattr(transformers, f"{kind}Config")(**WIDTHS, **more)
        made = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return made.eval()


def states(made, batch: int, capacity: int) -> dict[str, torch.Tensor]:
    sizes = {"b": batch, "c": capacity}
    return {name: torch.zeros([sizes.get(size, size) for size in port.shape]) for name, port in made.states.items()}


def step(made, ids, past, cache):
    """Logits of all of `ids` [b, s] behind `past` tokens; the cache is written."""
    positions = torch.arange(past, past + ids.shape[1]).expand(ids.shape)
    inputs = {"input_ids": ids, "position_ids": positions.contiguous(), "keep": torch.arange(ids.shape[1])}
    if made.states:
        inputs |= {"past": torch.tensor([past]), "start": torch.zeros(len(ids), dtype=torch.int64), **cache}
    return made.run(**inputs)["logits"]


def through(made, check, ctx=None):
    """Every pass of the pipeline, and `check()` after each."""
    ctx = ctx or Context(made.report, CpuBackend())
    for name in FULL:
        run_pipeline(made, [make(name)], ctx)
        check(name)
    return ctx


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "gpt2"])
def test_decoders_after_every_pass(kind: str) -> None:
    float_model = model(kind)
    made, ids = capture(float_model), torch.randint(1, 96, (2, 6))
    with torch.no_grad():
        expected = float_model(input_ids=ids).logits

    def check(name: str) -> None:
        torch.testing.assert_close(step(made, ids, 0, states(made, 2, 8)), expected, rtol=1e-4, atol=1e-5, msg=name)

    through(made, check)
    cache = states(made, 2, 8)
    parts = [step(made, ids[:, :4], 0, cache), step(made, ids[:, 4:5], 4, cache), step(made, ids[:, 5:], 5, cache)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_a_llama_is_five_operators_a_layer() -> None:
    made = capture(model("Llama"))
    ctx = through(made, lambda name: None)
    work = [op for op in ops(made) if op.startswith(("qcompile", "region")) or "index" in op]
    layer = ["qcompile.linear", "qcompile.cached_attention", "qcompile.linear", "qcompile.linear", "qcompile.linear"]
    assert work == ["qcompile.embedding", "region_0", *layer, *layer, "aten.index.Tensor", "qcompile.linear"]
    views = set(ops(made)) - set(work)
    assert views == {"aten.sym_size.int", "aten.unsqueeze", "aten.slice.Tensor", "aten.reshape", "aten.transpose.int",
                     "<built-in function getitem>"}  # fmt: skip
    specs = [linear.spec for linear in linears(made)][:4]
    assert [(s.n, s.n_out, s.prologue and s.prologue["op"], [e["op"] for e in s.epilogue]) for s in specs] == [
        (128, 128, "rms_norm", []), (64, 64, None, ["add"]), (256, 128, "rms_norm", ["glu"]), (64, 64, None, ["add"]),
    ]  # fmt: skip
    gate, up = (made.weights[f"model.layers.1.mlp.{name}_proj"] for name in ("gate", "up"))
    assert gate.tensors == up.tensors and (gate.row, up.row, gate.n) == (0, 128, 256)
    assert not ctx.report.refusals
    assert made.sizes["c"][0] == 1 and list(made.states)[:2] == ["k_cache_0", "v_cache_0"]


def test_an_encoder_after_every_pass() -> None:
    float_model = model("bert")
    made = capture(float_model)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = {
        "input_ids": torch.randint(1, 96, (2, 7)),
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
    }
    with torch.no_grad():
        expected = float_model(**inputs).last_hidden_state

    def check(name: str) -> None:
        found = made.run(**inputs)["last_hidden_state"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)

    ctx = through(made, check)
    count = Counter(ops(made))
    assert count["qcompile.linear"] == 4 * 2 + 1 and count["aten.layer_norm"] == 5
    assert not {"aten.index.Tensor", "aten.arange", "aten.gelu", "aten.tanh"} & set(count)
    assert {r.pattern for r in ctx.report.refusals} == {"fuse-prologue"}  # its norms are also the residual


def test_a_vision_model_after_every_pass() -> None:
    float_model = model("vit")
    made, pixels = capture(float_model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = float_model(pixel_values=pixels).logits

    def check(name: str) -> None:
        torch.testing.assert_close(made.run(pixel_values=pixels)["logits"], expected, rtol=1e-4, atol=1e-5, msg=name)

    through(made, check)
    attention = [n for n in made.graph.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(attention) == 2 and all(arguments(n)["attn_mask"] is None for n in attention)


def test_tied_heads_share_their_stored_tensor() -> None:
    made = capture(model("Llama", tie_word_embeddings=True))
    ctx = through(made, lambda name: None)
    assert made.weights["lm_head"].tensors == made.weights["model.embed_tokens"].tensors
    assert ctx.report.weights["lm_head"].bytes == 0


def test_a_causal_model_without_attention_is_no_silent_success() -> None:
    made = capture(model("Llama"))
    for node in made.graph.graph.nodes:
        if str(node.target) == "qcompile.attention.default":
            node.args = (*node.args[:4], False, *node.args[5:])
    with pytest.raises(CaptureError, match="no attention was found that could be given a cache"):
        run_pipeline(made, pipeline(("add-kv-cache",)), Context(made.report))


def test_the_text_of_a_program() -> None:
    made = capture(model("Llama"))
    through(made, lambda name: None)
    text = show(made)
    assert (
        "def forward(input_ids: i64[b, s], position_ids: i64[b, s], keep: i64[t], past: i64[1], start: i64[b]," in text
    )
    assert "\"rms_norm -> lanes-dense(dtype='f32')[256, 64] -> glu(silu)\")  # f32[b, s, 128]" in text
    assert "def region_0(" in text and "aten.cos" in text
