"""SpQR: tiles and outliers written by the published formulas, both layouts, and what is said about broken ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import parametrize
from in_memory import InMemory, linear
from one_module import Tensors, fc, read, same, weight, written_again
from spqr_modules import csr, dense, outliers, ptcsr, word
from stored_modules import same_bits, value

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.base import Skip
from qcompile.methods.spqr import Spqr, SpqrConfig
from qcompile.transforms import sparse

SPQR, CONFIG, N, K = Spqr(), SpqrConfig(), 32, 48


def stored(**more: torch.Tensor) -> Tensors:
    """The module without permutation and outliers, and with what is given."""
    empty = {"row_offsets": torch.zeros(N + 1, dtype=torch.int32), "col_vals": torch.zeros(0)}
    return {"dense_weights": dense(N, K)[0], "in_perm": torch.zeros(0, dtype=torch.int32)} | empty | more


ORDER = torch.randperm(K, generator=torch.Generator().manual_seed(2))
PERM = (ORDER[::2] | ORDER[1::2] << 16).int()


@parametrize("spqr")
def test_a_real_checkpoint_is_written_as_it_is_read(folder: Path) -> None:
    assert written_again(folder)


@pytest.mark.parametrize("layout", [csr, ptcsr])
def test_tiles_outliers_and_order(layout: Any) -> None:
    expected = (dense(N, K)[1] + outliers(N, K)).half().float()[:, ORDER.argsort()]
    packed = read(SPQR, CONFIG, stored(**layout(outliers(N, K)), in_perm=PERM), fc(N, K))
    assert torch.equal(weight(packed), expected)
    assert (
        packed.residual is not None
        and packed.residual.transform.summary() == f"{int(outliers(N, K).ne(0).sum())} outliers"
    )
    x = torch.randn(2, 3, K)
    rows = packed.before[0](x)
    y = rows @ value(packed).T + packed.residual(rows)
    exact = x.double() @ (dense(N, K)[1] + outliers(N, K)).double()[:, ORDER.argsort()].T
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.allclose(packed.residual(rows[0, 0]), packed.residual(rows)[0, 0])
    written = SPQR.write(CONFIG, fc(N, K), packed)
    assert same_bits(written, stored(**csr(outliers(N, K)), in_perm=PERM))
    assert same(packed, read(SPQR, CONFIG, written, fc(N, K)))
    assert SPQR.stored_config(CONFIG, {"fc": packed})["shapes"] == {
        f"fc.{name}.shape": len(tensor) for name, tensor in written.items()
    }


def test_without_outliers_and_permutation() -> None:
    packed = read(SPQR, CONFIG, stored(), fc(N, K))
    assert packed.residual is None and not packed.before
    assert torch.equal(weight(packed), dense(N, K)[1])
    assert same_bits(SPQR.write(CONFIG, fc(N, K), packed), stored())


def test_many_outliers_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = read(SPQR, CONFIG, stored(**csr(outliers(N, K))), fc(N, K)).residual
    assert residual is not None
    x = torch.randn(3, K)
    whole = residual(x)
    monkeypatch.setattr(sparse, "CHUNK", 7)
    assert torch.allclose(residual(x), whole, atol=1e-6) and torch.allclose(whole, x @ outliers(N, K).T, atol=1e-5)


def test_which_modules_and_float_models() -> None:
    config = SpqrConfig(modules_to_not_convert=["lm_head.weight", "model.norm.weight"])
    head = linear("lm_head", N, K)
    modules = {"fc": fc(N, K), "lm_head": head}
    source = InMemory({f"fc.{name}": tensor for name, tensor in stored().items()} | {"lm_head.weight": dense(N, K)[1]})
    assert SPQR.select(config, head, source, modules) == Skip("the checkpoint stores its weight dense")
    plain = InMemory({"fc.weight": dense(N, K)[1], "lm_head.weight": dense(N, K)[1]})
    assert SPQR.select(config, head, plain, modules) == Skip("modules_to_not_convert has 'lm_head'")
    with pytest.raises(ConfigError, match="spqr reads checkpoints and quantizes nothing"):
        SPQR.select(config, fc(N, K), plain, modules)


def changed(words: torch.Tensor, at: int, bit: int) -> torch.Tensor:
    made = words.clone()
    made[at] ^= 1 << bit
    return made


DAMAGED = "the file is damaged, or belongs to another architecture"
BROKEN: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {"in_perm": None},
        "a module quantized with spqr lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    col_vals, dense_weights, row_offsets\n"
        "  expected: dense_weights, row_offsets, col_vals, in_perm\n"
        "  try:      the checkpoint is incomplete: it must hold fc.in_perm",
    ),
    (
        {"dense_weights": dense(N, K)[0][:-1]},
        "a stored tensor has the wrong shape\n"
        "  where:    fc.dense_weights (module fc, 32 outputs, 48 inputs)\n"
        "  found:    i64 [95]\n"
        "  expected: i64 [96]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged",
    ),
    (
        {"dense_weights": changed(dense(N, K)[0], 4, 55)},
        "two rows of a tile disagree on its scales\n"
        "  where:    fc.dense_weights (module fc)\n"
        f"  found:    bytes {[int((dense(N, K)[0][4] >> 54 & 0xFF) ^ 2), int(dense(N, K)[0][5] >> 54 & 0xFF)]} in words 4 and 5\n"
        f"  expected: one byte twice\n  try:      {DAMAGED}",
    ),
    (
        {"in_perm": PERM.roll(1) * 0},
        "a stored order does not name each input once\n"
        "  where:    fc.in_perm (module fc)\n"
        "  found:    1 inputs, 0 to 0\n"
        f"  expected: 48 inputs, 0 to 47\n  try:      {DAMAGED}",
    ),
    (
        {"row_offsets": torch.arange(N + 1).int()},
        "the offsets of outliers do not fit their number\n"
        "  where:    fc.col_vals (module fc)\n"
        "  found:    0 to 32\n"
        f"  expected: 0 to 0, in order\n  try:      {DAMAGED}",
    ),
    (
        {"row_offsets": torch.tensor([0] + [1] * N).int(), "col_vals": torch.tensor([word(48, 1.0)]).int()},
        "an outlier's column is out of range\n"
        "  where:    fc.col_vals (module fc)\n"
        "  found:    48 to 48\n"
        f"  expected: 0 to 47\n  try:      {DAMAGED}",
    ),
    (
        {"row_offsets": torch.tensor([0] + [1] * N).int(), "col_vals": torch.tensor([word(7, float("nan"))]).int()},
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.col_vals (module fc)\n"
        "  found:    nan at [0]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_broken_checkpoint_is_said_in_full(changes: dict[str, torch.Tensor | None], message: str) -> None:
    kept = {name: tensor for name, tensor in (stored() | changes).items() if tensor is not None}
    with pytest.raises(CheckpointError) as caught:
        read(SPQR, CONFIG, kept, fc(N, K))
    assert str(caught.value) == message


def test_a_length_that_the_config_does_not_say() -> None:
    config = SpqrConfig(shapes={"fc.col_vals.shape": 3, "other.col_vals.shape": 4})
    with pytest.raises(CheckpointError) as caught:
        read(SPQR, config, stored(), fc(N, K))
    assert str(caught.value) == (
        "a stored tensor is not as long as the config says\n"
        "  where:    fc.col_vals (module fc)\n"
        f"  found:    0\n  expected: 3\n  try:      {DAMAGED}"
    )


def test_an_infinite_scale_is_refused() -> None:
    words = dense(N, K)[0]
    for row in range(2, 4):  # the high byte of the first tile's first number
        words[row] |= 0x7C << 54
    with pytest.raises(CheckpointError, match="a stored tensor holds a number that is not finite"):
        read(SPQR, CONFIG, stored(dense_weights=words), fc(N, K))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"bits": 4}, "3"), ({"beta1": 8}, "16"), ({"beta2": 32}, "16"), ({"shapes": [1]}, "a dict of lengths")],
)
def test_what_transformers_refuses_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        pytest.importorskip("transformers").SpQRConfig(**fields)
    ((name, value_),) = fields.items()
    with pytest.raises(ConfigError) as caught:
        SpqrConfig.from_dict(fields)
    assert str(caught.value) == (
        f"the spqr config has a value out of range\n  where:    field '{name}'\n  found:    {value_}\n  expected: {expected}"
    )


def test_fields_of_a_caller() -> None:
    with pytest.raises(ConfigError, match="unknown field in the spqr config"):
        SpqrConfig.from_dict({"beta": 16})
    assert SpqrConfig.from_dict({"shapes": None}) == replace(CONFIG)
    with pytest.raises(ConfigError, match="spqr cannot store this module's weight"):
        read(SPQR, CONFIG, stored(), fc(N + 2, K))
