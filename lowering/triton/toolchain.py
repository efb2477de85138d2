"""From Triton sources to machine code, with no GPU: worker processes compile them, as many at a time as there are processors.

The same source, target and version of Triton give the same bytes. Triton keeps nothing: its files lie in temporary folders.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from qcompile.artifact import Built, Launch
from qcompile.errors import ToolchainError
from qcompile.lowering.triton import sass
from qcompile.lowering.triton.devices import DEVICES
from qcompile.lowering.triton.source import Source
from qcompile.target import LEAST_CAPABILITY, PTX, Target

WORKER = Path(__file__).parent / "worker.py"
SECONDS = 300  # what takes longer is not compiling but stuck
PTX_VERSION = 78  # of the first driver that knows capabilities 8.9 and 9.0: whatever needs the fallback can read it

SHARED = {capability: gpu.shared for capability, gpu in DEVICES.items()}
"""Bytes of shared memory that one block may use, by capability."""

TYPES: dict[str, str] = {
    "f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8",
    "u8": "u8", "u16": "u16", "u32": "u32", "bool": "i1", "f8e4m3": "fp8e4nv", "f8e5m2": "fp8e5", "f8e8m0": "u8",
}  # fmt: skip


_kept: ContextVar[tuple[ExitStack, list[_Worker]] | None] = ContextVar("kept", default=None)


@dataclass(frozen=True)
class Job:
    """A source and the target it is compiled for, which has one capability."""

    source: Source
    target: Target

    def request(self) -> dict[str, Any]:
        """What a worker is asked, as its page describes it."""
        source, target = self.source, self.target
        types = ["*" + TYPES[dtype] for dtype in source.pointers] + ["i32"] * source.dims
        capability = LEAST_CAPABILITY if target.portable else target.capability
        gpu: list[Any] = ["cuda", capability, target.warp]
        return {
            "text": source.text, "entry": source.entry, "signature": types,
            "gpu": gpu if target.isa == "ptx" else ["hip", target.code, target.warp],
            "warps": source.warps, "stages": source.stages, "fusion": source.fusion,
            "ptx": PTX_VERSION if capability == LEAST_CAPABILITY else None, "assemble": not target.portable,
        }  # fmt: skip


def key(source: Source, target: Target) -> str:
    """A name for what `source` gives on `target`: a digest of the source, the target, the compiler and this code."""
    parts = (repr(source), target.name, *_versions())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    own = (Path(__file__), WORKER, Path(sass.__file__))
    return (f"triton {_triton()}", *(hashlib.sha256(file.read_bytes()).hexdigest() for file in own))


def _triton() -> str:
    """The version of Triton; ToolchainError without one."""
    try:
        return version("triton")
    except PackageNotFoundError as error:
        raise ToolchainError(
            "compiling for GPUs needs Triton", found=error, remedy="pip install 'qcompile[cuda]', or target='reference'"
        ) from error


def compile_sources(sources: Sequence[Source], target: Target) -> list[Built]:
    """Each source compiled for `target`; as `compile_jobs`."""
    return compile_jobs([Job(source, target) for source in sources])


def compile_jobs(jobs: Sequence[Job], done: Callable[[Job], None] | None = None) -> list[Built]:
    """Each source compiled for its target; `done` hears of each, from other threads.

    ToolchainError for a kernel that Triton refuses, that needs more shared memory than a block has, or memory that its
    caller would have to provide; it names a file with the text.
    """
    _triton()
    wanted = dict.fromkeys(jobs)
    least = [job for job in wanted if job.target.capability == LEAST_CAPABILITY]
    fallbacks = {job: fallback for job in least if (fallback := Job(job.source, PTX)) in wanted}
    # What takes longest comes first, so that no processor waits for the last; PTX last, as nothing is read from it.
    order = sorted(
        (job for job in wanted if job not in fallbacks.values()),
        key=lambda job: (job.target.portable, job.target.capability, -len(job.source.text)),
    )
    count = min(_processors(), len(order))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def compiled(job: Job) -> dict[Job, Built]:
        worker = idle.get()
        try:
            answer = worker.answer(job)
        finally:
            idle.put(worker)
        built = {job: _built(job.source, job.target, answer)}
        if job in fallbacks:
            # It was assembled from the same PTX.
            answer |= {"object": answer["ptx"], "registers": 0, "spills": 0}
            built[fallbacks[job]] = _built(job.source, PTX, answer)
        if done is not None:
            for each in built:
                done(each)
        return built

    made: dict[Job, Built] = {}
    with _workers(count) as workers, ThreadPoolExecutor(max(count, 1)) as threads:
        for worker in workers:
            idle.put(worker)
        waiting = {job: threads.submit(compiled, job) for job in order}
        try:
            for target in dict.fromkeys(job.target for job in order):
                futures = [future for job, future in waiting.items() if job.target == target]
                made |= _read({job: built for future in futures for job, built in future.result().items()})
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [made[job] for job in jobs]


@contextmanager
def workers_kept() -> Iterator[None]:
    """Processes that compile do not end with each call in here, but serve the next ones too, which need not wait for Triton."""
    with ExitStack() as stack:
        token = _kept.set((stack, []))
        try:
            yield
        finally:
            _kept.reset(token)


@contextmanager
def _workers(count: int) -> Iterator[list[_Worker]]:
    """So many processes that compile: those that are kept, and new ones."""
    with ExitStack() as own:
        stack, kept = _kept.get() or (own, [])
        workers = [kept.pop() if kept else stack.enter_context(_Worker()) for _ in range(count)]
        try:
            yield workers
        finally:
            kept += workers


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _built(source: Source, target: Target, answer: dict[str, Any]) -> Built:
    arguments = len(source.pointers) + source.dims
    scratch, most = answer["parameters"] - arguments, SHARED[target.capability]
    if scratch < 0:
        _fail("Triton left out an argument", source, f"{answer['parameters']} parameters, expected {arguments}")
    if answer["shared"] > most:
        _fail("a kernel needs more shared memory than a block has", source,
              f"{answer['shared']} bytes, expected at most {most} on {target.name}")  # fmt: skip
    launch = Launch(
        source.grid, answer["warps"], answer["shared"], scratch, source.stages, answer["registers"], answer["spills"]
    )
    return Built(source.text, base64.b64decode(answer["object"]), source.entry, launch)


def _read(made: Mapping[Job, Built]) -> dict[Job, Built]:
    """Kernels of one target, and PTX, with what their main loops do, where there is machine code and a loop worth looking at."""
    cubins = {job: built for job, built in made.items() if job.target.isa == "ptx" and not job.target.portable}
    read = [job for job, built in cubins.items() if "tl.dot(" in built.source]
    found = dict(zip(read, sass.profiles([made[job].object for job in read]), strict=True))

    def told(job: Job, built: Built) -> Built:
        assert built.launch is not None
        if job not in found:
            return built
        main = found[job].main
        return replace(built, launch=replace(built.launch, loop=main.instructions, products=main.products))

    return {job: told(job, built) for job, built in made.items()}


class _Worker:
    """A process that compiles one kernel after another, started when it is first asked, and anew after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        self._folder = tempfile.TemporaryDirectory(prefix="qcompile-triton-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._folder.cleanup()

    def answer(self, job: Job) -> dict[str, Any]:
        """The worker's answer; ToolchainError when that is an error, or the process died of it."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        limit = threading.Timer(SECONDS, process.kill)
        limit.start()
        try:
            process.stdin.write(json.dumps(job.request()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            process.kill()
            process.communicate()
            self._process = None
            _fail("the compiler died of a kernel", job.source, f"exit status {process.returncode}\n{self._said()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            _fail(f"Triton refused a kernel for {job.target.name}", job.source, f"{answer['error']}\n{self._said()}")
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            # What the variables of Triton and LLVM ask for would change what comes out, or where it is kept.
            steering = ("TRITON", "MLIR", "LLVM", "PTXAS", "AMDGCN")
            environment = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
            environment["TRITON_CACHE_DIR"] = str(Path(self._folder.name) / "cache")
            with open(Path(self._folder.name) / "stderr", "w") as stderr:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(WORKER), self._folder.name], env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                )  # fmt: skip
        return self._process

    def _said(self) -> str:
        """The end of what the process wrote besides its answers."""
        return (Path(self._folder.name) / "stderr").read_text(errors="replace")[-1000:]


def _fail(summary: str, source: Source, found: str) -> NoReturn:
    with tempfile.NamedTemporaryFile("w", prefix="qcompile-", suffix=".py", delete=False) as file:
        file.write(source.text)
    raise ToolchainError(summary, where=str(Path(file.name)), found=found.strip()[:3000])
