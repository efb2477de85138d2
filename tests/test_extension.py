"""Methods of other packages, and that no method of transformers is missing."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile import registry
from qcompile.errors import ConfigError
from qcompile.format import FORMATS
from qcompile.methods.index import METHODS, method
from qcompile.registry import Registry

EXAMPLE = Path(__file__).parent.parent / "examples" / "add_a_method.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The example as a module; what it registers is forgotten afterwards."""
    spec = importlib.util.spec_from_file_location("add_a_method", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    for table, name in ((METHODS, "ternary-rows"), (FORMATS, "ternary-rows")):
        table.pop(name, None)
        table._added.pop(name, None)


def test_the_example_runs(example: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert "ternary-rows   1.65 bits  eager    int8 per token" in capsys.readouterr().out


def test_registering_twice_is_once_and_a_clash_names_both_owners(example: types.ModuleType) -> None:
    example.register()
    example.register()
    assert isinstance(method("ternary-rows"), example.TernaryMethod)

    class Mine(example.TernaryMethod):  # type: ignore[misc, name-defined]
        name = "gptq"

    Mine.__qualname__, Mine.__module__ = "Mine", "somewhere"
    with pytest.raises(ConfigError) as error:
        qcompile.register_method(Mine)
    assert str(error.value) == (
        "two quantization methods have the same name\n  where:    'gptq'\n"
        "  found:    qcompile.methods.gptq:Gptq and somewhere:Mine\n  expected: one owner of a name\n"
        "  try:      rename one of them, or uninstall its package"
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[types.SimpleNamespace]]:
    """Entry points as if packages with them were installed."""
    points: list[types.SimpleNamespace] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "qcompile.methods" else [])
    registry.discover.cache_clear()
    yield points
    registry.discover.cache_clear()


def point(function: object) -> types.SimpleNamespace:
    dist = types.SimpleNamespace(name="a-package")
    return types.SimpleNamespace(name="mine", value="mine:register", dist=dist, load=lambda: function)


def test_entry_points_are_asked_for_names_that_are_not_known(
    example: types.ModuleType, installed: list[types.SimpleNamespace]
) -> None:
    installed.append(point(example.register))
    model = torch.nn.Linear(10, 4)
    q = qcompile.compile(
        model, {"quant_method": "ternary-rows", "modules_to_not_convert": []}, target="reference",
        example_inputs=(torch.randn(2, 10),),
    )  # fmt: skip
    assert next(iter(q.report.weights.values())).format == "ternary-rows"


def test_an_entry_point_that_fails_is_named(installed: list[types.SimpleNamespace]) -> None:
    def broken() -> None:
        raise RuntimeError("no such thing")

    installed.append(point(broken))
    with pytest.raises(ConfigError) as error:
        method("ternary-rows")
    assert str(error.value) == (
        "a method of another package cannot be registered\n"
        "  where:    entry point 'mine' of a-package: mine:register\n  found:    RuntimeError: no such thing\n"
        "  expected: a function that calls qcompile.register_method\n  try:      correct or uninstall a-package"
    )


def test_every_name_is_loaded_from_where_its_table_says() -> None:
    assert isinstance(METHODS, Registry)
    for name in METHODS:
        assert METHODS.load(name).name == name


def test_no_method_of_transformers_is_missing() -> None:
    auto = pytest.importorskip("transformers.quantizers.auto")
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in auto.AUTO_QUANTIZATION_CONFIG_MAPPING}
    assert known - {"qcompile"} <= set(METHODS), "a quant_method that transformers knows is not in methods/index.py"
