"""The ledger of a checkpoint's tensors: which use each was put to, and that none is left over."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qcompile.errors import CheckpointError
from qcompile.sources import TensorSource, missing


@dataclass
class Ledger:
    """Which use every tensor of a source was put to; a tensor ends in exactly one place."""

    source: TensorSource
    claims: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def claim(self, name: str, by: str) -> None:
        """Note that tensor `name` is used by `by` (a module path, or the tensor's own name); claims repeat freely."""
        if name not in self.source.names():
            raise missing(name, self.source)
        users = self.claims.setdefault(name, [])
        if by not in users:
            users.append(by)

    def ignore(self, name: str, reason: str) -> None:
        """Note that tensor `name` is deliberately not used, and why."""
        if name not in self.source.names():
            raise missing(name, self.source)
        self.ignored[name] = reason

    def read(self, name: str, by: str) -> torch.Tensor:
        """The tensor, claimed."""
        self.claim(name, by)
        return self.source.read(name)

    def unclaimed(self) -> tuple[str, ...]:
        """Names that were neither claimed nor ignored."""
        return tuple(n for n in self.source.names() if n not in self.claims and n not in self.ignored)

    def check(self) -> None:
        """CheckpointError naming every tensor that ended nowhere, or in more than one place."""
        wrong = [f"{name}: not used" for name in self.unclaimed()]
        for name, users in self.claims.items():
            places = [*users, *([f"ignored ({self.ignored[name]})"] if name in self.ignored else [])]
            if len(places) > 1:
                wrong.append(f"{name}: used {len(places)} times, by {', '.join(places)}")
        if wrong:
            raise CheckpointError(
                "tensors that did not end in exactly one place",
                where=self.source.describe(),
                found="; ".join(wrong),
                expected="every tensor of the source used once",
                remedy="check that the quantization config and the architecture are those the checkpoint was made with",
            )
