"""Built kernels in the user's cache folder: by content, verified when read, private, safe for several writers."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qcompile import codec
from qcompile.artifact import Built, Extents, KernelSpec, Launch
from qcompile.errors import ArtifactError

log = logging.getLogger("qcompile")
MAX_ENTRY = 64 * 2**20

Wanted = tuple[KernelSpec, str]
"""A kernel and the target it is wanted for."""


class Builder(Protocol):
    """What makes kernels: the compiler, handed in by whoever has one."""

    def key(self, spec: KernelSpec, target: str) -> str:
        """A digest (lower-case hex) of all that the kernel's object depends on: text, target, compilers."""

    def build(self, kernels: Mapping[str, Wanted]) -> Mapping[str, Built]:
        """The kernels, made now."""

    def extents(self, spec: KernelSpec) -> Extents:
        """What the kernel may touch of its arguments; ArtifactError for parameters that no kernel can be made from."""


def cache_folder() -> Path:
    """QCOMPILE_HOME, else XDG_CACHE_HOME/qcompile, else ~/.cache/qcompile."""
    home, xdg = os.environ.get("QCOMPILE_HOME"), os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home)
    return (Path(xdg) if xdg else Path.home() / ".cache") / "qcompile"


def build_kernels(wanted: Mapping[str, Wanted], builder: Builder, folder: Path | None = None) -> dict[str, Built]:
    """Each kernel of `wanted`, from the cache in `folder` (the user's, if None) or else from `builder`."""
    place = _private(cache_folder() if folder is None else folder)
    keys = {name: builder.key(*each) for name, each in wanted.items()}
    found = {name: kernel for name, key in keys.items() if place and (kernel := _read(place / f"{key}.kernel"))}
    missing = {name: each for name, each in wanted.items() if name not in found}
    made = builder.build(missing) if missing else {}
    for name in missing:
        found[name] = made[name]
        if place:
            _write(place / f"{keys[name]}.kernel", made[name])
    return {name: found[name] for name in wanted}


def _private(folder: Path) -> Path | None:
    """The kernels' folder, made if need be; None, with a warning, if others may write to it or it cannot be made."""
    place = folder / "kernels"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
    except OSError as error:
        log.warning("kernels are not cached: %s", error)
        return None
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022):
        log.warning("kernels are not cached: others may write to %s", place)
        return None
    return place


@dataclass(frozen=True)
class _Entry:
    source: str
    entry: str
    object: str
    launch: Launch | None = None


def _read(path: Path) -> Built | None:
    """A cached kernel; None where there is none, or (with a warning) one that is damaged, which is removed."""
    try:
        with open(path, "rb") as file:
            # A buffer for the largest entry would be allocated whole.
            data = file.read(min(os.fstat(file.fileno()).st_size, MAX_ENTRY) + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("a cached kernel cannot be read: %s", error)
        return None
    digest, _, text = data.partition(b"\n")
    try:
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ArtifactError("the digest differs", where=path.name)
        entry = codec.decode(_Entry, codec.parse(text, path.name), path.name)
        return Built(entry.source, bytes.fromhex(entry.object), entry.entry, entry.launch)
    except (ArtifactError, ValueError) as error:
        log.warning("a cached kernel is damaged and made anew: %s", error)
        path.unlink(missing_ok=True)
        return None


def _write(path: Path, kernel: Built) -> None:
    """Put an entry in place as a whole; whoever writes the same key writes the same kernel."""
    text = codec.render(codec.encode(_Entry(kernel.source, kernel.entry, kernel.object.hex(), kernel.launch)))
    try:
        descriptor, staged = tempfile.mkstemp(prefix=".", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        os.replace(staged, path)
    except OSError as error:
        log.warning("a kernel is not cached: %s", error)
