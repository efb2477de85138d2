"""Text generation over a conversation's state: greedy or sampled, batched, with end-of-sequence and streaming."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from qcompile.artifact import Buffer
from qcompile.errors import ConfigError
from qcompile.runtime.inputs import Signature
from qcompile.runtime.state import State


class Runner(Protocol):
    """A session, whatever runs it."""

    signature: Signature
    states: tuple[Buffer, ...]

    def new_state(self, batch: int) -> State: ...

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        state: State | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature first, then the `top_k` likeliest, then the nucleus of mass `top_p`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            expected, remedy = "a number above 0", "do_sample=False takes the likeliest token"
            raise ConfigError("temperature is out of range", found=self.temperature, expected=expected, remedy=remedy)
        if self.top_k < 0:
            raise ConfigError("top_k is out of range", found=self.top_k, expected="0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p is out of range", found=self.top_p, expected="above 0, at most 1")


def shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities f32 [b, vocabulary] that `sampling` draws from, given logits of that shape."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = torch.topk(logits, sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = torch.sort(logits, descending=True)
        share = torch.softmax(ordered, dim=-1)
        outside = share.cumsum(-1) - share >= sampling.top_p  # the first token is always inside
        logits = logits.scatter(-1, places, ordered.masked_fill(outside, -torch.inf))
    return torch.softmax(logits, dim=-1)


def choose(logits: torch.Tensor, sampling: Sampling | None) -> torch.Tensor:
    """The next token i64 [b] for logits [b, vocabulary]: the likeliest, or one drawn."""
    if sampling is None:
        return logits.argmax(-1)
    return torch.multinomial(shares(logits, sampling), 1, generator=sampling.generator)[:, 0]


def first_tokens(mask: torch.Tensor | None, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(first token's slot, number of tokens) of each row, i64 [b], from an attention mask [b, s] of zeros and ones.

    ConfigError for a mask of another shape, a row without a token, or padding between tokens.
    """
    if mask is None:
        return torch.zeros(shape[0], dtype=torch.int64), torch.full((shape[0],), shape[1], dtype=torch.int64)
    if mask.shape != shape:
        raise ConfigError("attention_mask has the wrong shape", found=list(mask.shape), expected=list(shape))
    real = mask.cpu() != 0
    begins = (real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]).sum(1)
    if bool((begins == 0).any()):
        raise ConfigError("a sequence of the batch is empty", where=f"row {int((begins == 0).nonzero()[0])}")
    if bool((begins > 1).any()):
        where = f"row {int((begins > 1).nonzero()[0])}"
        raise ConfigError(
            "attention_mask has padding between tokens", where=where, expected="padding at one end or both"
        )
    return real.int().argmax(1), real.sum(1)


def _ends(token_ids: int | Sequence[int] | None) -> torch.Tensor | None:
    if token_ids is None:
        return None
    return torch.tensor([token_ids] if isinstance(token_ids, int) else list(token_ids), dtype=torch.int64)


def generate(
    run: Runner,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    streamer: Callable[[torch.Tensor], Any] | Any | None,
) -> torch.Tensor:
    """The prompts i64 [b, s] and what follows them, [b, s + new]; a row that ended is filled with the pad token.

    `streamer` is called with each step's tokens [b]; or it has put() (also given the prompts, first) and end(), as
    transformers' streamers do.
    """
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens is out of range", found=max_new_tokens, expected="1 or more")
    batch, length = input_ids.shape
    first, count = first_tokens(attention_mask, input_ids.shape)
    if bool((first + count != length).any()):
        remedy = 'pad on the left: tokenizer.padding_side = "left"'
        raise ConfigError("a prompt ends in padding", where="attention_mask", remedy=remedy)
    put: Callable[[torch.Tensor], Any] | None = getattr(streamer, "put", streamer)
    if put is not None and put is not streamer:
        put(input_ids.cpu())
    ends = _ends(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else int(ends[0]) if ends is not None else 0

    state = run.new_state(batch)
    state.first.copy_(first)
    state.reserve(length + max_new_tokens, run.signature.longest)
    position = (torch.arange(length) - first[:, None]).clamp(min=0)
    inputs = {"input_ids": input_ids, "position_ids": position, "keep": torch.tensor([length - 1])}
    out = run(inputs, state)
    step = {"input_ids": torch.zeros(batch, 1, dtype=torch.int64), "position_ids": count[:, None].clone()}
    step["keep"] = torch.zeros(1, dtype=torch.int64)
    made: list[torch.Tensor] = []
    ended = torch.zeros(batch, dtype=torch.bool)
    while True:
        tokens = choose(out["logits"][:, 0], sampling).cpu()
        if ends is not None:
            tokens = tokens.masked_fill(ended, pad)
            ended |= torch.isin(tokens, ends)
        made.append(tokens)
        if put is not None:
            put(tokens)
        if len(made) == max_new_tokens or (ends is not None and bool(ended.all())):
            break
        step["input_ids"].copy_(tokens[:, None])
        out = run(step, state, out)
        step["position_ids"] += 1
    if put is not None and put is not streamer:
        cast(Any, streamer).end()
    return torch.cat([input_ids.cpu(), torch.stack(made, dim=1)], dim=1)
