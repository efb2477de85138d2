"""AQLM and VPTQ: modules made by the published formulas, real checkpoints, and what is said about broken ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize
from codebook_modules import LAYER, OUTLIERS, PLAIN, RESIDUAL, aqlm, floats, vptq
from in_memory import InMemory, linear
from one_module import Tensors, fc, read, weight, written_again
from stored_modules import same_bits

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.aqlm import Aqlm, AqlmConfig
from qcompile.methods.base import Skip
from qcompile.methods.calibrated import Calibrated
from qcompile.methods.vptq import Vptq, VptqConfig

AQLM, VPTQ = Aqlm(), Vptq()


@parametrize("aqlm", "vptq")
def test_a_real_checkpoint_is_written_as_it_is_read(folder: Path) -> None:
    assert written_again(folder)


@pytest.mark.parametrize("shape", [(8, 1, 1, 16), (8, 1, 2, 8), (4, 2, 3, 5), (16, 3, 4, 12), (8, 1, 1, 17)])
def test_aqlm_adds_entries_and_scales(shape: tuple[int, int, int, int]) -> None:
    config = AqlmConfig(*shape)
    tensors, expected = aqlm(config, 18, 48)
    packed = read(AQLM, config, tensors, fc(18, 48))
    assert torch.equal(weight(packed), expected)
    assert same_bits(AQLM.write(config, fc(18, 48), packed), tensors)


@pytest.mark.parametrize("layer", [LAYER, RESIDUAL, OUTLIERS, PLAIN], ids=["main", "residual", "outliers", "plain"])
def test_vptq_looks_up_adds_permutes_and_scales(layer: dict[str, Any]) -> None:
    full, tensors, expected = vptq(layer, 20, 46)  # rows and bits that fill no whole vector or word
    config = VptqConfig(shared_layer_config={"fc": full})
    packed = read(VPTQ, config, tensors, fc(20, 46, bias="fc.bias"))
    assert torch.equal(weight(packed), expected)
    assert same_bits(VPTQ.write(config, fc(20, 46), packed), tensors)
    x = torch.randn(3, 46)
    rows = packed.before[0](x) if packed.before else x
    own = weight(replace(packed, before=()))
    assert torch.allclose(rows @ own.T, x @ expected.T, atol=1e-3)


def test_a_layer_config_is_found_by_path_then_by_name() -> None:
    config = VptqConfig(
        config_for_layers={"a.b.fc": {"vector_lens": [-1, 4]}}, shared_layer_config={"fc": {"vector_lens": [-1, 8]}}
    )
    found = [config.layer(path) for path in ("a.b.fc", "a.c.fc", "a.b.other")]
    assert [layer and layer.vector_lens[1] for layer in found] == [4, 8, None]


def test_which_modules_stay_dense() -> None:
    config = AqlmConfig(linear_weights_not_to_quantize=["lm_head.weight", "up_proj", "model.norm.weight"])
    modules = {path: linear(path, 16, 48) for path in ("lm_head", "up_proj", "fc")}
    float_model = InMemory({f"{path}.weight": floats(16, 48) for path in modules})
    for path in ("lm_head", "up_proj"):
        assert AQLM.select(config, modules[path], float_model, modules) == Skip(
            f"linear_weights_not_to_quantize has '{path}'"
        )
    stored = InMemory({f"fc.{name}": tensor for name, tensor in aqlm(config, 16, 48)[0].items()} | float_model.tensors)
    del stored.tensors["fc.weight"]
    assert AQLM.select(config, modules["lm_head"], stored, modules) == Skip("the checkpoint stores its weight dense")


@pytest.mark.parametrize("method, config", [(AQLM, AqlmConfig()), (VPTQ, VptqConfig())])
def test_a_float_model_is_refused_with_the_reason(method: Calibrated, config: Any) -> None:
    module = fc(16, 48)
    with pytest.raises(ConfigError) as caught:
        method.select(config, module, InMemory({"fc.weight": floats(16, 48)}), {"fc": module})
    assert str(caught.value) == (
        f"{method.name} reads checkpoints and quantizes nothing\n"
        "  where:    fc\n"
        "  found:    a float model\n"
        f"  expected: a checkpoint that {method.name} made: its quantization needs {method.needs}\n"
        "  try:      quantize with the method's own tools, or choose one that needs no data: hqq, higgs, bitsandbytes"
    )
    with pytest.raises(ConfigError, match="reads checkpoints and quantizes nothing"):
        method.quantize(config, module, floats(16, 48))


BELONG = "the checkpoint and its quantization_config do not belong together"
BROKEN_AQLM: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {"codebooks": None},
        "a module quantized with aqlm lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    codes, scales\n"
        "  expected: codes, codebooks, scales\n"
        "  try:      the checkpoint is incomplete: it must hold fc.codebooks",
    ),
    (
        {"codes": torch.zeros(16, 6, 1, dtype=torch.int8)},
        "a stored tensor has the wrong dtype\n"
        "  where:    fc.codes (module fc, 16 outputs, 48 inputs)\n"
        "  found:    i8 [16, 6, 1]\n"
        f"  expected: i16 [16, 6, 1]\n  try:      {BELONG}, or a file is damaged",
    ),
    (
        {"scales": torch.full((16, 1, 1, 1), torch.nan).half()},
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.scales (module fc)\n"
        "  found:    nan at [0, 0, 0, 0]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        {"weight": torch.zeros(16, 48)},
        "a module quantized with aqlm also has a dense weight\n"
        "  where:    fc\n"
        "  found:    fc.weight and fc.codes\n"
        "  expected: one of them\n"
        "  try:      the checkpoint says the weight twice: remove the one that is not meant",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_AQLM)
def test_a_broken_aqlm_checkpoint_is_said_in_full(changes: dict[str, torch.Tensor | None], message: str) -> None:
    config = AqlmConfig(nbits_per_codebook=10)
    kept = {name: t for name, t in (aqlm(config, 16, 48)[0] | changes).items() if t is not None}
    with pytest.raises(CheckpointError) as caught:
        read(AQLM, config, kept, fc(16, 48))
    assert str(caught.value) == message


DAMAGED = "the file is damaged, or belongs to another architecture"
BROKEN_VPTQ: list[tuple[dict[str, torch.Tensor], dict[str, Any] | None, str]] = [
    (
        {"perm": torch.zeros(46, dtype=torch.int16)},
        {},
        "a stored order does not name each input once\n"
        "  where:    fc.perm (module fc)\n"
        "  found:    1 inputs, 0 to 0\n"
        f"  expected: 46 inputs, 0 to 45\n  try:      {DAMAGED}",
    ),
    (
        {"outlier_indices": torch.full((1, 5, 6), -1, dtype=torch.int16)},
        {},
        "an index is out of range\n"
        "  where:    fc.outlier_indices (module fc)\n"
        "  found:    65535\n"
        "  expected: 0 to 15\n"
        "  try:      the file is damaged, or the config says another number of centroids",
    ),
    (
        {},
        {"group_size": 24},
        "the vptq config of a module is for another weight\n"
        "  where:    fc [20, 46]\n"
        "  found:    2 groups of 24 inputs and 6 outliers, 46 inputs, 20 outputs, 32 vectors of 6\n"
        f"  expected: 46 inputs in all\n  try:      {BELONG}",
    ),
    (
        {},
        None,
        "the vptq config has no entry for a quantized module\n"
        "  where:    fc\n"
        "  found:    no entry\n"
        f"  expected: fc in config_for_layers, or fc in shared_layer_config\n  try:      {BELONG}",
    ),
]


@pytest.mark.parametrize(("changes", "fields", "message"), BROKEN_VPTQ)
def test_a_broken_vptq_checkpoint_is_said_in_full(
    changes: Tensors, fields: dict[str, Any] | None, message: str
) -> None:
    layer, tensors, _ = vptq(OUTLIERS, 20, 46)
    config = VptqConfig(config_for_layers={} if fields is None else {"fc": layer | fields})
    with pytest.raises(CheckpointError) as caught:
        read(VPTQ, config, tensors | changes, fc(20, 46))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "fields", "where", "found", "expected"),
    [
        ("Aqlm", {"in_group_size": "8"}, "field 'in_group_size'", "'8'", "a positive integer"),
        (
            "Aqlm",
            {"linear_weights_not_to_quantize": "lm_head"},
            "field 'linear_weights_not_to_quantize'",
            "'lm_head'",
            "None or a list of module names",
        ),
        ("Vptq", {"enable_proxy_error": True}, "field 'enable_proxy_error'", "True", "False"),
        (
            "Vptq",
            {"config_for_layers": {"fc": {"is_indice_packed": False}}},
            "field 'config_for_layers', 'fc', 'is_indice_packed'",
            "False",
            "True",
        ),
    ],
)
def test_what_transformers_refuses_is_refused(
    name: str, fields: dict[str, Any], where: str, found: str, expected: str
) -> None:
    with pytest.raises((ValueError, TypeError)):
        getattr(pytest.importorskip("transformers"), f"{name}Config")(**fields)
    ours = {"Aqlm": AqlmConfig, "Vptq": VptqConfig}[name]
    with pytest.raises(ConfigError) as caught:
        ours.from_dict(fields)
    assert str(caught.value) == (
        f"the {name.lower()} config has a value out of range\n"
        f"  where:    {where}\n  found:    {found}\n  expected: {expected}"
    )


def test_wrong_layer_configs() -> None:
    for layer, what in (
        ({"num_centroids": [-1, 48]}, "powers of two, or -1"),
        ({"vector_lens": 8}, "two integers"),
        ({"num_res_centroids": [4, 4]}, "-1 for the outlier part"),
        ({"norm_dim": 1}, "0"),
    ):
        with pytest.raises(ConfigError) as caught:
            VptqConfig(config_for_layers={"fc": layer})
        assert caught.value.expected == what
    config = VptqConfig(config_for_layers={"fc": {"bias": False, "norm_dim": 0, "colour": 1, "indices_as_float": True}})
    assert VPTQ.effects(config) == [
        ("layer field 'indices_as_float'", "it steers fine-tuning: stored indices are integers"),
        ("layer field 'colour'", "not a field of vptq: ignored"),
    ]
    with pytest.raises(ConfigError, match="unknown field in the aqlm config"):
        AqlmConfig.from_dict({"in_group": 8})


@parametrize("vptq")
def test_a_transformers_config_means_the_same(folder: Path) -> None:
    said: Any = model_config(folder)["quantization_config"]
    fields = {name: value for name, value in said.items() if name != "quant_method"}
    theirs = pytest.importorskip("transformers").VptqConfig(**fields)
    assert VptqConfig.from_dict(theirs.to_dict()) == VptqConfig.from_dict(said)
