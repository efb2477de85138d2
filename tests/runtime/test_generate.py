"""Generation over a toy whose next token is known: greedy, end of sequence, padding, streaming, sampling, errors."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import ConfigError
from qcompile.runtime.generate import Sampling, choose, first_tokens, generate, shares
from qcompile.runtime.inputs import Signature
from qcompile.runtime.runner import Runner

VOCABULARY = 50


class Toy(Runner):
    """After token x at position p comes (3 x + p + 1) mod 50; keeps the inputs it was given."""

    def __init__(self):
        self.states, self.seen, self.signature, self.device = (), [], Signature((), {}, {}), torch.device("cpu")

    def __call__(self, inputs, state=None, out=None):
        ids, positions, keep = (inputs[name].clone() for name in ("input_ids", "position_ids", "keep"))
        self.seen.append((ids, positions, keep, state.length, state.first.clone()))
        state.advance(ids.shape[1])
        following = (3 * ids + positions + 1) % VOCABULARY
        return {"logits": torch.nn.functional.one_hot(following[:, keep], VOCABULARY).float()}


def run(prompt, mask=None, **options):
    options = {
        "max_new_tokens": 6,
        "sampling": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "streamer": None,
    } | options
    toy = Toy()
    return toy, generate(toy, torch.tensor(prompt), None if mask is None else torch.tensor(mask), **options)


def expected(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((3 * tokens[-1] + len(tokens)) % VOCABULARY)
    return tokens


def test_greedy_decoding_feeds_one_token_at_a_time():
    toy, made = run([[5, 7, 9]])
    assert made.tolist() == [expected([5, 7, 9], 6)]
    assert [ids.shape[1] for ids, *_ in toy.seen] == [3, 1, 1, 1, 1, 1]
    assert [past for *_, past, _ in toy.seen] == [0, 3, 4, 5, 6, 7]
    assert [keep.tolist() for _, _, keep, *_ in toy.seen] == [[2], [0], [0], [0], [0], [0]]


def test_left_padding_gives_what_each_prompt_gives_alone():
    toy, made = run([[0, 0, 5], [1, 2, 3]], [[0, 0, 1], [1, 1, 1]])
    assert made[0, 2:].tolist() == expected([5], 6) and made[1].tolist() == expected([1, 2, 3], 6)
    _, positions, _, _, first = toy.seen[0]
    assert positions.tolist() == [[0, 0, 0], [0, 1, 2]] and first.tolist() == [2, 0]
    assert toy.seen[1][1].tolist() == [[1], [3]]


def test_a_row_ends_and_is_padded_while_others_go_on():
    alone = expected([5], 6)
    eos = alone[3]
    _, made = run([[0, 0, 5], [1, 2, 3]], [[0, 0, 1], [1, 1, 1]], eos_token_id=[eos, 49], pad_token_id=33)
    assert made[0, 2:].tolist() == [*alone[:4], 33, 33, 33]
    assert made[1].tolist() == expected([1, 2, 3], 6)


def test_all_rows_ended_stops():
    alone = expected([5], 9)
    toy, made = run([[5]], eos_token_id=alone[2], max_new_tokens=9)
    assert made.tolist() == [alone[:3]] and len(toy.seen) == 2


def test_a_function_or_an_object_is_streamed_to():
    calls = []
    run([[5]], streamer=lambda ids: calls.append(ids.tolist()), max_new_tokens=2)
    assert calls == [[t] for t in expected([5], 2)[1:]]

    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, ids):
            self.got.append(ids.tolist())

        def end(self):
            self.got.append("end")

    streamer = Streamer()
    run([[5]], streamer=streamer, max_new_tokens=2)
    assert streamer.got == [[[5]], *calls, "end"]


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ([[1, 1]], "attention_mask has the wrong shape\n  found:    [1, 2]\n  expected: [1, 4]"),
        ([[0, 0, 0, 0]], "a sequence of the batch is empty\n  where:    row 0"),
        (
            [[1, 0, 1, 1]],
            "attention_mask has padding between tokens\n  where:    row 0\n  expected: padding at one end or both",
        ),
        (
            [[1, 1, 1, 0]],
            "a prompt ends in padding\n  where:    attention_mask\n"
            '  try:      pad on the left: tokenizer.padding_side = "left"',
        ),
    ],
)
def test_masks_that_make_no_sense(mask, text):
    with pytest.raises(ConfigError) as error:
        run([[1, 2, 3, 4]], mask)
    assert str(error.value) == text


def test_masks_are_read_at_both_ends():
    first, count = first_tokens(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]), torch.Size([3, 4]))
    assert first.tolist() == [1, 0, 3] and count.tolist() == [2, 4, 1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.0}, "temperature is out of range"),
        ({"temperature": float("nan")}, "temperature is out of range"),
        ({"top_k": -1}, "top_k is out of range"),
        ({"top_p": 0.0}, "top_p is out of range"),
        ({"top_p": 1.5}, "top_p is out of range"),
    ],
)
def test_sampling_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        Sampling(**options)


def test_max_new_tokens_out_of_range():
    with pytest.raises(ConfigError, match="max_new_tokens is out of range"):
        run([[1]], max_new_tokens=0)


def test_sampling_is_repeatable_and_follows_the_shares():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    chance = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draw = [choose(logits, Sampling(), chance) for _ in range(2)]
    assert torch.equal(*draw)
    assert torch.allclose(draw[0].bincount(minlength=4) / 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)


def test_the_ends_of_chance_draw_tokens_that_have_a_share():
    logits = torch.log(torch.tensor([0.0, 0.5, 0.5, 0.0])).expand(2, 4)
    assert choose(logits, Sampling(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_steps_started_ahead_change_nothing(ahead):
    alone, got = expected([5], 9), []
    toy = Toy()
    toy.ahead = ahead
    made = generate(
        toy, torch.tensor([[5]]), None, max_new_tokens=9, sampling=Sampling(generator=torch.Generator().manual_seed(1)),
        eos_token_id=alone[4], pad_token_id=None, streamer=lambda ids: got.extend(ids.tolist()),
    )  # fmt: skip
    toy.ahead = 0
    again = run(
        [[5]], sampling=Sampling(generator=torch.Generator().manual_seed(1)), eos_token_id=alone[4], max_new_tokens=9
    )[1]
    assert torch.equal(made, again) and made[0, 1:].tolist() == got


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9}]
)
def test_shares_are_those_of_transformers(options):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3
    wanted = logits
    if "temperature" in options:
        wanted = process.TemperatureLogitsWarper(options["temperature"])(None, wanted)
    if "top_k" in options:
        wanted = process.TopKLogitsWarper(options["top_k"])(None, wanted)
    if "top_p" in options:
        wanted = process.TopPLogitsWarper(options["top_p"])(None, wanted)
    torch.testing.assert_close(shares(logits, Sampling(**options)), wanted.softmax(-1))
