"""Worker threads: one pool a thread count, shared by all sessions, made anew in a forked child, joined at exit."""

from __future__ import annotations

import atexit
import os
import threading

import torch

from qcompile.errors import ConfigError
from qcompile.runtime import native
from qcompile.runtime.memory import allocate

_POOLS: dict[int, Pool] = {}
_LOCK = threading.Lock()


def default_threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """`threads` - 1 workers that wait in native code; the caller of `run` is thread 0."""

    def __init__(self, threads: int):
        self.threads, self.lock, self.executor = threads, threading.Lock(), native.executor()
        self.memory = allocate(native.POOL_BYTES)
        self.address = self.memory.data_ptr()
        self.memory.view(torch.int64)[native.THREADS] = threads
        self.executor.prepare(self.address)
        self.workers: list[threading.Thread] = []
        try:
            for index in range(1, threads):
                arguments = (self.address, index)
                worker = threading.Thread(
                    target=self.executor.work, args=arguments, name=f"qcompile-{index}", daemon=True
                )
                worker.start()
                self.workers.append(worker)
        except BaseException:
            self.stop()
            raise

    def run(self, steps: int, count: int) -> None:
        """Run `count` > 0 steps of the table at address `steps` on all threads; callers take turns."""
        with self.lock:
            self.executor.run(self.address, steps, count)

    def stop(self) -> None:
        """Let the workers end, and wait for them."""
        self.executor.stop(self.address)
        for worker in self.workers:
            worker.join()


def checked(threads: int | None) -> int:
    """`threads`, as many as the process may use if None; ConfigError for a count that makes no sense."""
    count = default_threads() if threads is None else threads
    if not 1 <= count <= 1024:
        raise ConfigError("a thread count is out of range", where="threads", found=count, expected="1 to 1024")
    return count


def pool(threads: int) -> Pool:
    """The process's pool of that many threads; ConfigError for a count that makes no sense."""
    found = _POOLS.get(threads)
    if found is not None:
        return found
    checked(threads)
    with _LOCK:
        if threads not in _POOLS:
            _POOLS[threads] = Pool(threads)
        return _POOLS[threads]


def _stop_all() -> None:
    while _POOLS:
        _POOLS.popitem()[1].stop()


def _forget() -> None:
    """In a forked child the workers are gone and locks may be held by no one: start over."""
    global _LOCK
    _LOCK = threading.Lock()
    _POOLS.clear()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
