"""A damaged or hostile artifact is an ArtifactError that names what is wrong, in bounded time, and runs nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import artifacts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile import codec
from qcompile.errors import ArtifactError
from qcompile.runtime import store
from qcompile.runtime.tensors import read_tensors

FILES = [
    "program.json", "graph.json", "report.json", "weights.safetensors",
    "kernel-add.mlir", "kernel-add.o", "after-quantize.txt",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "m.qc"
    store.write(path, artifacts.contents())
    return path


def refused(path, text="", **options):
    """The error's text; both ways of reading refuse alike."""
    with pytest.raises(ArtifactError) as error:
        store.read(path, trusted=True, **options)
    assert text in str(error.value), str(error.value)
    with pytest.raises(ArtifactError):
        store.read(path, **options)
    return str(error.value)


def reseal(folder: Path) -> None:
    """What an attacker can do: a manifest that fits the files."""
    head = json.loads((folder / "manifest.json").read_bytes())
    del head["digest"]
    for name in head["files"]:
        data = (folder / name).read_bytes()
        head["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    seal(folder, head)


def seal(folder: Path, head: dict) -> None:
    head = {**head, "digest": hashlib.sha256(codec.render(head)).hexdigest()}
    (folder / "manifest.json").write_bytes(codec.render(head))


def head_of(folder: Path) -> dict:
    head = json.loads((folder / "manifest.json").read_bytes())
    del head["digest"]
    return head


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(folder, name):
    data = (folder / name).read_bytes()
    for length in {0, 1, len(data) // 2, len(data) - 1}:
        (folder / name).write_bytes(data[:length])
        refused(folder, f"a file has the wrong length\n  where:    {name}\n  found:    {length} bytes")


@pytest.mark.parametrize("name", FILES)
def test_an_edited_file_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    for at in {0, len(data) // 2, len(data) - 1}:
        data[at] ^= 1
        (folder / name).write_bytes(data)
        refused(folder, f"a file was changed\n  where:    {name}\n")
        data[at] ^= 1


@pytest.mark.parametrize("name", FILES)
def test_an_enlarged_missing_or_renamed_file_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b"\0")
    refused(folder, f"a file has the wrong length\n  where:    {name}")
    (folder / name).unlink()
    refused(folder, f"a file is missing\n  where:    {name}")
    (folder / "kernel-zzz.o").write_bytes(data)
    refused(folder, "a file is not in the manifest\n  where:    kernel-zzz.o")


def test_every_flipped_bit_of_the_manifest_is_noticed(folder):
    data = (folder / "manifest.json").read_bytes()
    for at in range(0, len(data), 7):
        for bit in (0, 5):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            (folder / "manifest.json").write_bytes(changed)
            refused(folder)


@pytest.mark.parametrize("name", ["extra.txt", "lib.so", ".hidden", "Program.json"])
def test_a_file_of_no_one_is_named(folder, name):
    (folder / name).write_bytes(b"")
    refused(folder, f"a file is not in the manifest\n  where:    {name}")


def test_a_listed_file_that_nothing_uses_is_named(folder):
    (folder / "kernel-evil.o").write_bytes(b"code")
    head = head_of(folder)
    head["files"]["kernel-evil.o"] = {"sha256": hashlib.sha256(b"code").hexdigest(), "bytes": 4}
    seal(folder, head)
    refused(folder, "a file belongs to nothing\n  where:    kernel-evil.o")


@pytest.mark.parametrize(
    "name",
    [
        "../manifest.json",
        "/etc/passwd",
        "a/b",
        "kernel-A.o",
        "weights.safetensors ",
        "kernel-.o",
        "x.so",
        "report.json\n",
        "",
    ],
)
def test_names_outside_the_list_are_refused(folder, name):
    head = head_of(folder)
    head["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    seal(folder, head)
    refused(folder, "a file may not be in an artifact")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_links_and_devices_are_refused(folder, name, kind):
    target = folder.parent / "elsewhere"
    target.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(target if kind == "link" else folder / "nowhere")
    refused(folder, f"where:    {name}")


@pytest.mark.parametrize(
    ("schema", "text"),
    [(2, "a newer qcompile may know it"), (0, "the schema is not known"), ("1", "'1'"), (None, "None")],
)
def test_an_unknown_schema_is_refused(folder, schema, text):
    seal(folder, {**head_of(folder), "schema": schema})
    refused(folder, text)


def test_an_unknown_manifest_field_is_refused(folder):
    seal(folder, {**head_of(folder), "entry": "x"})
    refused(folder, "a field of _Head is not known")


BAD_JSON = {
    "twice": (b'{"a":1,"a":2}', "a key occurs twice"),
    "nan": (b'{"a":NaN}', "a number is not JSON"),
    "infinity": (b"[-Infinity]", "a number is not JSON"),
    "no float": (b"[1e999]", "a number is not JSON"),
    "deep": (b"[" * 200_000, "not a JSON file"),
    "cut": (b'{"a":', "not a JSON file"),
    "bytes": (b"\xff\xfe", "not a JSON file"),
    "huge number": (b"[" + b"9" * 10_000 + b"]", "not a JSON file"),
    "empty": (b"", "not a JSON file"),
    "array": (b"[]", "an object"),
}


@pytest.mark.parametrize("name", ["program.json", "graph.json", "report.json"])
@pytest.mark.parametrize("case", sorted(BAD_JSON))
def test_bad_json_is_refused(folder, name, case):
    data, text = BAD_JSON[case]
    (folder / name).write_bytes(data)
    reseal(folder)
    refused(folder, text)


def paths(value, at=()):
    yield at
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*at, key))


def edited(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = edited(value[path[0]], path[1:], new)
    return value


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m.qc"
    store.write(path, artifacts.contents())
    return path, {
        name: json.loads((path / name).read_bytes()) for name in ("program.json", "graph.json", "manifest.json")
    }


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "b", "b*b", "((", "x//0", "w", "aten.add.Tensor", "aten.from_file.default", "os.system"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["view", "dim", "node", "output", "z"]), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_edit_is_refused_or_sound(fuzzed, data):
    path, originals = fuzzed
    name = data.draw(st.sampled_from(sorted(originals)))
    place = data.draw(st.sampled_from(sorted(paths(originals[name]), key=str)))
    value = edited(originals[name], place, data.draw(VALUES))
    try:
        if name == "manifest.json":
            seal(path, {key: item for key, item in value.items() if key != "digest"} if isinstance(value, dict) else {})
        else:
            (path / name).write_bytes(json.dumps(value).encode())
            reseal(path)
        try:
            store.read(path, trusted=True)
        except ArtifactError as error:
            assert str(error)
    finally:
        for other in ("program.json", "graph.json", "manifest.json"):
            (path / other).write_bytes(codec.render(originals[other]))


FIRST, SECOND = (("executable", "steps", i, "variants", 0, "calls", 0) for i in (0, 1))
PROGRAM_EDITS = [
    ((*FIRST, "kernel"), "aten.from_file.default", "an operator is not known"),
    ((*FIRST, "kernel"), "aten.add_.Tensor", "an operator is not known"),
    ((*FIRST, "kernel"), "aten.add.out", "an operator writes its arguments"),
    ((*FIRST, "kernel"), "os.system", "an operator is not known"),
    ((*FIRST, "args", 0, "buffer"), "nowhere", "a buffer is not known"),
    ((*FIRST, "args", 0, "shape"), ["q"], "a size is not known"),
    ((*FIRST, "writes"), [9], "a call writes no argument of its own"),
    ((*FIRST, "writes"), [0], "a call writes an input or weight"),
    ((*SECOND, "literals"), [[{"view": 7}], {}], "an operator's argument is out of range"),
    ((*SECOND, "literals"), [[{"eval": "1"}], {}], "an operator's argument is not known"),
    (("executable", "buffers", "w", "shape"), [2, 5], "a weight is not what the program expects"),
    (("executable", "buffers", "w", "dtype"), "f128", "a dtype is not known"),
    (("executable", "kernels", "add", "template"), "../../x", "a kernel's name is not allowed"),
    (("weights", "lin", "tensors"), {"weight": "v"}, "a weight is missing"),
    (("weights", "lin", "format"), {"kind": "os"}, "a weight's tensors are not those of its format"),
    (("weights", "lin", "n"), 2**60, "a weight's tensors are not those of its format"),
    (("weights", "lin", "rows"), 3, "a weight's rows lie outside it"),
    (("sizes", "b"), [3, 2], "the bounds of a size are not sound"),
    (("structure",), {"output": "zz"}, "the structure of the outputs is not known"),
    (("structure",), {"import": "os"}, "the structure of the outputs is not known"),
    (("target",), "cpu:other", "the parts belong to different artifacts"),
    (("unknown",), 1, "a field of Artifact is not known"),
]


@pytest.mark.parametrize(("place", "value", "text"), PROGRAM_EDITS)
def test_each_invariant_of_the_program(folder, place, value, text):
    program = json.loads((folder / "program.json").read_bytes())
    at = program
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (folder / "program.json").write_bytes(json.dumps(program).encode())
    reseal(folder)
    refused(folder, text)


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([{"name": "a", "op": "aten.add.Tensor", "args": [{"node": "zz"}]}], "a value is used before it is made"),
        ([{"name": "x", "op": "aten.abs.default", "args": []}], "two values have one name"),
        ([{"name": "a", "op": "builtins.eval", "args": ["1"]}], "an operator is not known"),
        ([{"name": "a", "op": "aten.abs.default", "args": [{"import": "os"}]}], "an operator's argument is not known"),
    ],
)
def test_each_invariant_of_the_graph(folder, nodes, text):
    graph = json.loads((folder / "graph.json").read_bytes())
    graph["nodes"] = nodes + graph["nodes"]
    (folder / "graph.json").write_bytes(json.dumps(graph).encode())
    reseal(folder)
    refused(folder, text)


def weights(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cannot be mapped"),
        (b"\0\0\0", "has no header"),
        (weights({}, length=2**63), "header is too long"),
        (weights({}, length=50), "header is too long"),
        (weights(b"[]"), "header is not a table"),
        (weights(b'{"a":1,"a":2}'), "a key occurs twice"),
        (weights({"w": entry("F128")}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": entry(shape=(2**40, 2**40))}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": entry(shape=(-2, -1))}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": entry(shape=(True, 2))}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": entry(offsets=(8, 0))}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": entry(offsets=(0, 2**63))}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": {**entry(), "x": 1}}, bytes(8)), "a tensor's header is not sound"),
        (weights({"w": entry(), "v": entry()}, bytes(8)), "tensors overlap or leave a hole"),
        (weights({"w": entry(offsets=(4, 12))}, bytes(12)), "tensors overlap or leave a hole"),
        (weights({"w": entry()}, bytes(9)), "data have the wrong length"),
        (weights({"w": entry()}, bytes(7)), "data have the wrong length"),
        (weights({"v": entry()}, bytes(8)), "a weight is missing"),
    ],
)
def test_an_unsound_weights_file(folder, data, text):
    (folder / "weights.safetensors").write_bytes(data)
    reseal(folder)
    refused(folder, text)


def test_an_extra_tensor_is_named(folder):
    data = weights({"w": entry(shape=(2, 4), offsets=(0, 32)), "z": entry(shape=(), offsets=(32, 36))}, bytes(36))
    (folder / "weights.safetensors").write_bytes(data)
    reseal(folder)
    refused(folder, "a weight is not used\n  where:    z")


@settings(max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 100))
def test_random_weights_files(data, length):
    for candidate in (data, length.to_bytes(8, "little") + data):
        try:
            read_tensors(candidate)
        except ArtifactError as error:
            assert str(error)


@pytest.mark.parametrize("name", ["program.json", "report.json"])
def test_a_hostile_file_costs_little(folder, name):
    (folder / name).write_bytes(b"[" * 5_000_000)
    reseal(folder)
    begin = time.process_time()
    refused(folder)
    assert time.process_time() - begin < 10


def test_reading_opens_only_the_artifact_and_runs_nothing(folder):
    script = """
import sys
import qcompile.formats.dense, qcompile.ops, qcompile.runtime.store as store
store.read(sys.argv[1], trusted=True)
events = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        events.append((event, arguments[0]))
    elif event in ("exec", "compile", "import", "ctypes.dlopen", "os.system", "subprocess.Popen", "os.exec", "os.fork"):
        events.append((event, arguments[0]))
    elif event.startswith(("socket.", "pickle.", "marshal.", "urllib")):
        events.append((event, None))
sys.addaudithook(hook)
store.read(sys.argv[1], trusted=True)
print(sorted({str(event) for event in events}))
"""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    names = sorted([*(file.name for file in folder.iterdir()), str(folder)])
    assert done.stdout.strip() == str(sorted(str(("open", name)) for name in names))
