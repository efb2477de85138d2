"""The table of formats: complete, true to what methods make, and the one that README.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_memory import linear

from qcompile.errors import ConfigError
from qcompile.format import FORMATS
from qcompile.methods.index import METHODS, method, parse_config
from qcompile.support import END, START, markdown, methods_page, rows, with_table

ROOT = Path(__file__).parent.parent
CONFIGS = [
    {"quant_method": "gptq", "bits": 3, "group_size": 32},
    *({"quant_method": "awq", "bits": 4, "group_size": 32, "version": v} for v in ("gemm", "gemv", "gemv_fast")),
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "hqq", "nbits": 4, "group_size": 32},
    {"quant_method": "eetq"},
]


def test_every_format_has_a_row_and_somebody_who_uses_it():
    found = {row.format: row.methods for row in rows()}
    assert found.keys() == FORMATS.keys() - {"lanes", "lanes-dense", "fragments", "native", "runs"}
    assert {kind for kind, methods in found.items() if not methods} == {"dense"}
    assert {name for methods in found.values() for name in methods} == set(METHODS)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_methods_make_the_formats_that_they_name(config):
    method, parsed = parse_config(config)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    try:
        packed = method.quantize(parsed, linear("fc", 64, 128, dtype="f16"), weight.half())
    except ConfigError:
        pytest.skip("this method quantizes nothing itself")
    assert packed.format.kind in method.formats


def test_tiers_and_bits():
    found = {(row.format, row.parameters): row for row in rows()}
    nested = found["bnb4", "table nf4, nested 256"]
    assert nested.bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert (nested.exact, nested.int8, nested.reason) == ("lanes", "native", "")
    across = found["hqq", "bits 4, axis 0"]
    assert (across.exact, across.int8) == ("generic", "generic")
    assert across.reason == "only 1 consecutive inputs share a scale, fewer than 8"
    assert found["dense", ""].int8 == "lanes"
    assert {found["aqlm", ""].cuda, found["bnb4", "table nf4"].cuda} == {"codebook", "lanes"}


def test_the_readme_shows_the_table_of_today():
    text = (ROOT / "README.md").read_text()
    assert text == with_table(text), "run python -m qcompile.support --write README.md"
    assert f"{START}\n{markdown(rows())}\n{END}" in text


def test_a_file_without_markers():
    with pytest.raises(SystemExit, match="the file has no line"):
        with_table("nothing here")


def test_the_page_of_methods_is_what_the_methods_say() -> None:
    assert (ROOT / "docs" / "methods.md").read_text() == methods_page()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_it_comes_from(name: str) -> None:
    assert method(name).source.startswith("https://")
