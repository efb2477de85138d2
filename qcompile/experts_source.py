"""Checkpoints that hold each expert's layers by themselves, for architectures that keep all experts in one tensor."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.sources import Names, TensorInfo, TensorSource, Wrapper, missing

FLOATS = ("f32", "f16", "bf16")
_ONE_OF_MANY = re.compile(r"(?P<layer>.+\.(?P<expert>\d+)\.[^.]+)\.")


@dataclass(frozen=True)
class PerExpert(Wrapper):
    """A source in which tensors that hold all experts stand for those of single experts.

    `merged` maps a tensor [E, N, K] to the source's tensors that make it up, for each expert those that lie one below
    the other. `parts` maps a tensor that cannot be had so, because its experts are quantized one by one, to the paths of
    their layers in the same order; their tensors keep their names.
    """

    merged: Mapping[str, tuple[tuple[str, ...], ...]]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @functools.cached_property
    def _names(self) -> Names:
        inside = {name for experts in self.merged.values() for names in experts for name in names}
        return Names((*(name for name in self.source.names() if name not in inside), *self.merged))

    def names(self) -> Names:
        return self._names

    def info(self, name: str) -> TensorInfo:
        if name not in self.merged:
            return self._own(name).info(name)
        infos = [self.source.info(part) for part in self.merged[name][0]]
        rows = sum(info.shape[0] for info in infos)
        return TensorInfo(infos[0].dtype, (len(self.merged[name]), rows, *infos[0].shape[1:]))

    def read(self, name: str) -> torch.Tensor:
        if name not in self.merged:
            return self._own(name).read(name)
        whole: torch.Tensor | None = None
        for at, parts in enumerate(self.merged[name]):
            expert = torch.cat([self.source.read(part) for part in parts])
            if whole is None:  # one expert at a time, so that the experts are not in memory twice
                whole = expert.new_empty((len(self.merged[name]), *expert.shape))
            if expert.shape != whole.shape[1:]:
                raise CheckpointError(
                    "the experts of a layer have different shapes",
                    where=", ".join(parts),
                    found=list(expert.shape),
                    expected=list(whole.shape[1:]),
                    remedy="the checkpoint is damaged, or belongs to another architecture",
                )
            whole[at] = expert
        assert whole is not None  # an architecture has experts
        return whole

    def _own(self, name: str) -> TensorSource:
        if name not in self._names:
            raise missing(name, self)
        return self.source


def per_expert(source: TensorSource, shell: Any) -> TensorSource:
    """`source` as the architecture of `shell` wants it, by transformers' own table of which tensors it merges."""
    state = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    there = source.names()
    inside: dict[str, set[str]] = {}
    for name in there:
        match = _ONE_OF_MANY.match(name)
        if match is not None:
            inside.setdefault(match["layer"], set()).add(name)
    # target -> place of the projection -> number of the expert -> the tensor that a float checkpoint has
    wanted: dict[str, dict[int, dict[int, str]]] = {}
    mergers = _mergers(shell) if inside else []
    for layer, own in inside.items():
        for name in sorted({f"{layer}.weight", *own}):
            for converter in mergers:
                target, pattern = converter.rename_source_key(name)
                if pattern is not None and target in state:
                    place, match = converter.source_patterns.index(pattern), _ONE_OF_MANY.match(name)
                    assert match is not None
                    wanted.setdefault(target, {}).setdefault(place, {})[int(match["expert"])] = name
    merged, parts = {}, {}
    for target, projections in wanted.items():
        order = _in_order(target, projections, state[target][0], source)
        names = [name for experts in order for name in experts]
        layers = [name.rpartition(".")[0] for name in names]
        plain = all(name in there and source.info(name).dtype in FLOATS for name in names)
        if plain and all(inside[layer] <= {f"{layer}.weight", f"{layer}.bias"} for layer in layers):
            merged[target] = order
        elif names[0].endswith(".weight"):
            parts[target] = tuple(layers)
    return PerExpert(source, merged, parts) if merged or parts else source


def _in_order(
    target: str, projections: Mapping[int, Mapping[int, str]], experts: int, source: TensorSource
) -> tuple[tuple[str, ...], ...]:
    """For each expert its tensors, one below the other; CheckpointError unless every expert has them all."""
    for numbers in projections.values():
        if sorted(numbers) != list(range(experts)):
            raise CheckpointError(
                "the checkpoint has not all the experts of a layer",
                where=f"{target}, {source.describe()}",
                found=f"{len(numbers)} experts, such as {numbers[min(numbers)]}",
                expected=f"the experts 0 to {experts - 1}",
                remedy="check that the checkpoint is complete and belongs to this config.json",
            )
    return tuple(tuple(projections[place][number] for place in sorted(projections)) for number in range(experts))


def _mergers(shell: Any) -> list[Any]:
    """transformers' conversions that stack the tensors of single experts, and those below each other before that."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
    except ImportError:  # an older transformers, whose models keep experts apart themselves
        return []
    found = []
    for conversion in get_model_conversion_mapping(shell):
        if isinstance(conversion, WeightConverter):
            first, *rest = conversion.operations
            if isinstance(first, MergeModulelist) and all(isinstance(o, Concatenate) and o.dim == 1 for o in rest):
                found.append(conversion)
    return found
