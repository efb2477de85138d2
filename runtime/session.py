"""Runs a lowered program on the CPU: its kernels are native code, which all threads of a pool walk together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qcompile.artifact import Built, Executable
from qcompile.runtime import native
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.plan import Plan, Table
from qcompile.runtime.planned import Binding, PlannedSession
from qcompile.runtime.threads import checked, pool

ROW = 24  # bytes of a row of the step table


def _step_table(plan: Plan) -> Table:
    """The table that native code walks: the plan's, with addresses in place of indices."""
    table = plan.steps.copy()
    table[:, 1] = table[:, 1] * 8 + plan.args.ctypes.data
    table[:, 2] = table[:, 2] * 8 + plan.dims.ctypes.data
    return table


class _Native(Binding):
    """A binding with the table that native code walks, and its address."""

    def __init__(self, plan: Plan, executable: Executable, slots: int):
        super().__init__(plan, executable, slots, keeps=False)
        self.table = _step_table(plan)
        self.address = self.table.ctypes.data


class Session(PlannedSession):
    """An executable in memory on the CPU. `threads` is how many run it (None: as many as the process may use)."""

    def __init__(
        self,
        executable: Executable,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Built],
        *,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        threads: int | None = None,
        bounds: Bounds | None = None,
    ):
        self.threads = checked(threads)
        super().__init__(executable, weights, kernels, torch.device("cpu"), sizes=sizes, bounds=bounds)

    def _load(self, kernels: Mapping[str, Built]) -> dict[str, int]:
        self.loaded = native.load_objects(kernels)
        return self.loaded.addresses

    def _bind(self, plan: Plan, slots: int) -> Binding:
        return _Native(plan, self.executable, slots)

    def _native(self, binding: Binding, start: int, count: int) -> None:
        assert isinstance(binding, _Native)
        pool(self.threads).run(binding.address + start * ROW, count)
