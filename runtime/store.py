"""An artifact as a folder: program, graph, report and weights as data, kernels as text to read and objects to trust."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qcompile import codec
from qcompile.artifact import Artifact, Built, Graph, Launch
from qcompile.errors import ArtifactError
from qcompile.runtime.check import check_artifact, check_launches
from qcompile.runtime.codes import codes_of, file_names, for_gpu, parts
from qcompile.runtime.folder import WEIGHTS, Content, open_folder, write_folder
from qcompile.runtime.tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class Contents:
    """All of an artifact: the data, `tensors` by name, the `kernels` that came with it, `report`, graph `snapshots`.

    `kernels` is empty when it was read without trusting the objects; `sources` has their texts in any case. Kernels for
    GPUs go by the names that `qcompile.runtime.codes.coded` gives: one for each machine code.
    """

    artifact: Artifact
    tensors: Mapping[str, torch.Tensor]
    kernels: Mapping[str, Built] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    snapshots: Mapping[str, str] = field(default_factory=dict)


def write(path: str | Path, contents: Contents) -> None:
    """Write an artifact: the same contents give the same bytes, and the folder appears as a whole or not at all."""
    artifact = contents.artifact
    check_artifact(artifact, contents.tensors)
    files: dict[str, Content] = {
        "program.json": codec.render(codec.encode(dataclasses.replace(artifact, graph=None))),
        "report.json": codec.render(codec.encode(contents.report)),
        WEIGHTS: functools.partial(write_tensors, tensors=contents.tensors),
    }
    if artifact.graph is not None:
        files["graph.json"] = codec.render(codec.encode(artifact.graph))
    for name, kernel in contents.kernels.items():
        text, object = file_names(name)
        files |= {text: kernel.source.encode(), object: kernel.object}
    order = list(contents.snapshots)
    for name, text in contents.snapshots.items():
        files[f"after-{name}.txt"] = text.encode()
    entries = {name: kernel.entry for name, kernel in contents.kernels.items()}
    launches = {name: kernel.launch for name, kernel in contents.kernels.items() if kernel.launch is not None}
    head = codec.encode(_Head(entries, tuple(order), artifact.target, launches))
    write_folder(Path(path), head, files)


def read(path: str | Path, *, trusted: bool = False, verify: bool = True) -> Contents:
    """The artifact at `path`, everything in it checked; ArtifactError names the file or field that is wrong.

    Object code is handed on only if `trusted`. With verify=False the digest of the weights is not compared (their
    length and header are checked, and every other file is).
    """
    with open_folder(Path(path)) as folder:
        head = codec.decode(_Head, folder.head, "manifest.json")
        artifact = codec.decode(Artifact, codec.parse(folder.read("program.json"), "program.json"), "program.json")
        if artifact.graph is not None:
            raise ArtifactError("the graph is not in its own file", where="program.json", expected="graph.json")
        if "graph.json" in folder:
            graph = codec.decode(Graph, codec.parse(folder.read("graph.json"), "graph.json"), "graph.json")
            artifact = dataclasses.replace(artifact, graph=graph)
        report = codec.decode(dict[str, Any], codec.parse(folder.read("report.json"), "report.json"), "report.json")
        if head.target != artifact.target:
            raise ArtifactError(
                "the parts belong to different artifacts",
                where="program.json",
                found=artifact.target,
                expected=head.target,
            )
        known = {"program.json", "report.json", "graph.json", WEIGHTS}
        files = {name: file_names(name) for name in head.entries}
        known |= {file for pair in files.values() for file in pair}
        known |= {f"after-{name}.txt" for name in head.snapshots}
        for name in folder:
            if name not in known:
                raise ArtifactError("a file belongs to nothing", where=name)
        specs = artifact.executable.kernels if artifact.executable is not None else {}
        codes = codes_of(artifact.target)
        for name, (_, object) in files.items():
            kernel, code = parts(name)
            if kernel not in specs or code not in codes:
                raise ArtifactError("a kernel belongs to nothing", where=object)
        check_launches(head.entries, head.launches, for_gpu(artifact.target))
        sources = {name: _text(folder.read(text), text) for name, (text, _) in files.items()}
        objects = {name: folder.read(object) for name, (_, object) in files.items()}
        entries = head.entries if trusted else {}
        kernels = {
            name: Built(sources[name], objects[name], entry, head.launches.get(name)) for name, entry in entries.items()
        }
        snapshots = {name: _text(folder.read(f"after-{name}.txt"), f"after-{name}.txt") for name in head.snapshots}
        tensors = read_tensors(folder.map(WEIGHTS, verify))
        check_artifact(artifact, tensors)
    return Contents(artifact, tensors, kernels, sources, report, snapshots)


@dataclass(frozen=True)
class _Head:
    """The manifest's own fields: the function in each kernel object, the snapshots in order, the target, and how the
    kernels for GPUs are started."""

    entries: dict[str, str]
    snapshots: tuple[str, ...]
    target: str
    launches: dict[str, Launch] = field(default_factory=dict)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError("a text file is not UTF-8", where=where, found=error.reason) from None
