"""Answers: the published tokens, alone and in any company; sampling, stopping, streaming, scores, and reuse."""

import gc
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import plm_golden as golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import perception.attention
import perception_lm.generation
from perception.errors import ConfigError, LimitError, PerceptionError, RequestError
from perception_lm.cache import KVCache
from perception_lm.generation import Reply, Session, generate, prompt_logprobs, safe_length, score, stream
from perception_lm.model import PerceptionLM
from perception_lm.processor import Batch
from perception_lm.sampling import (
    Draws,
    GenerationConfig,
    choose,
    cut,
    draw_from,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
)
from perception_lm.tokenizer import LlamaTokenizer

KNOWN = {name: golden.load(name) for name in golden.MODELS}
PROPERTY = settings(derandomize=True, max_examples=20, deadline=None)


def tokens_of(model: PerceptionLM, batch: Batch, **options: Any) -> list[list[int]]:
    return [reply.tokens for reply in generate(model, batch, golden.words, **options)]


# --- The published tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"speculative": 4}, {"cache": False}], ids=str)
@pytest.mark.parametrize("name", golden.MODELS)
def test_golden_tokens(name: str, options: dict) -> None:
    for case in golden.CASES:
        found = tokens_of(KNOWN[name], golden.batch(name, [case]), max_new_tokens=24, **options)
        assert found == [golden.greedy(name, case)], case


@pytest.mark.parametrize("name", golden.MODELS)
def test_golden_packed(name: str) -> None:
    """The batch of three that the reference gets wrong."""
    cases = golden.facts(name)["cases"]["packed_expected"]["prompts"]
    assert len(cases) == 3
    found = tokens_of(KNOWN[name], golden.batch(name, cases), max_new_tokens=24)
    assert found == [golden.greedy(name, case) for case in cases]


@PROPERTY
@given(
    st.sampled_from(golden.MODELS),
    st.lists(st.sampled_from(golden.CASES), min_size=1, max_size=6),
    st.sampled_from([0, 3]),
)
def test_golden_cases_in_any_company(name: str, cases: list[str], speculative: int) -> None:
    """F-90: any mixture of tile counts, videos and texts, in any order, repeated or not."""
    found = tokens_of(KNOWN[name], golden.batch(name, cases), max_new_tokens=24, speculative=speculative)
    assert found == [golden.greedy(name, case) for case in cases]


@pytest.mark.parametrize("speculative", [0, 3])
def test_golden_early_stop(speculative: int) -> None:
    """The recipe of the golden file: with two rows of the output matrix swapped, B stops at end-of-turn."""
    model, wanted = golden.load("B"), golden.facts("B")["cases"]["early_stop"]
    a, b = wanted["swap_rows"]
    model.decoder.head.weight.data[[a, b]] = model.decoder.head.weight.data[[b, a]]
    tokenizer = LlamaTokenizer.from_file(golden.GOLDEN / "tokenizer.model")
    decode = lambda ids: tokenizer.decode(ids, skip_special=False)  # noqa: E731
    (reply,) = generate(
        model,
        golden.batch("B", ["one"]),
        decode,
        stop_tokens=tokenizer.stop_ids,
        max_new_tokens=24,
        speculative=speculative,
    )
    assert (reply.tokens, reply.text, reply.finish) == (wanted["greedy_ids"], wanted["text"], "stop")


@pytest.mark.parametrize("name", golden.MODELS)
def test_golden_likelihood_of_prompts(name: str) -> None:
    cases = [case for case in golden.CASES if f"{case}.prompt_loglikelihood" in golden.values(name)]
    assert len(cases) == 6
    for group in (cases, cases[:1]):
        for chunk in (7, 512):
            found = prompt_logprobs(KNOWN[name], golden.batch(name, group), chunk=chunk)
            for case, row in zip(group, found, strict=True):
                wanted = golden.values(name)[f"{case}.prompt_loglikelihood"]
                assert (torch.tensor(row) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", golden.MODELS)
def test_golden_likelihood_of_answers(name: str) -> None:
    """The end of a prompt, scored as an answer to its beginning."""
    ids, wanted = golden.facts(name)["cases"]["one"]["prompt_ids"], golden.values(name)["one.prompt_loglikelihood"]
    pixels = golden.pixels(name, "one")
    batch = golden.pack([ids[:-3], ids[:-1]], [pixels, pixels])
    found = score(KNOWN[name], batch, [[ids[-3:], [5], [], ids[-3:-1]], [ids[-1:]]])
    assert [[len(answer) for answer in row] for row in found] == [[3, 1, 0, 2], [1]]
    for answer, end in ((found[0][0], wanted[-3:]), (found[0][3], wanted[-3:-1]), (found[1][0], wanted[-1:])):
        torch.testing.assert_close(torch.tensor(answer), end, rtol=0, atol=1e-4)


# --- A batch equals its singles ---------------------------------------------------------------------------------------

PROMPTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=5, unique=True
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"speculative": 3},
    {"temperature": 1.3, "seed": 7},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.4, "seed": 3, "speculative": 2},
    {"repetition_penalty": 1.3, "stop_tokens": frozenset(range(0, 60, 4)), "stop": ["<7>"]},
    {"temperature": 1.0, "seed": 1, "samples": 2, "stop_tokens": frozenset(range(0, 60, 9))},
    {"cache": False, "logprobs": True},
]


def packed(prompts: Sequence[tuple[int, int, int]]) -> Batch:
    return golden.pack(*zip(*(golden.random_prompt(*prompt) for prompt in prompts), strict=True))


@PROPERTY
@given(PROMPTS, st.sampled_from(OPTIONS), st.randoms(use_true_random=False))
def test_a_batch_equals_its_singles(prompts: list[tuple[int, int, int]], options: dict, random: Any) -> None:
    """F-90, trap 23: any mixture, any order, any way of choosing tokens."""
    model, options = golden.tiny(), {"max_new_tokens": 10, **options}
    samples = options.get("samples", 1)
    alone = {prompt: generate(model, packed([prompt]), golden.words, **options) for prompt in prompts}
    order = random.sample(prompts, len(prompts))
    together = generate(model, packed(order), golden.words, **options)
    assert len(together) == len(prompts) * samples
    for place, prompt in enumerate(order):
        for found, wanted in zip(together[place * samples : (place + 1) * samples], alone[prompt], strict=True):
            assert (found.tokens, found.text, found.finish) == (wanted.tokens, wanted.text, wanted.finish)


@PROPERTY
@given(PROMPTS, st.sampled_from([options for options in OPTIONS if "speculative" not in options]), st.integers(1, 6))
def test_guessing_changes_nothing(prompts: list[tuple[int, int, int]], options: dict, guesses: int) -> None:
    """Prompt lookup gives the same tokens: greedy, penalised and drawn."""
    batch, options = packed(prompts), {"max_new_tokens": 24, **options}
    plain = generate(golden.tiny(), batch, golden.words, **options)
    guessed = generate(golden.tiny(), batch, golden.words, **options, speculative=guesses)
    for one, other in zip(plain, guessed, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)


def test_guessing_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that repeats itself is written several tokens at a time."""
    steps, real = [], perception_lm.generation.step
    monkeypatch.setattr(perception_lm.generation, "step", lambda *given: steps.append(1) or real(*given))
    batch = golden.batch("A", ["strip"])  # the published answer repeats one token fourteen times
    tokens_of(KNOWN["A"], batch, max_new_tokens=24)
    plain = len(steps)
    tokens_of(KNOWN["A"], batch, max_new_tokens=24, speculative=6)
    assert plain == 23
    assert len(steps) - plain < 16


@PROPERTY
@given(PROMPTS, st.sampled_from(OPTIONS))
def test_streaming_equals_not_streaming(prompts: list[tuple[int, int, int]], options: dict) -> None:
    model, batch, options = golden.tiny(), packed(prompts), {"max_new_tokens": 10, **options}
    replies = generate(model, batch, golden.words, **options)
    texts, tokens = [""] * len(replies), [[] for _ in replies]
    last: list[Reply | None] = [None] * len(replies)
    for piece in stream(model, batch, golden.words, **options):
        assert last[piece.index] is None, "nothing comes after the last piece"
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.tokens
        last[piece.index] = piece.reply
    for reply, text, ids, end in zip(replies, texts, tokens, last, strict=True):
        assert (text, ids) == (reply.text, reply.tokens)
        assert (end.text, end.tokens, end.finish) == (reply.text, reply.tokens, reply.finish)


def test_cached_equals_uncached() -> None:
    batch = packed([(1, 2, 5), (2, 0, 3), (3, 1, 8)])
    cached = generate(golden.tiny(), batch, golden.words, max_new_tokens=30, logprobs=True)
    plain = generate(golden.tiny(), batch, golden.words, max_new_tokens=30, logprobs=True, cache=False)
    for one, other in zip(cached, plain, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-3, atol=1e-4)


def test_no_prompts_no_answers() -> None:
    batch = golden.pack([], [])
    assert generate(golden.tiny(), batch, golden.words) == []
    assert list(stream(golden.tiny(), batch, golden.words)) == []
    assert score(golden.tiny(), batch, []) == []


# --- Sampling ---------------------------------------------------------------------------------------------------------


def rows(seed: int = 0, count: int = 4, vocab: int = 50) -> Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_top_k_top_p_and_min_p_by_hand() -> None:
    probs = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]])
    kept = lambda scores: scores[0].isfinite().nonzero()[:, 0].tolist()  # noqa: E731
    assert kept(keep_top_k(probs.log(), 2)) == [1, 3]
    assert kept(keep_top_k(probs.log(), 99)) == [0, 1, 2, 3, 4]  # more than there are: all
    assert kept(keep_top_k(torch.tensor([[1.0, 2, 2, 0, 2]]), 2)) == [1, 2, 4]  # ties stay
    assert kept(keep_top_p(probs.log(), 0.6)) == [1, 3]  # 0.4 is not enough, 0.65 is
    assert kept(keep_top_p(probs.log(), 1e-9)) == [1]
    assert kept(keep_top_p(probs.log(), 1.0)) == [0, 1, 2, 3, 4]
    assert kept(keep_min_p(probs.log(), 0.49)) == [1, 3, 4]
    assert kept(keep_min_p(probs.log(), 1.0)) == [1]
    seen = torch.tensor([[True, False, True]])
    assert penalise(torch.tensor([[2.0, 2, -2]]), seen, 4.0).tolist() == [[0.5, 2, -8]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_same_distribution_as_transformers(options: dict) -> None:
    process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    scores, history = rows(), torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    wanted = scores.clone()
    if penalty := options.get("repetition_penalty"):
        wanted = process.RepetitionPenaltyLogitsProcessor(penalty)(history, wanted)
    wanted = process.TemperatureLogitsWarper(options["temperature"])(history, wanted)
    for name, warper in (
        ("top_k", process.TopKLogitsWarper),
        ("top_p", process.TopPLogitsWarper),
        ("min_p", process.MinPLogitsWarper),
    ):
        if name in options:
            wanted = warper(options[name])(history, wanted)
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, history, True)
    found = cut(penalise(scores, seen, options.get("repetition_penalty")), GenerationConfig(**options))
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))
    assert 0 < int(found.isfinite().sum()) <= found.numel()


def test_draws_follow_the_distribution() -> None:
    """20,000 draws: every frequency within five standard deviations, and nothing that was cut."""
    config, n = GenerationConfig(temperature=1.0, top_p=0.9), 20_000
    scores = cut(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01]).log()[None], config)
    probs = scores.softmax(-1)[0]
    drawn = draw_from(scores.expand(n, -1), torch.tensor(Draws(5).peek(n)))
    counts = torch.bincount(drawn, minlength=6) / n
    assert ((counts - probs).abs() <= 5 * (probs * (1 - probs) / n).sqrt()).all()
    assert not counts[4:].any()


def test_draws_at_the_ends_of_the_interval() -> None:
    """Never a token of probability 0, whatever the rounding."""
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    assert draw_from(scores, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [1, 3, 3]
    assert draw_from(scores[:1], torch.tensor([1.0])).tolist() == [3]


def test_seeds() -> None:
    model, batch = golden.tiny(), packed([(1, 1, 4), (2, 0, 5)])
    drawn = lambda **options: tokens_of(model, batch, temperature=1.5, max_new_tokens=12, **options)  # noqa: E731
    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=[1, 2])[1] == drawn(seed=2)[1]
    assert drawn() != drawn()
    torch.manual_seed(3)
    one = drawn()
    torch.manual_seed(3)
    assert drawn() == one
    with pytest.raises(ConfigError, match="3 seeds for 2 answers"):
        drawn(seed=[1, 2, 3])


def test_several_answers_to_a_prompt() -> None:
    """Prompt by prompt; the j-th answer is the one that seed + j gives; the prompt runs once."""
    model, batch = golden.tiny(), packed([(1, 2, 4), (2, 0, 5)])
    options = {"temperature": 1.5, "max_new_tokens": 8}
    found = tokens_of(model, batch, samples=3, seed=10, **options)
    one_by_one = [tokens_of(model, batch, seed=10 + j, **options) for j in range(3)]
    assert found == [one_by_one[j][prompt] for prompt in range(2) for j in range(3)]
    assert len({tuple(ids) for ids in found[:3]}) == 3


def test_drawn_answers_match_their_likelihood() -> None:
    """The first token of 3000 answers to one prompt, against the model's own softmax."""
    model, batch = golden.tiny(), packed([(4, 1, 5)])
    probs = model(batch.tokens, batch.pixels).detach()[0, -1].softmax(-1)
    found = tokens_of(model, batch, temperature=1.0, samples=3000, seed=0, max_new_tokens=1)
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=golden.VOCAB) / 3000
    assert ((counts - probs).abs() <= 5 * (probs * (1 - probs) / 3000).sqrt() + 1e-3).all()


def test_a_penalty_reaches_prompt_and_answer() -> None:
    """A huge penalty on positive logits: no token twice while any other is likelier than none."""
    model, batch = golden.tiny(), packed([(5, 0, 6)])
    plain = tokens_of(model, batch, max_new_tokens=20)[0]
    found = tokens_of(model, batch, max_new_tokens=20, repetition_penalty=1e6)[0]
    assert len(set(plain)) < 20
    assert len(set(found)) == 20
    assert not set(found) & set(batch.tokens[0].tolist())


def test_logprobs_are_the_models_own() -> None:
    """At any temperature, with anything cut: log p of each token, as `score` gives for the same answer."""
    model, batch = golden.tiny(), packed([(1, 2, 4), (2, 0, 7)])
    for options in ({}, {"temperature": 1.8, "top_k": 5, "seed": 1, "speculative": 3}):
        replies = generate(model, batch, golden.words, max_new_tokens=9, logprobs=True, **options)
        scores = score(model, batch, [[reply.tokens, reply.tokens[:2]] for reply in replies])
        for reply, (whole, start) in zip(replies, scores, strict=True):
            assert len(reply.logprobs) == len(reply.tokens) == 9
            torch.testing.assert_close(torch.tensor(whole), torch.tensor(reply.logprobs), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(torch.tensor(start), torch.tensor(whole[:2]), rtol=1e-3, atol=1e-4)
    assert generate(model, batch, golden.words, max_new_tokens=2)[0].logprobs is None


def test_scores_of_candidates_do_not_touch_each_other() -> None:
    model, batch = golden.tiny(), packed([(1, 2, 4), (2, 0, 7)])
    answers = [[[1, 2, 3], [4], [5, 6, 7, 8]], [[9, 8]]]
    together = score(model, batch, answers)
    for row, candidates in enumerate(answers):
        for place, ids in enumerate(candidates):
            (alone,) = score(model, batch[row], [[ids]])
            torch.testing.assert_close(torch.tensor(together[row][place]), torch.tensor(alone[0]), rtol=1e-3, atol=1e-4)
    with pytest.raises(RequestError, match="answers to 1 prompts were given for a batch of 2"):
        score(model, batch, [[[1]]])


# --- Stopping ---------------------------------------------------------------------------------------------------------


class Chain(torch.nn.Module):
    """A decoder without a cache that says one token after another: i is followed by i + 1."""

    def __init__(self, vocab: int):
        super().__init__()
        self.width = vocab
        self.register_buffer("table", torch.eye(vocab))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return 9 * x.roll(1, dims=-1)


class Nothing:
    in_width = width = patch_size = 0

    def __init__(self, width: int):
        self.width = self.in_width = width

    def tokens(self, h: int, w: int) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("no media here")


def says(*pieces: bytes | str) -> tuple[PerceptionLM, Callable[[list[int]], str], int]:
    """A model that answers with these tokens and then the stop token, its decoder of ids, and the stop token."""
    texts = [b"", *(piece.encode() if isinstance(piece, str) else piece for piece in pieces), b"", b""]
    part = Nothing(len(texts))
    model = PerceptionLM(part, part, Chain(len(texts)), media_token=len(texts) - 1)
    decode = lambda ids: b"".join(texts[id] for id in ids).decode(errors="replace")  # noqa: E731
    return model, decode, len(pieces) + 1


def answer(*pieces: bytes | str, **options: Any) -> tuple[Reply, list[str]]:
    """The reply, the same whether streamed or not, and the pieces that the stream gave."""
    model, decode, end = says(*pieces)
    options = {"stop_tokens": {end}, "max_new_tokens": 50} | options
    batch = golden.pack([[0]], [None])
    (reply,) = generate(model, batch, decode, **options)
    told = list(stream(model, batch, decode, **options))
    assert "".join(piece.text for piece in told) == reply.text
    assert told[-1].reply == reply
    return reply, [piece.text for piece in told]


def test_stop_string_across_tokens() -> None:
    """F-93: cut exactly, although no token is the stop string."""
    reply, told = answer("The c", "at\n", "\nUs", "er: hi", stop=["\n\nUser:"])
    assert (reply.text, reply.finish) == ("The cat", "stop")
    assert reply.tokens == [1, 2, 3, 4]
    assert told == ["The c", "at", ""]


def test_what_only_began_like_a_stop_string_is_told() -> None:
    reply, told = answer("a\n", "\nUse", "ful", stop=["\n\nUser:"])
    assert (reply.text, reply.finish, told) == ("a\n\nUseful", "stop", ["a", "\n\nUseful", ""])
    reply, told = answer("a\n", "\nUse", stop=["\n\nUser:"])  # and so is what the end leaves open
    assert (reply.text, told) == ("a\n\nUse", ["a", "\n\nUse"])


def test_first_stop_string_wins() -> None:
    assert answer("one. two! three", stop=["!", "."])[0].text == "one"
    assert answer("one", "two", stop="et")[0].text == "on"  # one text is one stop string
    assert answer("onet", "wo", stop=["ne"])[0].text == "o"
    assert answer("x", "yz", stop=["x"])[0] == Reply(text="", tokens=[1], finish="stop")


def test_first_token_may_be_the_last() -> None:
    """F-93, trap 21: end-of-turn at once is an empty answer, and nothing more runs."""
    reply, told = answer()
    assert (reply.text, reply.tokens, reply.finish, told) == ("", [1], "stop", [""])


@pytest.mark.parametrize("end", [0, 1])
def test_every_stop_token_stops(end: int) -> None:
    """Trap 21: end-of-text and end-of-turn alike."""
    assert answer("a", "b", "c", stop_tokens={2 + end, 99})[0].tokens == [1, 2, 3][: 2 + end]


def test_length() -> None:
    reply, _ = answer("a", "b", "c", max_new_tokens=2)
    assert (reply.text, reply.tokens, reply.finish) == ("ab", [1, 2], "length")
    assert answer("a", "b", max_new_tokens=3)[0].finish == "stop"  # the stop token is the third


def test_no_half_characters() -> None:
    """An emoji in four tokens comes out whole; one that the answer breaks off comes out as the decoder has it."""
    dog = "🐶".encode()
    reply, told = answer(b"a" + dog[:1], dog[1:2], dog[2:3], dog[3:] + b"b")
    assert (reply.text, told) == ("a🐶b", ["a", "🐶b", ""])
    reply, told = answer(b"a" + dog[:2])
    assert (reply.text, told) == ("a\ufffd", ["a", "\ufffd"])


def test_safe_length() -> None:
    assert safe_length("abc", []) == 3
    assert safe_length("abc\ufffd\ufffd", []) == 3
    assert safe_length("ab##", ["###", "b###x"]) == 1
    assert safe_length("ab###", ["###"]) == 3  # whole ones are cut elsewhere; two of its marks may begin another


def test_cancelled() -> None:
    asked: list[int] = []
    options = {"stop_tokens": {99}, "max_new_tokens": 50, "cancel": lambda: asked.append(1) or len(asked) == 3}
    model, decode, _ = says(*"abcdefgh")
    batch = golden.pack([[0], [0, 1]], [None, None])
    replies = generate(model, batch, decode, **options)
    assert [(reply.text, reply.finish) for reply in replies] == [("abc", "cancelled"), ("bcd", "cancelled")]


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 2),
        ("top_p", math.nan),
        ("top_k", 0),
        ("top_k", 1.5),
        ("min_p", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", [1, "2"]),
        ("samples", 0),
        ("samples", 10**6),
        ("speculative", -1),
        ("stop", [""]),
        ("stop", ["a", 3]),
    ],
)
def test_settings_that_cannot_be(name: str, value: object) -> None:
    """F-91: refused by name, before anything runs."""
    words = "stop strings are not empty" if name == "stop" else f"{name} is .*; expected a "
    with pytest.raises(ConfigError, match=words):
        generate(golden.tiny(), packed([(1, 0, 3)]), golden.words, **{name: value})
    with pytest.raises(ConfigError, match=words):
        stream(
            golden.tiny(), packed([(1, 0, 3)]), golden.words, **{name: value}
        )  # already here, not at the first piece


def test_settings_at_their_ends() -> None:
    """F-91: what is odd but has a meaning."""
    model, batch = golden.tiny(), packed([(1, 0, 3)])
    plain = tokens_of(model, batch, max_new_tokens=5)
    for options in ({"top_k": 10**9}, {"top_p": 1.0}, {"min_p": 0}, {"repetition_penalty": 1}):
        assert tokens_of(model, batch, max_new_tokens=5, **options) == plain
        drawn = tokens_of(model, batch, max_new_tokens=5, temperature=1.0, seed=1, **options)
        assert drawn == tokens_of(model, batch, max_new_tokens=5, temperature=1.0, seed=1)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}):
        assert tokens_of(model, batch, max_new_tokens=5, temperature=2.0, **options) == plain
    assert tokens_of(model, batch, max_new_tokens=5, temperature=1e-6) == plain


def test_context() -> None:
    """F-92, trap 32: the last token that fits is written; one more is refused before the encoder runs."""
    model, batch = golden.tiny(), packed([(1, 0, 3), (2, 2, 12)])  # 20 tokens in the longer
    assert len(tokens_of(model, batch, max_new_tokens=4, context=24)[1]) == 4
    with pytest.raises(LimitError, match="prompt 1 has 20 tokens and 5 more are asked for, but the context is 24"):
        generate(model, batch, golden.words, max_new_tokens=5, context=24)
    with pytest.raises(LimitError, match="the context is 512"):  # the decoder's own
        generate(model, batch, golden.words, max_new_tokens=10**9)
    with pytest.raises(LimitError, match="the context is 22"):
        score(model, batch, [[[1]], [[1, 2, 3]]], context=22)
    assert score(model, batch, [[[1]], [[1, 2, 3]]], context=23)


def test_slots_that_do_not_fit_their_row() -> None:
    """Trap 24: right in sum and wrong by row is wrong; nothing was encoded yet."""
    model = golden.tiny()
    ids = [[1, *[golden.SLOT] * 3], [1, *[golden.SLOT] * 5]]
    batch = golden.pack(ids, [torch.zeros(1, 3, 8, 8)] * 2)
    with pytest.raises(RequestError, match="prompt 0 keeps 3 slots for 1 media items, where 4 an item were expected"):
        generate(model, batch, golden.words)
    with pytest.raises(RequestError, match="prompt 0 keeps 1 slots for 0 media items"):
        generate(model, golden.pack([[golden.SLOT]], [None]), golden.words)
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        generate(model, golden.pack([[1], []], [None, None]), golden.words)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers(value: float, temperature: float) -> None:
    """F-96: named with the dtype, neither token 0 nor an error of the sampler."""
    model, decode, _ = says("a", "b")
    model.decoder.table[1] = value
    with pytest.raises(PerceptionError, match=r"not finite numbers in float32.*bfloat16"):
        generate(model, golden.pack([[0]], [None]), decode, temperature=temperature)


# --- What is left behind ----------------------------------------------------------------------------------------------


def watched_caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    made: list[weakref.ref] = []
    real = KVCache.__init__

    def noted(self, *args, **options):
        made.append(weakref.ref(self))
        real(self, *args, **options)

    monkeypatch.setattr(KVCache, "__init__", noted)
    return made


@pytest.mark.parametrize("leave", ["close", "break", "error"])
def test_a_stream_left_early_leaves_nothing(monkeypatch: pytest.MonkeyPatch, leave: str) -> None:
    """F-94: closed, dropped, or left by an error in the loop's body: the cache is gone, and no thread ever was."""
    made, threads = watched_caches(monkeypatch), threading.active_count()
    steps, real = [], perception_lm.generation.step
    monkeypatch.setattr(perception_lm.generation, "step", lambda *given: steps.append(1) or real(*given))

    def consume() -> None:
        pieces = stream(golden.tiny(), packed([(1, 1, 3)]), golden.words, max_new_tokens=50)
        for count, _ in enumerate(pieces):
            assert made[0]() is not None
            assert threading.active_count() == threads
            if count == 2:
                if leave == "error":
                    raise OSError("the reader went away")
                if leave == "close":
                    pieces.close()
                    assert list(pieces) == []
                return

    if leave == "error":
        with pytest.raises(OSError, match="went away"):
            consume()
    else:
        consume()
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None
    assert len(steps) == 2
    assert not torch.is_inference_mode_enabled()


def test_a_stream_does_no_work_ahead() -> None:
    """The reader's own gradients are on between the pieces."""
    for _ in stream(golden.tiny(), packed([(1, 1, 3)]), golden.words, max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_model_is_as_before() -> None:
    """Trap 37: answers in other sizes, then a training step, then the same answers."""
    model = golden.load("A")
    batch = golden.batch("A", ["one"])
    for new in (24, 3, 24):
        assert tokens_of(model, batch, max_new_tokens=new) == [golden.greedy("A", "one")[:new]]
    output = model(batch.tokens, batch.pixels, labels=batch.tokens)
    output.loss.backward()
    assert model.decoder.token_embed.weight.grad.abs().sum() > 0
    assert tokens_of(model, golden.batch("A", ["tile", "one"]), max_new_tokens=24)[1] == golden.greedy("A", "one")


def test_memory_is_sized_to_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache: prompt, answer, guesses. One row of logits a prompt. The encoder sees a chunk at a time."""
    made, sizes, logits = [], [], []
    real = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *a, **o: made.append(a) or real(self, *a, **o))
    model = golden.load("A")
    model.media_chunk = 2
    model.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.decoder.register_forward_hook(lambda _, __, output: logits.append(tuple(output.shape[:2])))
    batch = golden.batch("A", ["tile", "text"])
    tokens_of(model, batch, max_new_tokens=4, speculative=2)
    assert made == [(2, max(batch.lengths) + 4 + 2)]
    assert sizes == [2, 2, 1]
    assert logits[0] == (2, 1)


def test_finished_rows_make_room() -> None:
    """Once half of a batch is done, the rest goes on in a smaller one."""
    model, widths = golden.tiny(), []
    batch = packed([(seed, 0, 4) for seed in range(6)])
    handle = model.decoder.register_forward_hook(lambda _, inputs, __: widths.append(len(inputs[0])))
    try:
        replies = generate(model, batch, golden.words, max_new_tokens=12, stop_tokens=frozenset(range(0, 60, 5)))
    finally:
        handle.remove()
    lengths = sorted(len(reply.tokens) for reply in replies)
    assert lengths[0] < lengths[-1]
    assert widths[0] == 6
    assert widths[-1] <= 3
    assert widths == sorted(widths, reverse=True)


def test_half_precision() -> None:
    """A bfloat16 model answers, in float32 where it chooses."""
    model = golden.load("A").bfloat16()
    replies = generate(model, golden.batch("A", ["tile", "text"]), golden.words, max_new_tokens=5, logprobs=True)
    assert [len(reply.tokens) for reply in replies] == [5, 5]
    assert replies[1].tokens[0] == golden.greedy("A", "text")[0]


# --- Reuse over turns -------------------------------------------------------------------------------------------------


class Meter:
    """Counts the tokens that the decoder runs and the items that the encoder runs."""

    def __init__(self, model: PerceptionLM):
        self.tokens = self.items = 0
        model.decoder.register_forward_hook(lambda _, inputs, __: self._count("tokens", inputs[0].shape[1]))
        model.encoder.register_forward_hook(lambda _, inputs, __: self._count("items", len(inputs[0])))

    def _count(self, name: str, more: int) -> None:
        setattr(self, name, getattr(self, name) + more)

    def read(self) -> tuple[int, int]:
        found, self.tokens, self.items = (self.tokens, self.items), 0, 0
        return found


def turn(model: PerceptionLM, ids: list[int], pixels: Tensor | None, **options: Any) -> list[int]:
    return tokens_of(model, golden.pack([ids], [pixels]), max_new_tokens=6, **options)[0]


def fresh_tiny() -> PerceptionLM:
    model = perception_lm.model.build(golden.TINY, golden.SLOT).eval()
    model.load_state_dict(golden.tiny().state_dict())
    return model


IMAGE, OTHER = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
SLOTS = [golden.SLOT] * golden.PER_ITEM


@pytest.mark.parametrize("options", [{}, {"speculative": 3}, {"temperature": 1.0, "seed": 1}], ids=str)
def test_turns_equal_fresh_starts(options: dict) -> None:
    """Each turn, the second picture's too, as if the whole conversation were new; only what is new runs."""
    model, session, meter = fresh_tiny(), Session(), Meter(fresh_tiny())
    meter = Meter(model)
    ids, pixels = [1, 2, *SLOTS, 3], IMAGE
    for more, picture in (([7, 8], None), ([9, *SLOTS, 4], OTHER), ([5], None), ([6, *SLOTS], IMAGE)):
        wanted = turn(golden.tiny(), ids, pixels, **options)
        before = len(session.tokens)
        meter.read()
        assert turn(model, ids, pixels, reuse=session, **options) == wanted
        tokens, items = meter.read()
        assert tokens <= len(ids) - before + 5 * (1 + options.get("speculative", 0))
        assert items == (before == 0) + (pixels is not None and len(pixels) == 2 and before > 0 and picture is None)
        ids = [*ids, *wanted, *more]
        pixels = pixels if picture is None else torch.cat([pixels, picture])


def test_same_slots_other_picture() -> None:
    """The ids of two prompts are equal and their pictures are not: what follows the first difference runs again."""
    model, session = fresh_tiny(), Session()
    meter = Meter(model)
    ids = [1, 2, *SLOTS, 3, *SLOTS, 4]
    for pixels, wanted_items, begin in (
        (torch.cat([IMAGE, OTHER]), 2, 0),
        (torch.cat([IMAGE, IMAGE]), 0, 7),  # equal up to the second picture; both are known
        (torch.cat([OTHER, IMAGE]), 1, 2),  # OTHER was forgotten after the turn without it
        (torch.cat([OTHER, IMAGE]), 0, 11),  # the same again: one token must run
    ):
        meter.read()
        assert turn(model, ids, pixels, reuse=session) == turn(golden.tiny(), ids, pixels)
        assert meter.read() == (len(ids) - begin + 5, wanted_items)


def test_an_edited_prompt() -> None:
    model, session = fresh_tiny(), Session()
    meter = Meter(model)
    turn(model, [1, 2, 3, 4, 5], None, reuse=session)
    meter.read()
    for ids, run in (([1, 2, 9, 9, 9, 9], 4), ([1, 2], 1), ([7], 1), ([1, *SLOTS, 2], 6)):
        pixels = IMAGE if golden.SLOT in ids else None
        assert turn(model, ids, pixels, reuse=session) == turn(golden.tiny(), ids, pixels)
        assert meter.read()[0] == run + 5


def test_a_media_token_that_the_model_wrote_is_no_slot() -> None:
    """The next prompt has a picture where the answer had the bare id: nothing of it is shared."""
    model, session = fresh_tiny(), Session()
    likeliest = turn(golden.tiny(), [1, 2], None)[0]
    with torch.no_grad():  # twice its logit, which is above 0: the model writes the media token instead
        model.decoder.head.weight[golden.SLOT] = 2 * model.decoder.head.weight[likeliest]
    written = turn(model, [1, 2], None, reuse=session)
    place = written.index(golden.SLOT)
    assert session.tokens[2 + place] == -1
    ids = [1, 2, *written[:place], *SLOTS, 3]
    assert turn(model, ids, IMAGE, reuse=session) == turn(model, ids, IMAGE)


def test_a_session_and_its_model() -> None:
    """What one model left is never used for another; a failure or an early end leaves it usable."""
    one, other, session = fresh_tiny(), golden.tiny(1), Session()
    ids = [1, *SLOTS, 2]
    turn(one, ids, IMAGE, reuse=session)
    assert turn(other, ids, IMAGE, reuse=session) == turn(other, ids, IMAGE)
    pieces = stream(one, golden.pack([ids], [IMAGE]), golden.words, max_new_tokens=9, reuse=session)
    next(pieces), next(pieces)
    pieces.close()
    assert len(session.tokens) == len(ids) + 1
    longer = [*ids, *turn(one, ids, IMAGE)[:2], 7]
    assert turn(one, longer, IMAGE, reuse=session) == turn(one, longer, IMAGE)
    handle = one.decoder.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        turn(one, [*longer, 8, 9], IMAGE, reuse=session)
    handle.remove()
    assert turn(one, [*longer, 8, 9], IMAGE, reuse=session) == turn(one, [*longer, 8, 9], IMAGE)
    session.clear()
    assert (session.cache, session.tokens, session.features) == (None, [], {})


def test_a_session_is_one_conversation() -> None:
    for batch, options in (
        (packed([(1, 0, 3), (2, 0, 3)]), {}),
        (packed([(1, 0, 3)]), {"samples": 2}),
        (packed([(1, 0, 3)]), {"cache": False}),
    ):
        with pytest.raises(ConfigError, match="reuse= keeps one conversation"):
            generate(golden.tiny(), batch, golden.words, reuse=Session(), **options)


# --- Every known mistake is seen --------------------------------------------------------------------------------------


def top_left(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True).transpose(
        1, 2
    )


def test_trap_22_top_left_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 22: torch's own is_causal counts from the first key. Prefill still looks right; every step is wrong."""
    batch = golden.batch("A", ["one"])
    monkeypatch.setitem(perception.attention.KERNELS, "sdpa", top_left)
    found = tokens_of(KNOWN["A"], batch, max_new_tokens=24)[0]
    assert found[0] == golden.greedy("A", "one")[0]
    assert found != golden.greedy("A", "one")


def test_trap_23_rows_that_see_each_others_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 23: without its own length, a shorter row is answered from its padding."""
    cases = ["text", "tile"]
    wanted = [golden.greedy("A", case) for case in cases]
    assert tokens_of(KNOWN["A"], golden.batch("A", cases), max_new_tokens=24) == wanted
    monkeypatch.setattr(KVCache, "crop", lambda self, lengths: None)
    assert tokens_of(KNOWN["A"], golden.batch("A", cases), max_new_tokens=20)[0] != wanted[0][:20]


def test_trap_37_a_stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 37: keys of the picture before, under equal ids, are not used; naming all pictures alike shows it."""
    ids = [1, *SLOTS, 2]
    model, session = fresh_tiny(), Session()
    wanted = turn(model, ids, OTHER)
    turn(model, ids, IMAGE, reuse=session)
    assert turn(model, ids, OTHER, reuse=session) == wanted
    monkeypatch.setattr(perception_lm.generation, "name_of", lambda item: b"same")
    session = Session()
    turn(model, ids, IMAGE, reuse=session)
    assert turn(model, ids, OTHER, reuse=session) != wanted


def test_choose_marks_what_is_not_a_number() -> None:
    logits = torch.zeros(2, 1, 5)
    logits[1, 0, 3] = math.nan
    ids, _ = choose(logits, GenerationConfig(), torch.zeros(2, 1), None)
    assert ids.tolist() == [[0], [-1]]


def test_configs_are_values() -> None:
    config = GenerationConfig(stop="x", stop_tokens={3, 4})
    assert (config.stop, config.stop_tokens) == (("x",), frozenset({3, 4}))
    assert replace(config, temperature=1.0).stop == ("x",)
    assert Counter(GenerationConfig(seed=5, samples=2).seeds(2)) == {5: 2, 6: 2}
