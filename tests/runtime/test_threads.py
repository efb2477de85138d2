"""Workers: idle processes cost nothing, forks start over, exit is clean."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import small_programs as small
import torch

from qcompile.errors import ConfigError
from qcompile.runtime import threads
from qcompile.runtime.session import Session

WEIGHTS = {"w": torch.ones(2, 4)}


def test_an_idle_pool_burns_nothing():
    run = Session(small.arithmetic(), WEIGHTS, small.kernels(), threads=3)
    run({"x": torch.ones(2, 4)})
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert torch.equal(run({"x": torch.ones(2, 4)})["y"], torch.full((2, 4), 4.0))


def test_one_thread_has_no_workers():
    assert threads.pool(1).workers == []


@pytest.mark.parametrize("count", [0, -1, 5000])
def test_a_thread_count_out_of_range(count):
    with pytest.raises(ConfigError, match="a thread count is out of range"):
        threads.pool(count)
    with pytest.raises(ConfigError, match="a thread count is out of range"):
        Session(small.arithmetic(), WEIGHTS, small.kernels(), threads=count)


def test_a_stopped_pool_has_no_threads_left():
    pool = threads.Pool(3)
    workers = pool.workers
    assert all(worker.is_alive() for worker in workers)
    pool.stop()
    assert not any(worker.is_alive() for worker in workers)


SCRIPT = """
import os, sys
import small_programs as small, torch
from qcompile.runtime.session import Session
run = Session(small.arithmetic(), {"w": torch.ones(2, 4)}, small.kernels(), threads=2)
def check():
    assert torch.equal(run({"x": torch.ones(2, 4)})["y"], torch.full((2, 4), 4.0))
check()
"""


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT + textwrap.dedent(body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_exit_is_clean():
    done = run_script("print('end')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_its_own_workers():
    done = run_script(
        """
        child = os.fork()
        check()
        if child == 0:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_an_error_leaves_the_session_usable():
    done = run_script(
        """
        try:
            run({"x": torch.ones(3)})
        except Exception as error:
            print(type(error).__name__)
        check()
        """
    )
    assert (done.returncode, done.stdout) == (0, "ConfigError\n"), done.stderr
