"""A compiled model: called like the model it came from; generates text; shows weights, kernels, graphs and report."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.artifact import KernelSpec, TransformRecord
from qcompile.dot import dot
from qcompile.errors import ArtifactError, ConfigError, near
from qcompile.report import Report
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.codes import code_here, one_code, parts
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.generate import Sampling, first_tokens, generate
from qcompile.runtime.inputs import check_indices
from qcompile.runtime.output import Output, structured
from qcompile.runtime.reference import ReferenceSession
from qcompile.runtime.rocm import device_of
from qcompile.runtime.runner import Runner
from qcompile.runtime.state import State
from qcompile.runtime.store import Contents, write
from qcompile.target import Target, target

# Models that, given no position_ids, count from a row's first token; the others count padding too.
FROM_FIRST_TOKEN = frozenset({"opt", "biogpt"})


@dataclass(frozen=True)
class Kernel:
    """A kernel of a compiled model: the text it was made from, and the data that text was made from."""

    source: str
    spec: KernelSpec


class CompiledModel:
    """A model that `compile` made or `load` read. Nothing runs, and no machine is needed, before the first call.

    `on` is where it runs (None: the target it was compiled for); `threads` how many processors a CPU target uses (None:
    all that the process may use). `bounds` says what its kernels may touch; None trusts them.
    """

    def __init__(
        self,
        contents: Contents,
        *,
        on: str | Target | None = None,
        threads: int | None = None,
        bounds: Bounds | None = None,
    ):
        self.contents, self.artifact, self.threads, self.bounds = contents, contents.artifact, threads, bounds
        self.target = target(self.artifact.target if on is None else on)

    @functools.cached_property
    def session(self) -> Runner:
        """What runs the model; ArtifactError where this machine cannot."""
        sizes = self.artifact.sizes
        if self.target.backend == "reference":
            if self.artifact.graph is None:
                raise ArtifactError("the artifact has no graph", remedy='compile with target="reference"')
            return ReferenceSession(self.artifact.graph, self.contents.tensors, self.target.device, sizes=sizes)
        if self.artifact.executable is None:
            found, remedy = f"target {self.artifact.target}", f'compile with target="{self.target.name}"'
            raise ArtifactError("the artifact has no kernels for this target", found=found, remedy=remedy)
        missing = self.target.missing()
        if missing:
            found, remedy = f"a machine without {', '.join(missing)}", 'target="reference" runs anywhere'
            raise ArtifactError(
                "the artifact is for another machine", found=found, expected=self.target.name, remedy=remedy
            )
        executable, tensors, kernels = self.artifact.executable, self.contents.tensors, self.contents.kernels
        if self.target.backend == "cuda":
            code = code_here(self.target)
            kernels = one_code(kernels, executable.kernels, code)
            return CudaSession(executable, tensors, kernels, device_of(code), sizes=sizes, bounds=self.bounds)
        # Linking objects for a processor takes a library that a machine with a GPU may lack.
        from qcompile.runtime.session import Session

        return Session(executable, tensors, kernels, sizes=sizes, threads=self.threads, bounds=self.bounds)

    def __call__(self, *args: torch.Tensor, **inputs: Any) -> Any:
        """What the source model returns for the same inputs, positional or by name.

        A causal language model takes input_ids [b, s] and, if wanted, attention_mask [b, s] (padding at either end),
        position_ids [b, s], past_key_values (from an earlier call with use_cache=True), use_cache, logits_to_keep. It
        returns an object with `logits` f32 [b, positions, vocabulary]: transformers' class where that is imported.
        """
        if self.artifact.kind == "causal-lm":
            names = ("input_ids", "attention_mask", "position_ids")
            return self._language(**self._named(args, inputs, names))
        ports = self._inputs()
        given = self._named(args, inputs, tuple(ports))
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        given = self.session.signature.fill(given, self.artifact.defaults)
        return structured(self.session(given), self.artifact.structure)

    def _inputs(self) -> list[str]:
        if self.artifact.executable is not None:
            return [port.name for port in self.artifact.executable.inputs]
        return [buffer.name for buffer in self.artifact.graph.inputs] if self.artifact.graph is not None else []

    def _named(self, args: Sequence[Any], inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        if len(args) > len(names):
            raise ConfigError("too many positional inputs", found=len(args), expected=", ".join(names))
        given = dict(zip(names, args, strict=False))
        for name in inputs:
            if name in given:
                raise ConfigError("an input is given twice", found=name)
        return {**given, **inputs}

    def _ids(self, input_ids: Any) -> torch.Tensor:
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            found = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ConfigError("input_ids is not a batch of token ids", found=found, expected="an integer tensor [b, s]")
        vocabulary = self.artifact.model_config.get("vocab_size")
        if isinstance(vocabulary, int):
            check_indices("input_ids", input_ids, vocabulary)
        return input_ids.long()

    def _language(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: State | None = None,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool = True,
        **unknown: Any,
    ) -> Any:
        for name in unknown:
            known = "input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep"
            raise ConfigError("an input is not known" + near(name, known.split(", ")), found=repr(name), expected=known)
        ids = self._ids(input_ids)
        batch, length = ids.shape
        state = self.session.new_state(batch) if past_key_values is None else past_key_values
        if not isinstance(state, State):
            raise ConfigError("past_key_values is not a state of this model", found=type(state).__name__)
        past = state.length
        if past == 0:
            state.first.copy_(first_tokens(attention_mask, ids.shape)[0])
        if position_ids is None:
            position_ids = torch.arange(past, past + length).expand(batch, length)
            if self.artifact.model_config.get("model_type") in FROM_FIRST_TOKEN:
                position_ids = (position_ids - state.first[:, None].cpu()).clamp(min=0)
        if isinstance(logits_to_keep, torch.Tensor):
            check_indices("logits_to_keep", logits_to_keep, length)
            keep = logits_to_keep.long()
        else:
            keep = torch.arange(max(0, length - logits_to_keep) if logits_to_keep else 0, length)
        logits = self.session({"input_ids": ids, "position_ids": position_ids, "keep": keep}, state)["logits"]
        cache = state if use_cache else None
        if not return_dict:
            return (logits,) if cache is None else (logits, cache)
        return _causal_output()(logits=logits, past_key_values=cache)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Callable[[torch.Tensor], Any] | Any | None = None,
    ) -> torch.Tensor:
        """The prompts i64 [b, s] (padded on the left where attention_mask is 0) and what follows, i64 [b, s + new].

        The likeliest token is taken, or one drawn if `do_sample` (`seed` or `generator` makes that repeatable). A row
        ends with eos_token_id (by default the model's own; an empty list: never) and is filled with pad_token_id.
        `streamer` is called with each step's tokens [b], or is an object with put() and end().
        """
        if self.artifact.kind != "causal-lm":
            raise ConfigError("this model does not generate text", found=f"kind {self.artifact.kind!r}")
        sampling = None
        if do_sample:
            if generator is None and seed is not None:
                generator = torch.Generator().manual_seed(seed)
            sampling = Sampling(temperature, top_k, top_p, generator)
        defaults = self.artifact.generation
        eos = defaults.get("eos_token_id") if eos_token_id is None else eos_token_id
        return generate(
            self.session,
            self._ids(input_ids),
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=None if isinstance(eos, Sequence) and not eos else eos,
            pad_token_id=defaults.get("pad_token_id") if pad_token_id is None else pad_token_id,
            streamer=streamer,
        )

    def weight(self, path: str) -> torch.Tensor:
        """The weight f32 [N, K] of the module at `path`, from the packed tensors by the format's formula.

        That of a mixture of experts is [E, N, K], and that of a convolution [N, C, *window].

        It is the weight that acts on the module's own input: a permutation, rotation or scale that the compiled model
        applies to the input instead is undone.
        """
        mixture = self.artifact.mixtures.get(path)
        if mixture is not None:
            whole = torch.cat([self._weight(part) for part in mixture.parts])
            return whole.reshape(mixture.experts, -1, whole.shape[-1])
        weight, origin = self._weight(path), self.artifact.weights[path].origin
        return weight if origin is None or not origin.module.window else origin.module.unflattened(weight)

    def _weight(self, path: str) -> torch.Tensor:
        from qcompile.evaluate import dequantize
        from qcompile.format import format_from_json
        from qcompile.transform import Applied, effective_weight, transform_from_json

        records, tensors = self.artifact.weights, self.contents.tensors
        if path not in records:
            raise ConfigError(f"no module of that name has a weight{near(path, records)}", found=repr(path))
        record = records[path]
        packed = {stored: tensors[name] for stored, name in record.tensors.items()}
        rows = torch.arange(record.row, record.row + record.rows)
        weight = dequantize(format_from_json(record.format), packed, record.n, record.k, rows)
        if record.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, tensors[record.order].long(), weight)

        def applied(each: TransformRecord) -> Applied:
            held = {stored: tensors[name] for stored, name in each.tensors.items()}
            return Applied(transform_from_json(each.transform), held)

        residual = None if record.residual is None else applied(record.residual)
        return effective_weight(weight, [applied(each) for each in record.before], residual)

    @functools.cached_property
    def report(self) -> Report:
        """What happened to every weight and node."""
        return Report.from_json(self.contents.report)

    def graph(self, after: str | None = None) -> str:
        """The graph's text after the pass called `after`; after the last one, if None."""
        snapshots = self.contents.snapshots
        if not snapshots:
            raise ConfigError("the model has no graphs to show")
        name = list(snapshots)[-1] if after is None else after
        if name not in snapshots:
            raise ConfigError(f"no graph was kept after {name!r}{near(name, snapshots)}", expected=", ".join(snapshots))
        return snapshots[name]

    def dot(self) -> str:
        """The final graph in the DOT language, which Graphviz draws."""
        if self.artifact.graph is None:
            raise ConfigError("the model has no graph to draw", remedy="the report's notes say why")
        return dot(self.artifact.graph)

    def kernels(self) -> dict[str, Kernel]:
        """The kernels by name; those for GPUs once for each machine code, "linear_1a2b.sm_90"."""
        executable = self.artifact.executable
        specs = executable.kernels if executable is not None else {}
        texts = dict(self.contents.sources) | {name: kernel.source for name, kernel in self.contents.kernels.items()}
        return {name: Kernel(text, specs[parts(name)[0]]) for name, text in texts.items()}

    def save(self, path: str | Path) -> None:
        """Write the artifact: a folder that `load` reads, the same bytes for the same model."""
        write(path, self.contents)

    def export_checkpoint(self, folder: str | Path) -> None:
        """Write the model to a new folder as its quantization method's own package stores it, for any loader of those.

        It holds config.json, safetensors (in shards when they are large) and what else the method writes; tokenizer
        files are not part of a compiled model. ConfigError where the method defines no checkpoint, or where the layout
        of a CPU target has lost what one stores.
        """
        # Methods are needed for this alone: a model that only runs does not load them.
        export = importlib.import_module("qcompile.export")
        export.export_checkpoint(self.artifact, self.contents.tensors, folder)

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.contents.tensors.values())
        what = f"{self.artifact.kind}, {len(self.artifact.weights)} weights, {size / 2**20:.1f} MiB"
        return f"CompiledModel({what}, target={self.target.name!r}, accuracy={self.artifact.accuracy!r})"


def _causal_output() -> Any:
    """transformers' output class of causal language models, or ours with the same fields where nobody imported that.

    Importing it here would take seconds and more memory than a small model.
    """
    return getattr(sys.modules.get("transformers.modeling_outputs"), "CausalLMOutputWithPast", Output)
