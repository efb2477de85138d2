"""Schedules: which are legal, which is taken, tables of measured ones, and what the cost model says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qcompile.errors import ConfigError
from qcompile.lowering.triton import cost, tables, toolchain
from qcompile.lowering.triton.budgets import BUDGETS, OTHERS, budget
from qcompile.lowering.triton.devices import DEVICES, device
from qcompile.lowering.triton.schedule import BUCKETS, OPEN, choose, split, using
from qcompile.lowering.triton.tables import Entry, Table
from qcompile.lowering.triton.tiles import KINDS, Problem, Schedule, candidates, illegal, shared_bytes

H100 = DEVICES[90]
SKINNY = Problem("skinny", 4096, 4096, 4, 4, "int", 128, 4)
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (576, 576), (49152, 576), (33, 96))


def problems(kind: str) -> list[Problem]:
    found = []
    for n, k in SHAPES:
        for m in BUCKETS:
            group = 32 if k % 32 == 0 else 0
            found.append(Problem(kind, n, k, m, 4, "int", group, split(n, k, m)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_problem_has_a_schedule_that_fits_the_gpu(kind):
    for problem in problems(kind):
        for gpu in DEVICES.values():
            legal = list(candidates(problem, gpu))
            assert legal and len(set(legal)) == len(legal)
            for schedule in legal:
                assert not illegal(problem, schedule, gpu)
                assert shared_bytes(problem, schedule, gpu) <= gpu.shared
                assert schedule.warps in KINDS[kind].warps and schedule.block_m <= KINDS[kind].most_m
                assert problem.k // problem.split_k % schedule.block_k == 0 or problem.split_k == 1


def test_devices_agree_with_what_the_toolchain_allows():
    assert {capability: gpu.shared for capability, gpu in DEVICES.items()} == toolchain.SHARED
    assert all(gpu.capability == capability for capability, gpu in DEVICES.items())


def test_a_split_is_a_divisor_and_follows_from_the_shape_alone():
    for n, k in SHAPES:
        for m in BUCKETS:
            parts = split(n, k, m)
            assert parts == 1 or (k % (128 * parts) == 0 and k // parts >= 512)
    assert [split(4096, 4096, m) for m in BUCKETS] == [8, 8, 8, 1]
    assert split(28672, 4096, 4) == 1 and split(4096, 4100, 4) == 1 and split(512, 640, 4) == 1


def test_the_model_is_never_faster_than_the_memory_and_the_tensor_cores():
    for gpu in DEVICES.values():
        for problem in problems("skinny"):
            least = cost.limit(problem, gpu)
            assert all(cost.microseconds(problem, each, gpu) > least for each in candidates(problem, gpu))


def test_a_large_matrix_is_near_the_limit_and_decoding_limits_where_memory_is_fast():
    large = Problem("skinny", 8192, 28672, 4, 4, "int", 128, split(8192, 28672, 4))
    best = min(cost.microseconds(large, each, H100) for each in candidates(large, H100))
    assert best < 1.5 * cost.limit(large, H100)
    generic = replace(large, kind="generic")
    slow = min(cost.microseconds(generic, each, H100) for each in candidates(generic, H100))
    assert slow > 2 * best


def test_a_split_helps_where_the_outputs_alone_are_too_few():
    def best(parts: int) -> float:
        problem = Problem("skinny", 2048, 16384, 4, 4, "int", 128, parts)
        return min(cost.microseconds(problem, each, H100) for each in candidates(problem, H100))

    assert best(8) < best(1)


def test_steps_do_not_cut_groups_or_parts():
    tile = Schedule(64, 16, 128, 4, 2)
    assert "cuts groups of 96" in illegal(replace(SKINNY, k=9216, group=96), tile, H100)
    assert "cuts a part of 1088" in illegal(replace(SKINNY, k=4352, group=0), tile, H100)
    assert "bytes of shared memory" in illegal(SKINNY, Schedule(128, 32, 256, 4, 9), DEVICES[86])
    assert "8 warps share 64" in illegal(SKINNY, Schedule(64, 16, 128, 8, 2), H100)
    assert "registers" in illegal(SKINNY, Schedule(256, 128, 64, 4, 2), H100)


def chosen(capability: int = 90) -> Schedule:
    return choose("skinny", 4096, 4096, 4, 4, capability, group=128, split_k=4)


def test_the_interpreter_gets_the_smallest_tile():
    kind = KINDS["skinny"]
    found = chosen(0)
    assert (found.block_n, found.block_k, found.stages) == (kind.block_n[0], kind.block_k[0], kind.stages[0])
    assert device(0) == H100


def test_a_problem_without_a_schedule_is_said():
    with pytest.raises(ValueError, match="no schedule can be made for"):
        choose("skinny", 64, 7 * 96, 4, 4, 90, group=96)


def test_an_entry_of_the_table_in_use_is_taken_for_its_problem_and_gpu_alone():
    other = next(each for each in candidates(SKINNY, H100) if each != chosen())
    with using(Table.of([Entry(90, SKINNY, other)])):
        assert chosen() == other
        assert chosen(100) != other or chosen(100) in list(candidates(SKINNY, DEVICES[100]))
        assert choose("skinny", 4096, 8192, 4, 4, 90, group=128, split_k=4) in list(
            candidates(replace(SKINNY, k=8192), H100)
        )
    assert chosen() != other


def test_a_table_is_the_same_bytes_for_the_same_entries(tmp_path):
    entries = [Entry(capability, SKINNY, chosen(capability), 4.25, "a GPU") for capability in (90, 80)]
    text = tables.render(Table.of(entries))
    assert text == tables.render(Table.of(reversed(entries)))
    assert tables.parse(text, "here").entries == Table.of(entries).entries
    tables.write(tmp_path / "schedules.json", Table.of(entries[:1]))
    faster = replace(entries[0], microseconds=4.0)
    tables.write(tmp_path / "schedules.json", Table.of([faster, entries[1]]))
    assert tables.user(tmp_path).entries == Table.of([faster, entries[1]]).entries
    assert tables.user(tmp_path / "nowhere").entries == {}


def test_the_shipped_table_is_one():
    assert all(key == (entry.capability, entry.problem) for key, entry in tables.shipped().entries.items())


GOOD = json.loads(tables.render(Table.of([Entry(90, SKINNY, Schedule(64, 16, 128, 2, 3))])))


def changed(**changes: object) -> dict[str, object]:
    """The good table with numbers of its entry changed: "schedule.warps" is written schedule_warps."""
    entry = json.loads(json.dumps(GOOD["entries"][0]))
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            entry[group][field] = value
        else:
            entry[group] = value
    return {**GOOD, "entries": [entry]}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({**GOOD, "schema": 2}, "has another schema"),
        ({**GOOD, "entries": GOOD["entries"] * 2}, "the same problem twice"),
        (changed(capability=91), "capability 91; known are 80, 86"),
        (changed(problem__kind="thin"), "kind 'thin'; known are generic"),
        (changed(problem__n=0), "a number below 1"),
        (changed(problem__n="4096"), "an integer"),
        (changed(schedule__warps=3), "warps 3; a skinny kernel takes 2"),
        (changed(schedule__block_m=64), "block_m 64"),
        (changed(schedule__stages=9), "stages 9"),
        (changed(problem__group=96), "cuts groups of 96"),
        (changed(schedule__speed=1), "is not known"),
        ([], "an object"),
    ],
)
def test_a_malformed_table_is_a_config_error(table, says):
    with pytest.raises(ConfigError, match=says):
        tables.parse(json.dumps(table).encode(), "schedules.json")


def test_a_table_that_cannot_be_read_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        tables.read(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("no table")
    with pytest.raises(ConfigError, match="not a JSON file"):
        tables.read(tmp_path / "text.json")


def test_budgets_are_for_kinds_that_exist_and_looser_beside_capability_9():
    assert all(kind in KINDS for kind, _, _ in BUDGETS)
    assert budget("skinny", "int", 4, 90).instructions <= 3.5
    assert budget("skinny", "table", 4, 90).instructions <= 4.5
    assert budget("skinny", "fp", 8, 90).instructions <= 5
    assert budget("skinny", "int", 4, 80) == budget("skinny", "int", 4, 90) == budget("skinny", "int", 4, 90, 128)
    assert budget("mid", "int", 4, 80).instructions == OTHERS * budget("mid", "int", 4, 90).instructions
    assert budget("skinny", "table", 4, 90).instructions < budget("skinny", "table", 4, 90, 16).instructions <= 5
    assert budget("generic", "int", 4, 90) is None


def test_the_open_bucket_is_the_last():
    assert max(BUCKETS) == OPEN
