"""Settings of every test run."""

from __future__ import annotations

import contextlib
import logging
import os

import torch

# Triton decides when it is imported whether kernels are interpreted; those that are compiled are so in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"

# The test processes fill the machine already: threads that wait for each other make torch's own operators 30 times slower.
torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # which a machine for the tests of GPUs alone need not have
    from hypothesis import HealthCheck, settings

    # How long an example takes on a busy machine decides nothing.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")

# pytest listens to every logger that does not propagate, and torch writes each step of a trace to one that is listened to.
logging.getLogger("torch.__trace").propagate = True

import exports  # noqa: E402

exports.install()
