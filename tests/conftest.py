"""Settings of every test run."""

from __future__ import annotations

import torch

# The test processes fill the machine already: threads that wait for each other make torch's own operators 30 times slower.
torch.set_num_threads(1)
