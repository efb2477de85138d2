"""Every test here draws the same numbers whatever ran before it; tests of kernels run on several machines; and the processes
that compile are started once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from gpu import compiled, interpret, triton_lowered

from qcompile.lowering.triton import toolchain
from qcompile.target import INTERPRET, target

# Triton's interpreter, or the PTX that Triton makes for a target, evaluated.
MACHINES = ("interpret", "ptx", "sm_90", "sm_120")
KERNELS = (
    "activation",
    "attention",
    "codebook",
    "experts",
    "glue",
    "linear_fast",
    "linear_generic",
    "native",
    "sparse",
)
# Tests on other machines than the interpreter that are not `full`: a few of each template.
DAILY = {
    "activation.py::test_codes_are_those_of_the_transform[ptx-f8e4m3 per token]",
    "activation.py::test_codes_are_those_of_the_transform[sm_90-f8e4m3 per token]",
    "attention.py::test_caches_of_16_bits[ptx-groups of three-torch.float16]",
    "attention.py::test_rows_that_kernels_cannot_read_in_place_are_copied[sm_90]",
    "attention.py::test_sdpa_with_a_mask[ptx-bool, rows of nothing]",
    "codebook.py::test_sums_of_entries[sm_90-aqlm---0-17]",
    "experts.py::test_every_number_of_rows[sm_90-dense]",
    "glue.py::test_narrow_floats_are_rounded_after_every_operator[ptx-dtype0]",
    "glue.py::test_norms[sm_90-33]",
    "glue.py::test_rounding_to_8_bit_floats[ptx-f8e4m3]",
    "glue.py::test_rounding_to_8_bit_floats[sm_90-f8e4m3]",
    "glue.py::test_topk[ptx-dtype0]",
    "linear_fast.py::test_every_value_class_in_every_kind[ptx-int4-zeros-mid]",
    "linear_fast.py::test_every_value_class_in_every_kind[sm_90-int3-large]",
    "linear_fast.py::test_every_value_class_in_every_kind[sm_90-nf4-skinny]",
    "linear_fast.py::test_k_in_parts_gives_the_same_bits_in_any_order_and_leaves_its_counters_zero[sm_90]",
    "linear_generic.py::test_few_rows_are_exact[sm_90-2-21]",
    "native.py::test_sums_are_those_of_floats[ptx-format0-37-72-rounding0-epilogue0-37]",
    "native.py::test_sums_are_those_of_floats[sm_120-format3-37-256-rounding3-epilogue3-37]",
    "native.py::test_sums_are_those_of_floats[sm_90-format3-37-256-rounding3-epilogue3-37]",
    "sparse.py::test_a_sparse_part_is_one_kernel_whatever_the_order_of_its_numbers[sm_90]",
}


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # What names a capability compiles for it, and sessions have devices of their own.
    own = "capability" in metafunc.fixturenames or "compile" in metafunc.function.__name__
    own = own or "interpreted" in metafunc.function.__code__.co_names
    if metafunc.module.__name__.split("test_")[-1] in KERNELS and not own:
        metafunc.parametrize("machine", MACHINES, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        call = getattr(item, "callspec", None)
        elsewhere = call is not None and call.params.get("machine", "interpret") != "interpret"
        if elsewhere and item.nodeid.split("test_", 1)[-1] not in DAILY:
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels of a test run."""
    name: str = getattr(request, "param", "interpret")
    if name != "interpret":
        place = target(f"cuda:{name}")
        for module in (request.module, triton_lowered):
            for key, value in list(vars(module).items()):
                if value is INTERPRET:
                    monkeypatch.setattr(module, key, place)
                elif value is interpret.run:
                    monkeypatch.setattr(module, key, partial(compiled.run, place=place))
    return name


@pytest.fixture(scope="session", autouse=True)
def _workers() -> Iterator[None]:
    with toolchain.workers_kept():
        yield
