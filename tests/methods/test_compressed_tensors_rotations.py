"""CompressedTensors' rotations that run with the model: by what the real package made and by the definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from in_memory import InMemory, linear
from safetensors.torch import load_file, save_file
from stored_modules import call, value

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.format import Packed
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.compressed_tensors_config import CompressedTensorsConfig
from qcompile.methods.index import method
from qcompile.program import Module

CT = method("compressed-tensors")
Tensors = dict[str, torch.Tensor]
INT8 = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
ROUNDED = INT8 | {"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}


def config(groups: dict[str, Any], scheme: dict[str, Any] | None = None, **more: Any) -> CompressedTensorsConfig:
    said = {
        "config_groups": {"group_0": INT8 if scheme is None else scheme},
        "transform_config": {"config_groups": groups},
    }
    return CompressedTensorsConfig.from_dict(said | more)


def turned(type_: str, *places: tuple[str, bool], targets: str = "Linear", **more: Any) -> dict[str, Any]:
    apply = [{"targets": [targets], "location": location, "inverse": inverse} for location, inverse in places]
    return {"type": type_, "apply": apply} | more


INPUT, OUTPUT = [("input", False), ("weight_input", True)], [("weight_output", False), ("output", True)]


def read(c: CompressedTensorsConfig, module: Module, tensors: Tensors) -> Packed:
    source = InMemory(tensors)
    selected = CT.select(c, module, source, {module.path: module})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims, *selected.keeps} == set(tensors)
    return CT.read(c, module, selected, source)


def hadamard(size: int) -> torch.Tensor:
    whole = torch.ones(1, 1)
    while len(whole) < size:
        whole = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), whole)
    return whole


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signs(size: int) -> torch.Tensor:
    return torch.sign(random(size, seed=size))


def test_a_layer_of_the_real_package() -> None:
    """compressed-tensors 0.20: QuIP with a random Hadamard matrix in front and a random matrix behind."""
    tensors = {
        "fc.weight_scale": torch.tensor(
            [[0.0017568538896739483], [0.004618990700691938], [0.0029119483660906553], [0.0075813159346580505]]
        ),
        "fc.weight_packed": torch.tensor(
            [[-1885334209, 1993523456], [-961785552, 1828704298], [5531800, -1988585302], [4282281, 1920709271]],
            dtype=torch.int32,
        ),
        "fc.weight_shape": torch.tensor([4, 8]),
        "fc.v_input.weight": torch.tensor(
            [[-1, -1, -1, -1, -1, -1, -1, -1], [-1, 1, -1, 1, -1, 1, -1, 1], [1, 1, -1, -1, 1, 1, -1, -1],
             [-1, 1, 1, -1, -1, 1, 1, -1], [1, 1, 1, 1, -1, -1, -1, -1], [1, -1, 1, -1, -1, 1, -1, 1],
             [-1, -1, 1, 1, 1, 1, -1, -1], [-1, 1, 1, -1, 1, -1, -1, 1]], dtype=torch.float32
        ),
        "fc.u_output.weight": torch.tensor(
            [[-4.679153846581356, 5.547648626278783], [2.4144671404805873, -1.12497694871833]], dtype=torch.float64
        ),
    }  # fmt: skip
    places = {"v": turned("random-hadamard", *INPUT), "u": turned("random-matrix", *OUTPUT, head_dim=2)}
    packed = read(config(places), linear("fc", 4, 8), tensors)
    kinds = [each.transform.kind for each in (*packed.before, *packed.after)]
    assert kinds == ["scale", "hadamard", "rotate"]
    x = ((torch.arange(16) * 29 % 31 - 15) / 8).reshape(2, 8)
    bias = torch.tensor([-0.45555347204208374, -0.4686768352985382, 0.14342047274112701, 0.4850289523601532])
    for each in packed.before:
        x = each(x)
    y = packed.after[0](x @ value(packed).t() + bias)
    want = [
        [2.216315269470215, -3.4023475646972656, 0.2880547046661377, -0.5158114433288574],
        [1.7398954629898071, -1.671218752861023, 1.389985203742981, -0.0762658566236496],
    ]
    assert torch.allclose(y, torch.tensor(want), atol=2e-6)


CASES: list[tuple[dict[str, Any], torch.Tensor | None, torch.Tensor | None, list[str]]] = [
    ({"type_": "hadamard"}, None, None, ["hadamard"]),
    ({"type_": "hadamard", "head_dim": 8}, hadamard(8), None, ["hadamard"]),
    ({"type_": "random-hadamard", "head_dim": 16}, hadamard(16) * signs(16)[:, None], None, ["scale", "hadamard"]),
    ({"type_": "random-hadamard"}, signs(32)[:, None] * hadamard(32) * signs(32), None, ["scale", "hadamard", "scale"]),
    ({"type_": "hadamard", "head_dim": 8, "randomize": True}, hadamard(8), torch.randperm(8), ["rotate"]),
    ({"type_": "random-matrix", "head_dim": 4}, random(4, 4).double(), None, ["rotate"]),
]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("said, matrix, order, kinds", CASES, ids=lambda each: "")
def test_rows_go_through_the_stored_matrix(
    said: dict[str, Any], matrix: torch.Tensor | None, order: torch.Tensor | None, kinds: list[str], inverse: bool
) -> None:
    whole = hadamard(32) if matrix is None else matrix.float()
    stored = {} if matrix is None else {"weight": matrix}
    if order is not None:
        stored["perm"], whole = order, whole[order][:, order]
    if said["type_"] != "random-matrix":  # an inverse of another matrix is stored as it is
        whole = (whole.t() if inverse else whole) / len(whole) ** 0.5
    more = {name: each for name, each in said.items() if name != "type_"}
    c = config({"v": turned(said["type_"], ("input", inverse), ("output", inverse), **more)})
    module, weight = linear("fc", 32, 32), random(32, 32)
    plain = CT.write(c, module, CT.quantize(replace(c, transform_config=None), module, weight))
    tensors = {f"fc.{name}": each for name, each in plain.items()}
    # Both sides share one matrix, which a checkpoint holds once, here under another module.
    tensors |= {f"other.v_output.{name}": each for name, each in stored.items()}
    packed = read(c, module, tensors)
    found = [each.transform.kind for each in packed.before]
    assert sorted(found) == sorted(kinds) and [each.transform.kind for each in packed.after] == found
    x = random(3, 32, seed=1)

    def turn(rows: torch.Tensor) -> torch.Tensor:
        return (rows.reshape(3, -1, len(whole)) @ whole).flatten(1)

    want = turn(turn(x) @ value(packed).t())
    assert float((call(packed, x) - want).norm() / want.norm()) < 1e-6
    assert CT.write(c, module, packed).keys() == plain.keys()  # matrices are kept as they are, beside the modules
    selected = CT.select(c, module, InMemory(tensors), {"fc": module})
    assert isinstance(selected, Quantized) and set(selected.keeps) == {f"other.v_output.{name}" for name in stored}


def test_the_order_of_several_turns_and_of_the_rounding() -> None:
    """The last transform of the config is the first that a layer's input meets, and activations are rounded after all."""
    places = {
        "a": turned("hadamard", ("input", False), ("output", False), head_dim=4),
        "b": turned("hadamard", ("input", False), ("output", False), head_dim=8),
    }
    c = config(places, ROUNDED)
    module = linear("fc", 8, 16)
    quantized = CT.quantize(replace(c, transform_config=None), module, random(8, 16))
    tensors = {f"fc.{name}": each for name, each in CT.write(c, module, quantized).items()}
    packed = read(c, module, tensors)
    said = [each.transform.to_json().get("size") for each in (*packed.before, *packed.after)]
    assert said == [8, 4, 0, 4, 8] and packed.before[2].transform.kind == "round-int"
    bare = read(replace(c, dequantize=True), module, tensors)
    assert [each.transform.kind for each in bare.before] == ["hadamard", "hadamard"]
    # A dense module turns too.
    dense = InMemory({"fc.weight": random(8, 16), "other.weight_scale": random(1)})
    selected = CT.select(replace(c, ignore=["fc"]), module, dense, {})
    assert isinstance(selected, Quantized) and selected.names == {"weight": "fc.weight"}
    found = CT.read(replace(c, ignore=["fc"]), module, selected, dense)
    assert found.format.kind == "dense" and len(found.before) == len(found.after) == 2
    elsewhere = config({"a": turned("hadamard", ("input", False), targets="x")}, ignore=["fc"])
    assert isinstance(CT.select(elsewhere, module, dense, {}), Skip)


HEADS = turned("random-hadamard", ("q_attn", False), ("k_cache", False), targets="re:.*self_attn$", head_dim=8)
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


def test_rounded_keys_are_turned_back() -> None:
    """Scores of turned queries with keys that were turned and rounded."""
    matrix = hadamard(8) * signs(8)
    scales = {f"a.self_attn.{side}_scale": torch.tensor([0.02]) for side in "qkv"}
    source = InMemory({"b.self_attn.R3_q_attn.weight": matrix, **scales})
    found = CT.cache(config({"R3": HEADS}, kv_cache_scheme=FP8), "a.self_attn", 2, 16, source)
    assert found is not None and set(found.claims) == set(source.names())
    q, k = random(1, 2, 5, 16), random(1, 2, 5, 16, seed=1)

    def turn(x: torch.Tensor) -> torch.Tensor:
        return (x.unflatten(-1, (2, 8)) @ matrix / 8**0.5).flatten(-2)

    rounded = (turn(k) / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.02
    made = k
    for each in found.k:
        made = each(made)
    assert torch.allclose(q @ made.mT, turn(q) @ rounded.mT, atol=1e-5) and not torch.allclose(made, k, atol=1e-3)
    assert [each.transform.kind for each in found.v] == ["round-float"]
    # Where keys are not rounded, the turns cancel.
    plain = CT.cache(config({"R3": HEADS}), "a.self_attn", 2, 16, source)
    assert plain is not None and plain.k == plain.v == () and plain.claims == ("b.self_attn.R3_q_attn.weight",)


def folder_with_rotations(folder: Path) -> torch.Tensor:
    """A tiny Llama in int8 with QuIP's rotations of every input, as the package stores it; its logits without them."""
    model = tiny_models.decoder("llama")
    matrices = {"v": hadamard(64) * signs(64), "d": torch.linalg.qr(random(96, 96))[0].contiguous()}
    groups = {
        "v": turned("random-hadamard", *INPUT, targets="re:.*(q|k|v|o|gate|up)_proj$"),
        "d": turned("random-matrix", *INPUT, targets="re:.*down_proj$"),
    }
    want = model(tiny_models.inputs(["input_ids"], 2, 6)["input_ids"]).logits.detach()
    for path, layer in model.named_modules():
        if path.endswith("_proj"):
            turn = matrices["d" if path.endswith("down_proj") else "v"].double()
            turn = turn / len(turn) ** 0.5 if len(turn) == 64 else turn
            layer.weight.data = (layer.weight.double() @ torch.linalg.inv(turn).t()).float()
    c = config({}, ignore=["lm_head"], transform_config=None)
    qcompile.compile(model, c.to_dict(), target="reference").export_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.v_input.weight"] = matrices["v"].double()
    tensors["model.layers.0.mlp.down_proj.d_input.weight"] = matrices["d"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"]["transform_config"] = {"config_groups": groups}
    (folder / "config.json").write_text(json.dumps(said))
    return want


def test_a_whole_model_and_its_way_back(tmp_path: Path) -> None:
    want = folder_with_rotations(tmp_path / "in")
    ids = tiny_models.inputs(["input_ids"], 2, 6)
    q = qcompile.compile(tmp_path / "in", target="reference")
    got = q(**ids).logits
    assert float((got - want).norm() / want.norm()) < 2e-2
    q.export_checkpoint(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(after[name].dtype), after[name]) for name in before)
    q.save(tmp_path / "m.qc")
    assert torch.equal(qcompile.load(tmp_path / "m.qc")(**ids).logits, got)
    assert float((qcompile.compile(tmp_path / "in", target="cpu")(**ids).logits - got).norm() / got.norm()) < 1e-5


def message(call_: Any) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        call_()
    return str(caught.value)


def test_what_is_wrong() -> None:
    module = linear("a.fc", 8, 16)
    weight = {"a.fc.weight": random(8, 16).to(torch.int8), "a.fc.weight_scale": torch.ones(8, 1)}
    v = config({"v": turned("random-hadamard", *INPUT)}, ROUNDED)
    assert message(lambda: read(v, module, weight)) == (
        "a transform lacks its matrix\n"
        "  where:    a.fc.v_input.weight\n"
        "  found:    no such tensor, and none of another module that it could share\n"
        "  expected: [16, 16]\n"
        "  try:      the checkpoint is incomplete: it must hold the matrices of transforms that run with the model"
    )
    two = weight | {f"{path}.v_input.weight": torch.ones(16, 16) for path in "bc"}
    assert "found:    b.v_input.weight, c.v_input.weight" in message(lambda: read(v, module, two))
    small = weight | {"a.fc.v_input.weight": torch.ones(8, 8)}
    assert "a transform's matrix has another shape" in message(lambda: read(v, module, small))
    broken = weight | {"a.fc.v_input.weight": torch.full((16, 16), torch.nan)}
    assert "a stored tensor holds a number that is not finite" in message(lambda: read(v, module, broken))
    order = config({"v": turned("hadamard", *INPUT, randomize=True)}, ROUNDED)
    twice = weight | {"a.fc.v_input.weight": torch.ones(16, 16), "a.fc.v_input.perm": torch.zeros(16).long()}
    assert "a stored order does not name each row once" in message(lambda: read(order, module, twice))
    for size in (5, 6):  # no divisor; no power of two
        odd = config({"v": turned("hadamard", *INPUT, head_dim=size)}, ROUNDED)
        assert "a transform does not fit what it acts on" in message(
            lambda c=odd: read(c, linear("a.fc", 8, 12), weight)
        )
    floats = InMemory({"a.fc.weight": random(8, 16)})
    assert message(lambda: CT.select(v, module, floats, {"a.fc": module})).startswith(
        "transforms are put into a model before it is quantized\n  where:    field 'transform_config'\n  found:    v\n"
    )
    table = config({"u": turned("hadamard", ("output", False), targets="Embedding")})
    embedding = replace(module, kind="Embedding")
    assert "a transform of an embedding does not run" in message(
        lambda: CT.select(table, embedding, InMemory(weight), {"a.fc": embedding})
    )
    keys = config({"R3": turned("hadamard", ("k_cache", False), targets="LlamaAttention", head_dim=8)})
    assert "transforms of queries and keys do not cancel" in message(
        lambda: CT.cache(keys, "a.self_attn", 2, 16, InMemory({}))
    )
