"""The package as it ships: every folder is listed, every public name exists, and light parts stay light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qcompile

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_code_is_in_the_list_of_packages() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for top in ("qcompile", "passes", "lowering", "runtime"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.parent.relative_to(ROOT).parts
            if top == "qcompile" and len(parts) > 1 and parts[1] in ("passes", "lowering", "runtime"):
                continue  # the links
            found.add(".".join(parts if top == "qcompile" else ("qcompile", *parts)))
    assert listed == found


def test_every_file_of_data_is_in_the_package() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {f"{package}/{name}" for package, names in data.items() for name in names}
    found = set()
    for top in ("passes", "lowering", "runtime"):
        for file in (ROOT / top).rglob("*.json"):
            found.add("/".join((".".join(("qcompile", *file.parent.relative_to(ROOT).parts)), file.name)))
    assert listed == found


def test_every_package_has_an_init_file() -> None:
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT / Path(*package.split(".")) / "__init__.py").is_file(), package


@pytest.mark.parametrize("name", qcompile.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    assert getattr(qcompile, name).__doc__


def test_public_names_are_sorted_and_unknown_ones_are_errors() -> None:
    assert qcompile.__all__ == sorted(qcompile.__all__)
    with pytest.raises(AttributeError, match="no attribute 'kompile'"):
        qcompile.kompile  # noqa: B018


def test_the_version_is_the_same_everywhere() -> None:
    assert qcompile.__version__ == PROJECT["project"]["version"]


def imported(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_qcompile_imports_no_torch() -> None:
    assert not imported("import qcompile") & {"torch", "transformers", "torch_mlir", "triton"}


def test_importing_the_runtime_imports_no_compiler() -> None:
    loaded = imported("import qcompile.runtime.model")
    heavy = {"torch_mlir", "triton", "transformers", "qcompile.passes", "qcompile.lowering", "qcompile.capture"}
    assert not loaded & heavy


def test_what_a_gpu_machine_lacks_is_not_needed_there() -> None:
    loaded = imported(
        "import sys; sys.modules.update(dict.fromkeys(('torch_mlir', 'llvmlite')))\n"
        "import torch, qcompile, benchmarks.gpu\n"
        "inputs = (torch.ones(2, 4),)\n"
        "qcompile.compile(torch.nn.Softmax(-1), target='cuda:interpret', example_inputs=inputs, strict=True)"
    )
    assert "qcompile.lowering.triton.build" in loaded


def test_loading_imports_no_compiler() -> None:
    loaded = imported("import qcompile; qcompile.load")
    assert not loaded & {
        "torch_mlir",
        "transformers",
        "networkx",
        "qcompile.capture",
        "qcompile.passes",
        "qcompile.lowering",
    }


def test_layers_keep_to_their_contracts() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
