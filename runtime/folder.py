"""A folder of checked files: written as a whole or not at all, read without following links, by digests."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qcompile import codec
from qcompile.errors import ArtifactError

MANIFEST = "manifest.json"
SCHEMA = 1
NAMES = re.compile(
    r"(?:program|graph|report)\.json|weights\.safetensors|after-[a-z0-9-]{1,64}\.txt|"
    r"kernel-[a-z0-9_-]{1,128}\.(?:mlir|o|(?:sm_[0-9]{2,3}|interpret)\.(?:py|cubin)|ptx(?:\.py)?|gfx[0-9a-f]{3,4}\.(?:py|hsaco))"
)
MAX_FILES = 20_000
MAX_MANIFEST = 16 * 2**20
MAX_FILE = 512 * 2**20  # all but the weights
WEIGHTS = "weights.safetensors"

Content = bytes | Callable[[BinaryIO], None]


def file_allowed(name: str) -> bool:
    """Whether an artifact may hold a file of that name."""
    return NAMES.fullmatch(name) is not None


class _Digesting:
    """A file that knows the digest and length of what was written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self.file.write(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: Content) -> dict[str, Any]:
    with open(path, "xb") as file:
        target = _Digesting(file)
        if callable(content):
            content(target)  # type: ignore[arg-type]
        else:
            target.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": target.digest.hexdigest(), "bytes": target.length}


def _seal(head: Mapping[str, Any]) -> bytes:
    """The manifest with the digest of itself."""
    return codec.render({**head, "digest": hashlib.sha256(codec.render(head)).hexdigest()})


def check_free(path: Path) -> None:
    """ArtifactError unless an artifact can be put at `path`: one is there, or an empty folder, or nothing."""
    free = not path.exists() or (path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir())))
    if path.is_symlink() or not free:
        raise ArtifactError("something else is in the way", where=str(path), expected="a compiled artifact, or nothing")


def write_folder(path: Path, head: Mapping[str, Any], files: Mapping[str, Content]) -> None:
    """Write `files` and a manifest with `head` and each file's digest, then put the whole at `path`.

    An artifact that is there is replaced; anything else that is there is an ArtifactError. A crash leaves the old
    folder, or none, and a hidden staging folder beside it.
    """
    path = Path(os.path.abspath(path))
    check_free(path)
    unknown = sorted(name for name in files if not file_allowed(name))
    if unknown:
        raise ArtifactError("a file may not be in an artifact", where=str(path), found=", ".join(unknown[:5]))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            entries = {name: _write(staged / name, files[name]) for name in sorted(files)}
            _write(staged / MANIFEST, _seal({**head, "schema": SCHEMA, "files": entries}))
            staged.chmod(0o755)
            _sync(staged)
            _replace(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        _sync(path.parent)
    except OSError as error:
        raise ArtifactError("the artifact cannot be written", where=str(path), found=error) from error


def _replace(staged: Path, path: Path) -> None:
    if not path.exists():
        os.rename(staged, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    os.rename(path, old)  # onto an empty folder
    try:
        os.rename(staged, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


class Folder:
    """An artifact's folder, open for reading: iterating gives its files; `head` is what the writer put in it."""

    def __init__(self, path: Path, directory: int):
        self.path, self._directory = path, directory
        manifest = codec.parse(self._take(MANIFEST, MAX_MANIFEST), MANIFEST)
        self.head, self._entries = _unseal(manifest)
        present = set(self._list()) - {MANIFEST}
        for name in sorted(present - self._entries.keys()):
            raise ArtifactError(
                "a file is not in the manifest", where=name[:200], expected="no other file in the folder"
            )
        for name in sorted(self._entries.keys() - present):
            raise ArtifactError("a file is missing", where=name, expected=f"{self._entries[name]['bytes']} bytes")
        for name, entry in self._entries.items():
            with self._open(name) as file:
                length = os.fstat(file.fileno()).st_size
            if length != entry["bytes"]:
                expected = f"{entry['bytes']} bytes, as in the manifest"
                raise ArtifactError(
                    "a file has the wrong length", where=name, found=f"{length} bytes", expected=expected
                )
            if name != WEIGHTS and length > MAX_FILE:
                raise ArtifactError(
                    "a file is too large", where=name, found=length, expected=f"at most {MAX_FILE} bytes"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def read(self, name: str) -> bytes:
        """The bytes of a file, after comparing their digest with the manifest."""
        if name not in self._entries:
            raise ArtifactError("a file is missing from the manifest", where=name)
        data = self._take(name, self._entries[name]["bytes"])
        self._compare(name, data)
        return data

    def map(self, name: str, verify: bool) -> mmap.mmap:
        """A file as private memory that is read when it is touched; its digest is compared if `verify`."""
        if name not in self._entries:
            raise ArtifactError("a file is missing from the manifest", where=name)
        with self._open(name) as file:
            try:
                memory = mmap.mmap(file.fileno(), self._entries[name]["bytes"], access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ArtifactError("a file cannot be mapped", where=name, found=error) from None
        if verify:
            self._compare(name, memory)
        return memory

    def _compare(self, name: str, data: Any) -> None:
        found = hashlib.sha256(data).hexdigest()
        if found != self._entries[name]["sha256"]:
            expected = self._entries[name]["sha256"]
            raise ArtifactError(
                "a file was changed", where=name, found=f"sha256 {found}", expected=f"sha256 {expected}"
            )

    def _list(self) -> list[str]:
        names = []
        for entry in os.scandir(self._directory if os.scandir in os.supports_fd else self.path):
            names.append(entry.name)
            if len(names) > MAX_FILES:
                raise ArtifactError("the folder holds too many files", where=str(self.path), expected=f"{MAX_FILES}")
        return names

    def _open(self, name: str) -> BinaryIO:
        """The regular file `name` itself: never a link, a device, or something outside the folder."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(name, flags, dir_fd=self._directory)
        except OSError as error:
            found = "a link" if error.errno == errno.ELOOP else error.strerror
            raise ArtifactError("a file cannot be opened", where=name, found=found, expected="a regular file") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ArtifactError("a file is not a regular file", where=name)
        return os.fdopen(descriptor, "rb")

    def _take(self, name: str, most: int) -> bytes:
        with self._open(name) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ArtifactError("a file is too large", where=name, expected=f"at most {most} bytes")
        return data


def _unseal(manifest: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    if type(manifest) is not dict:
        raise ArtifactError("the manifest is not an object", where=MANIFEST)
    schema = manifest.get("schema")
    if schema != SCHEMA:
        remedy = "a newer qcompile may know it" if isinstance(schema, int) and schema > SCHEMA else ""
        raise ArtifactError(
            "the schema is not known", where=MANIFEST, found=repr(schema)[:80], expected=SCHEMA, remedy=remedy
        )
    head = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest.get("digest") != hashlib.sha256(codec.render(head)).hexdigest():
        raise ArtifactError("the manifest was changed", where=MANIFEST, expected="the digest that it bears")
    files = head.pop("files", None)
    del head["schema"]
    if type(files) is not dict or len(files) > MAX_FILES:
        raise ArtifactError(
            "the manifest's files are not a table", where=MANIFEST, expected=f"at most {MAX_FILES} files"
        )
    for name, entry in files.items():
        if not file_allowed(name):
            raise ArtifactError("a file may not be in an artifact", where=MANIFEST, found=repr(name)[:200])
        digest = entry.get("sha256") if type(entry) is dict and entry.keys() == {"sha256", "bytes"} else None
        if type(digest) is not str or type(entry["bytes"]) is not int or not 0 <= entry["bytes"] < 2**62:
            raise ArtifactError("a manifest entry is not known", where=name, expected="sha256 and bytes")
    return head, files


@contextmanager
def open_folder(path: Path) -> Iterator[Folder]:
    """The artifact at `path`, its manifest checked against what lies there."""
    if not path.is_dir() or not os.path.lexists(path / MANIFEST):
        found = "a folder without it" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise ArtifactError(
            "no artifact is there", where=str(path), found=found, expected=f"a folder with {MANIFEST}",
            remedy="`qcompile compile` makes one of a model",
        )  # fmt: skip
    directory = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        yield Folder(path, directory)
    finally:
        os.close(directory)
