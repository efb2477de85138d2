"""Text generation over a conversation's state: greedy or sampled, batched, with end-of-sequence and streaming."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from qcompile.errors import ConfigError
from qcompile.runtime.runner import Outputs, Runner

SHARE_UNIT = 2.0**40  # shares are summed as integers of this part: the same sum in any order


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
        share = _counted(torch.softmax(ordered, dim=-1))
        outside = share.cumsum(-1) - share >= int(sampling.top_p * SHARE_UNIT)  # the first token is always inside
        logits = logits.scatter(-1, places, ordered.masked_fill(outside, -torch.inf))
    return torch.softmax(logits, dim=-1)


def choose(logits: torch.Tensor, sampling: Sampling | None, chance: torch.Tensor | None = None) -> torch.Tensor:
    """The next token i64 [b] for logits [b, vocabulary]: the likeliest, or the one that `chance` f64 [b] in [0, 1) draws."""
    if sampling is None or chance is None:
        return logits.argmax(-1)
    below = _counted(shares(logits, sampling)).cumsum(-1)
    drawn = (chance[:, None] * below[:, -1:]).long()
    # A product may round up to the sum of all.
    return (below <= drawn.minimum(below[:, -1:] - 1)).sum(-1)


def _counted(share: torch.Tensor) -> torch.Tensor:
    return (share.double() * SHARE_UNIT).long()


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


class _Following:
    """Which token follows, on the session's device: the inputs of the next step, and the rows that have ended.

    `prompt` counts the tokens of each row. A row that ended with one of `ends` is filled with `pad`.
    """

    def __init__(
        self, prompt: torch.Tensor, sampling: Sampling | None, most: int, ends: torch.Tensor | None, pad: int,
        device: torch.device,
    ):  # fmt: skip
        batch = len(prompt)
        self.sampling, self.pad = sampling, pad
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = (prompt[:, None] - 1).to(device)
        keep = torch.zeros(1, dtype=torch.int64, device=device)
        self.inputs = {"input_ids": self.tokens, "position_ids": self.positions, "keep": keep}
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ends = None if ends is None else ends.to(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.chances: torch.Tensor | None = None
        if sampling is not None:
            source = sampling.generator
            where = "cpu" if source is None else source.device
            chances = torch.rand(most, batch, dtype=torch.float64, generator=source, device=where)
            self.chances = chances.to(device)

    def __call__(self, outputs: Outputs) -> None:
        chance = None if self.chances is None else self.chances.index_select(0, self.at)[0]
        tokens = choose(outputs["logits"][:, 0], self.sampling, chance)
        if self.ends is not None:
            tokens = tokens.masked_fill(self.ended, self.pad)
            self.ended |= (tokens[:, None] == self.ends).any(1)
        self.tokens.copy_(tokens[:, None])
        self.positions += 1
        self.at += 1


@torch.no_grad()
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
    transformers' streamers do. The result and what a streamer gets are on the CPU.
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
    following = _Following(count, sampling, max_new_tokens, ends, pad, run.device)
    advance = run.repeated(following.inputs, state, following)
    following(run(inputs, state))
    coming = deque([run.fetch(following.tokens)])
    started, made = 1, list[torch.Tensor]()
    ended = torch.zeros(batch, dtype=torch.bool)
    while len(made) < max_new_tokens and not bool(ended.all()):
        # A device that works by itself is given the next step before this one's tokens are looked at.
        while started < max_new_tokens and started - len(made) <= run.ahead:
            advance()
            coming.append(run.fetch(following.tokens))
            started += 1
        made.append(coming.popleft()()[:, 0])
        if ends is not None:
            ended |= torch.isin(made[-1], ends)
        if put is not None:
            put(made[-1])
    for rest in coming:
        rest()  # a step too many still uses the memory that is given back now
    if put is not None and put is not streamer:
        cast(Any, streamer).end()
    return torch.cat([input_ids.cpu(), torch.stack(made, dim=1)], dim=1)
