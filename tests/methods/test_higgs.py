"""HIGGS: FLUTE's layouts by their own formula, real checkpoints, rounding, and what is said about broken ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize
from in_memory import InMemory, linear
from one_module import Tensors, fc, read, same, weight, written_again
from safetensors.torch import load_file
from stored_modules import same_bits

from qcompile.dtypes import NAMES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.formats.higgs import Higgs as HiggsFormat
from qcompile.formats.higgs_grids import points
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.higgs import Higgs, HiggsConfig
from qcompile.methods.index import parse_config
from qcompile.pack import unpack
from qcompile.safetensors_folder import SafetensorsFolder

HIGGS = Higgs()
SMALL = HiggsConfig(hadamard_size=64, group_size=64)
ORDER = (0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15)  # of 32 outputs in a block of 512, with 3 bits
CASES = pytest.mark.parametrize(("bits", "p"), [(bits, p) for bits in (2, 3, 4) for p in (1, 2)])


def sample(n: int, k: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
    made[1], made[2] = 0.0, 0.3
    return made.to(dtype)


def stored(config: HiggsConfig, n: int = 512, k: int = 128, dtype: str = "f16") -> tuple[HiggsConfig, Tensors]:
    """A module as a checkpoint holds it, and the config that its writer stores."""
    packed = HIGGS.quantize(config, fc(n, k, dtype), sample(n, k))
    written = HiggsConfig.from_dict(HIGGS.stored_config(config, {"fc": packed}))
    return written, HIGGS.write(config, fc(n, k, dtype), packed)


def flute(codes: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """FLUTE's words of 4 or 2 bit codes [K, N], written field by field: i16 [N * bits / 16, K]."""
    K, N = codes.shape
    per = 16 // bits
    words = torch.zeros(N // per, K, dtype=torch.int64)
    for row in range(N // per):
        block, p = divmod(row, tile)
        for i in range(per):
            for h in range(2):
                output = block * per * tile + (h * per // 2 + i // 2) * tile + p
                words[row, h::2] |= codes[1 - i % 2 :: 2, output] << bits * i
    return words.to(torch.int16)


def flute_three(codes: torch.Tensor) -> torch.Tensor:
    """FLUTE's words of 3-bit codes [K, N], by the string of 96 bits that 32 of them make."""
    K, N = codes.shape
    words = torch.zeros(N * 3 // 16, K, dtype=torch.int64)
    pieces = ((0, 16), (16, 30, 90, 92), (30, 46), (46, 60, 92, 94), (60, 76), (76, 90, 94, 96))
    for block in range(N // 512):
        for p in range(32):
            for u in range(K // 2):
                s = [int(codes[2 * u + 1 - i % 2, block * 512 + ORDER[i // 2] * 32 + p]) for i in range(32)]
                bits = "".join(f"{code:03b}"[::-1] for code in s)
                for w, cut in enumerate(pieces):
                    text = "".join(bits[a:b] for a, b in zip(cut[::2], cut[1::2], strict=True))
                    j = w // 2
                    row = block * 32 + p if j == 0 else N // 16 + block * 64 + (j - 1) * 32 + p
                    words[row, 2 * u + w % 2] = int(text[::-1], 2)
    return words.to(torch.int16)


@parametrize("higgs")
def test_a_real_checkpoint_is_written_as_it_is_read(folder: Path) -> None:
    assert written_again(folder)


@parametrize("higgs")
def test_the_original_weights_give_the_stored_bytes(folder: Path) -> None:
    source: Any = SafetensorsFolder(folder)
    found = parse_config(None, model_config(folder)["quantization_config"], source)  # type: ignore[arg-type]
    assert found is not None
    for name, original in load_file(folder / "reference.safetensors").items():
        path = name.removesuffix(".source_weight")
        if path != name:
            module = linear(path, *original.shape, dtype=NAMES[original.dtype])
            made = HIGGS.write(found[1], module, HIGGS.quantize(found[1], module, original))
            assert same_bits(made, {part: source.read(f"{path}.{part}") for part in made})


@pytest.mark.parametrize(("bits", "tile", "blocks"), [(4, 32, 2), (4, 64, 1), (2, 32, 2), (2, 64, 1), (3, 32, 2)])
def test_the_layout_is_flutes(bits: int, tile: int, blocks: int) -> None:
    fmt = HiggsFormat(bits, 2, tile)
    N, K = fmt.block * blocks, 4
    codes = torch.randint(0, 2**bits, (K, N), generator=torch.Generator().manual_seed(bits))
    words = flute_three(codes) if bits == 3 else flute(codes, bits, tile)
    tensors = {
        "weight": words,
        "scales": torch.ones(N, K // 2).half(),
        "tables2": torch.zeros(4**bits, 2).half(),
    }
    pair = unpack(fmt, tensors, N, K)["pair"]
    assert torch.equal(pair[:, ::2].long(), codes[::2].T << bits | codes[1::2].T)


@CASES
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_what_is_written_is_read_again(bits: int, p: int, dtype: str) -> None:
    config = replace(SMALL, bits=bits, p=p)
    written, tensors = stored(config, dtype=dtype)
    packed = read(HIGGS, written, tensors, fc(512, 128, dtype))
    assert same(packed, HIGGS.quantize(config, fc(512, 128, dtype), sample(512, 128)))
    assert same_bits(HIGGS.write(written, fc(512, 128, dtype), packed), tensors)
    assert tensors["tables2"].dtype == torch.float16 and tensors["tables2"].shape == (2**bits, 2**bits, 2)
    assert HIGGS.stored_config(written, {"fc": packed}) == written.to_dict()
    expected = sample(512, 128).float()
    error = (weight(packed) - expected)[3:].norm() / expected[3:].norm()
    assert error == pytest.approx({2: 0.335, 3: 0.178, 4: 0.092}[bits], rel=0.06)
    assert weight(packed)[1].eq(0).all()


def test_the_other_tile_is_read() -> None:
    written, tensors = stored(SMALL)
    codes = unpack(HiggsFormat(4, 64), {**tensors, "tables2": points(2, 4).half()}, 512, 128)["pair"]
    single = torch.stack([codes[:, ::2] >> 4, codes[:, ::2] & 15], dim=-1).flatten(1).T.long()
    other = replace(written, tune_metadata={"fc": {"template_id": 48}})
    packed = read(HIGGS, other, tensors | {"weight": flute(single, 4, 64)}, fc(512, 128))
    assert torch.equal(weight(packed), weight(read(HIGGS, written, tensors, fc(512, 128))))
    assert HIGGS.stored_config(SMALL, {"fc": packed})["tune_metadata"]["fc"]["template_id"] == 0


def test_a_group_shares_the_scale_of_its_block_and_points_are_the_nearest() -> None:
    config = HiggsConfig(hadamard_size=128, group_size=64, p=1)
    packed = HIGGS.quantize(config, fc(128, 256), sample(128, 256))
    scales = packed.tensors["scales"]
    assert scales.shape == (128, 4) and torch.equal(scales[:, ::2], scales[:, 1::2])
    fields = unpack(packed.format, packed.tensors, 128, 256)
    turned = packed.before[0](sample(128, 256).float()) / scales.float().repeat_interleave(64, 1)
    nearest = (turned[3:, :, None] - points(1, 4).flatten()).abs().amin(-1)
    assert (
        (turned - fields["point"].float()).abs()[3:] <= nearest + 2e-3
    ).all()  # up to the rounding of scale and point


def test_which_modules() -> None:
    head, modules = linear("lm_head", 512, 128, output_embedding=True), {"fc": fc(512, 128)}
    modules["lm_head"] = head
    source = InMemory({"fc.weight": sample(512, 128), "lm_head.weight": sample(512, 128)})
    assert HIGGS.select(SMALL, head, source, modules) == Skip(
        "it is the output embedding, and such modules stay dense by default"
    )
    named = replace(SMALL, modules_to_not_convert=["fc"])
    assert HIGGS.select(named, modules["fc"], source, modules) == Skip("modules_to_not_convert has 'fc'")
    chosen = HIGGS.select(SMALL, fc(512, 128, "f32"), source, modules)
    assert isinstance(chosen, Quantized)
    assert chosen.note == "higgs itself refuses f32 weights: its numbers are stored as f16"
    written, tensors = stored(SMALL)
    packed = InMemory({f"fc.{name}": t for name, t in tensors.items()} | {"lm_head.weight": sample(512, 128)})
    assert HIGGS.select(written, head, packed, modules) == Skip("the checkpoint stores its weight dense")


@pytest.mark.parametrize(
    ("shape", "config", "found", "expected"),
    [
        ((512, 96), SMALL, "K = 96", "a multiple of hadamard_size, 64"),
        ((384, 64), replace(SMALL, bits=3), "N = 384", "a multiple of 512, the outputs of a block"),
    ],
)
def test_a_shape_that_does_not_fit(shape: tuple[int, int], config: HiggsConfig, found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HIGGS.quantize(config, fc(*shape), sample(*shape))
    assert str(caught.value).startswith(
        f"higgs cannot store this module's weight\n  where:    fc {list(shape)}\n  found:    {found}\n  expected: {expected}"
    )


BELONG = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
BROKEN: list[tuple[dict[str, torch.Tensor | None], dict[str, Any], str]] = [
    (
        {"tables": None},
        {},
        "a module quantized with higgs lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    scales, tables2, weight\n"
        "  expected: weight, scales, tables, tables2\n"
        "  try:      the checkpoint is incomplete: it must hold fc.tables",
    ),
    (
        {"weight": torch.zeros(64, 128, dtype=torch.int16)},
        {},
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight (module fc, 512 outputs, 128 inputs)\n"
        "  found:    i16 [64, 128]\n"
        f"  expected: i16 [128, 128]\n  try:      {BELONG}",
    ),
    (
        {"scales": torch.full((512, 2), torch.nan).half()},
        {},
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.scales (module fc)\n"
        "  found:    nan at [0, 0]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        {},
        {"tune_metadata": {"other": {"template_id": 1}}},
        "the higgs config does not say in which layout a module's weight is stored\n"
        "  where:    field 'tune_metadata', 'fc'\n"
        "  found:    None\n"
        "  expected: an entry with a template_id\n"
        "  try:      restore tune_metadata in quantization_config: FLUTE writes an entry for each module",
    ),
]


@pytest.mark.parametrize(("changes", "fields", "message"), BROKEN)
def test_a_broken_checkpoint_is_said_in_full(
    changes: dict[str, torch.Tensor | None], fields: dict[str, Any], message: str
) -> None:
    written, tensors = stored(SMALL)
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(CheckpointError) as caught:
        read(HIGGS, replace(written, **fields), kept, fc(512, 128))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bits": 5}, "2, 3 or 4"),
        ({"p": 3}, "1 or 2"),
        ({"group_size": 32}, "64, 128 or 256"),
        ({"hadamard_size": 128}, "a power of two, at least the group_size"),
    ],
)
def test_what_transformers_refuses_is_refused(fields: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError):
        pytest.importorskip("transformers").HiggsConfig(**fields)
    ((name, value),) = fields.items()
    with pytest.raises(ConfigError) as caught:
        HiggsConfig.from_dict(fields)
    assert str(caught.value) == (
        "the higgs config has a value out of range\n"
        f"  where:    field '{name}'\n  found:    {value}\n  expected: {expected}"
    )


def test_fields_of_a_caller() -> None:
    with pytest.raises(ConfigError, match="unknown field in the higgs config"):
        HiggsConfig.from_dict({"hadamard": 64})
    assert HiggsConfig.from_dict({"tune_metadata": None}) == HiggsConfig()
