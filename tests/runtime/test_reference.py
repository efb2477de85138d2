"""The graph as data, run by torch: equal to the program it came from, for modules and for language models."""

from __future__ import annotations

import artifacts
import pytest
import tiny_programs as tiny
import torch
import transformers
from torch import nn

from qcompile import codec
from qcompile.artifact import Artifact, Buffer, Graph, GraphNode
from qcompile.backend import CpuBackend
from qcompile.errors import ArtifactError, ConfigError
from qcompile.graphjson import graph_of
from qcompile.passes.base import Context, run_pipeline
from qcompile.passes.pipelines import FULL, pipeline
from qcompile.runtime.check import check_graph
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.reference import ReferenceSession
from qcompile.runtime.store import Contents
from qcompile.target import native

FLOAT = tuple(name for name in FULL if name not in ("quantize", "account-for-weights"))


def again(graph: Graph) -> Graph:
    """The graph after a trip through its file."""
    return codec.decode(Graph, codec.parse(codec.render(codec.encode(graph)), "graph.json"), "graph.json")


def test_a_graph_runs_and_frees_what_nobody_needs():
    run = ReferenceSession(again(artifacts.arithmetic_graph()), {"w": torch.arange(8.0).view(2, 4)})
    x = torch.randn(2, 4)
    t = x + torch.arange(8.0).view(2, 4)
    assert torch.equal(run({"x": x})["y"], t * x + t)
    assert run.dead == [[], ["x"], ["t1", "t2"]]


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ConfigError, match=f"torch cannot use this device\n  where:    target 'reference:{device}'\n"):
        ReferenceSession(artifacts.arithmetic_graph(), {"w": torch.zeros(2, 4)}, device)


def test_a_returned_input_or_weight_is_a_copy():
    graph = Graph((Buffer("x", "f32", (2,), "input"),), (), (), {"x": {"node": "x"}, "w": {"tensor": "w"}})
    x, w = torch.ones(2), torch.zeros(3)
    got = ReferenceSession(graph, {"w": w})({"x": x})
    assert got["x"].data_ptr() != x.data_ptr() and got["w"].data_ptr() != w.data_ptr()


def test_what_is_missing_or_fails_is_named():
    with pytest.raises(ArtifactError, match="a weight is missing\n  where:    w"):
        ReferenceSession(artifacts.arithmetic_graph(), {})
    bad = Graph(
        (Buffer("x", "f32", (2,), "input"),), (), (GraphNode("y", "aten.mm.default", ({"node": "x"},) * 2),), {}
    )
    with pytest.raises(ArtifactError, match=r"an operation failed\n  where:     \(y = aten.mm.default\)"):
        ReferenceSession(bad, {})({"x": torch.ones(2)})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        rows = x.reshape(-1, 8)
        h = torch.where(rows.sum(1, keepdim=True) > 0, self.norm(self.a(rows)), torch.full((), -1.5))
        first, second = h.chunk(2, dim=1)
        return self.b(torch.cat([first * second.sigmoid(), second], dim=1)).view(x.shape[0], x.shape[1] // 2, 8)


@pytest.mark.parametrize("regions", [False, True])
def test_a_module_with_sizes_regions_and_dtypes(regions):
    torch.manual_seed(0)
    net = Net()
    made = tiny.program(net, torch.randn(3, 4, 8), dynamic={0: "b"})
    backend = {"backend": CpuBackend(native())} if regions else {}
    run_pipeline(made, pipeline(FLOAT), Context(made.report, **backend))
    graph = graph_of(made)
    assert again(graph) == graph
    if regions:
        assert any("." in node.name for node in graph.nodes), "no region was formed"
    run = ReferenceSession(graph, made.tensors, sizes=made.sizes)
    for b in (1, 3, 7):
        x = torch.randn(b, 4, 8)
        torch.testing.assert_close(run({"x": x})["y"], net(x))


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    from qcompile.capture import capture

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    program = capture(model)
    run_pipeline(program, pipeline(FLOAT), Context(program.report))
    graph = again(graph_of(program))
    tensors = {name: program.tensors[name] for name in check_graph(graph)}
    artifact = Artifact(
        "reference", "causal-lm", graph=graph, sizes=program.sizes, model_config=program.model_config,
        generation={"eos_token_id": 2, "pad_token_id": 0},
    )  # fmt: skip
    return model, CompiledModel(Contents(artifact, tensors, report=program.report.to_json()))


def prompts(*lengths, seed=0):
    """Left-padded random prompts and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return ids * mask, mask


@torch.no_grad()
def test_logits_are_the_models(llama):
    model, q = llama
    ids, mask = prompts(9, 9)
    out = q(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(out.logits, model(input_ids=ids).logits)
    assert type(out) is transformers.modeling_outputs.CausalLMOutputWithPast and out.past_key_values is None
    torch.testing.assert_close(q(ids).logits, out.logits)
    assert torch.equal(q(ids, return_dict=False)[0], out.logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens(llama, side):
    model, q = llama
    ids, mask = prompts(4, 9, 7)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    logits, real = q(input_ids=ids, attention_mask=mask).logits, mask.bool()
    for row in range(3):
        alone = model(input_ids=ids[row][real[row]][None]).logits[0]
        torch.testing.assert_close(logits[row][real[row]], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_conversation_continues(llama):
    _, q = llama
    ids, mask = prompts(8, 12)
    whole = q(input_ids=ids, attention_mask=mask).logits
    first = q(input_ids=ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    second = q(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)
    assert second.past_key_values.length == 12
    torch.testing.assert_close(q(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(q(ids, mask, logits_to_keep=torch.tensor([3, 1])).logits, whole[:, [3, 1]])


@torch.no_grad()
def test_generation_is_the_models(llama):
    model, q = llama
    ids, mask = prompts(3, 8, 6, seed=1)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(q.generate(ids, mask, max_new_tokens=40), wanted)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(q.generate(ids, mask, max_new_tokens=40, eos_token_id=[]), free)


def test_sampling_is_repeatable(llama):
    _, q = llama
    ids, mask = prompts(3, 8)
    options = {"max_new_tokens": 12, "do_sample": True, "top_p": 0.9, "eos_token_id": []}
    first, same, other = (q.generate(ids, mask, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"input_ids": torch.full((1, 3), 99)}, "where:    input_ids\n  found:    99\n  expected: 0 to 98"),
        ({"input_ids": torch.ones(3)}, "input_ids is not a batch of token ids\n  found:    [3]"),
        ({}, "input_ids is not a batch of token ids\n  found:    NoneType"),
        ({"input_id": 1}, "an input is not known, did you mean 'input_ids'?"),
        ({"input_ids": torch.ones(1, 3).long(), "past_key_values": ()}, "past_key_values is not a state of this model"),
        ({"input_ids": torch.ones(1, 200).long()}, "'s' is out of range\n  found:    200\n  expected: 1 to 128"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(llama, inputs, text):
    with pytest.raises(ConfigError) as error:
        llama[1](**inputs)
    assert text in str(error.value)


def test_a_conversation_ends_where_the_model_does(llama):
    with pytest.raises(ConfigError, match="longer than the model was compiled for\n  found:    140 positions"):
        llama[1].generate(torch.ones(1, 100).long(), max_new_tokens=40)
