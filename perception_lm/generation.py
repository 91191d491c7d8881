"""Prompts in, answers out: prefill, step, choose, stop.

B rows  T prompt tokens  W tokens of one step (the last one, and guesses)  E decoder width  V vocabulary
M media items  n tokens an item

    prefill -> logits -> choose -> take -> yield -> step -> logits -> ...
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from perception.errors import ConfigError, LimitError, PerceptionError, RequestError
from perception_lm.cache import Cache, Replay
from perception_lm.decoder import take
from perception_lm.model import PerceptionLM
from perception_lm.processor import Batch
from perception_lm.sampling import Draws, GenerationConfig, choose

Finish = Literal["stop", "length", "cancelled"]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer.

    text      without stop token and stop string
    tokens    every token that was generated, the stop token among them
    logprobs  one a token, when asked for
    finish    "stop": a stop token or string; "length": max_new_tokens; "cancelled": the caller asked
    """

    text: str
    tokens: list[int]
    finish: Finish
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by.

    index  which answer: prompt by prompt, sample by sample
    text   never half a character, never a part of a stop string; the pieces put together are the reply's text
    reply  with the last piece of each answer
    """

    index: int
    text: str
    tokens: list[int]
    reply: Reply | None


def generate(
    model: PerceptionLM,
    batch: Batch,
    decode: Decode,
    config: GenerationConfig | None = None,
    *,
    context: int | None = None,
    reuse: "Session | None" = None,
    cancel: Callable[[], bool] | None = None,
    **settings: Any,
) -> list[Reply]:
    """Answers to a batch of prompts: `config.samples` of each, prompt by prompt.

    decode    ids to text
    context   positions the model was trained for; the decoder's own by default
    reuse     what an earlier turn of the same conversation left; a batch of one
    cancel    asked before each step; True ends all answers as they are
    settings  fields of GenerationConfig, over those of `config`

    A batch gives each prompt the answer it gets alone (in float32; half precision rounds differently with the shape).
    Raises ConfigError for settings that cannot be, LimitError beyond the context, RequestError when slots and media do
    not fit, PerceptionError when the logits are not numbers.
    """
    job = Job.of(model, batch, decode, config, settings, context, reuse, cancel, watched=False)
    return [piece.reply for piece in sorted(write(job), key=lambda piece: piece.index) if piece.reply]


def stream(
    model: PerceptionLM,
    batch: Batch,
    decode: Decode,
    config: GenerationConfig | None = None,
    *,
    context: int | None = None,
    reuse: "Session | None" = None,
    cancel: Callable[[], bool] | None = None,
    **settings: Any,
) -> Iterator[Piece]:
    """`generate`, a piece at a time. Wrong arguments are refused here and now; work is done as pieces are asked for.

    Closing the iterator, or leaving its loop, ends the work and frees the cache: there is no thread.
    """
    return write(Job.of(model, batch, decode, config, settings, context, reuse, cancel, watched=True))


@torch.inference_mode()
def score(
    model: PerceptionLM,
    batch: Batch,
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    context: int | None = None,
) -> list[list[list[float]]]:
    """Log-probabilities of given answers: multiple choice.

    answers  for each prompt, its candidates, as token ids
    return   for each prompt and candidate, one number a token

    Each prompt runs once; its candidates run after it, one beside those of the other prompts.
    """
    if len(answers) != len(batch):
        raise RequestError(f"answers to {len(answers)} prompts were given for a batch of {len(batch)}")
    if not answers:
        return []
    longest = max((len(ids) for candidates in answers for ids in candidates), default=0)
    check_prompts(model, batch, longest, context)
    cache, first = prefill(model, batch, max(batch.lengths, default=0) + longest)
    cache.crop(batch.lengths)
    scores: list[list[list[float]]] = [[] for _ in answers]
    for turn in range(max(map(len, answers), default=0)):
        ids = [list(candidates[turn]) if turn < len(candidates) else [] for candidates in answers]
        for row, found in enumerate(answer_logprobs(model, cache, first, ids)):
            if turn < len(answers[row]):
                scores[row].append(found)
        cache.crop(batch.lengths)
    return scores


@torch.inference_mode()
def prompt_logprobs(model: PerceptionLM, batch: Batch, *, chunk: int = 512) -> list[list[float]]:
    """Log-probability of each prompt token after those before it: length - 1 numbers a row.

    The logits of `chunk` positions exist at a time.
    """
    check_prompts(model, batch, 0, None)
    x = embed(model, batch)
    tokens = batch.tokens[:, : x.shape[1]].to(model.device)
    cache = new_cache(model, len(batch), x.shape[1])
    found = [tokens.new_zeros(len(batch), 0, dtype=torch.float32)]
    for start in range(0, x.shape[1] - 1, chunk):
        logits = run(model.decoder, x[:, start : start + chunk], cache)
        found.append(likelihood(logits, tokens[:, start + 1 : start + 1 + chunk]))
    rows = torch.cat(found, dim=1).tolist()
    return [row[: length - 1] for row, length in zip(rows, batch.lengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request."""

    model: PerceptionLM
    batch: Batch
    config: GenerationConfig
    answers: list["Answer"]
    reuse: "Session | None"
    cancel: Callable[[], bool] | None

    @classmethod
    def of(
        cls,
        model: PerceptionLM,
        batch: Batch,
        decode: Decode,
        config: GenerationConfig | None,
        settings: dict[str, Any],
        context: int | None,
        reuse: "Session | None",
        cancel: Callable[[], bool] | None,
        *,
        watched: bool,
    ) -> "Job":
        config = replace(config or GenerationConfig(), **settings)
        check_prompts(model, batch, config.max_new_tokens, context)
        if reuse is not None and (len(batch) != 1 or config.samples != 1 or not config.cache):
            raise ConfigError("reuse= keeps one conversation: one prompt, one sample, and the cache")
        prompts = prompts_of(batch)
        answers = [
            Answer(index, prompts[index // config.samples], seed, config, decode, watched)
            for index, seed in enumerate(config.seeds(len(prompts)))
        ]
        return cls(model=model, batch=batch, config=config, answers=answers, reuse=reuse, cancel=cancel)


def write(job: Job) -> Iterator[Piece]:
    """The loop. What it holds (cache, logits) lives in this generator and goes with it."""
    model, config, rows = job.model, job.config, job.answers
    if not rows:
        return
    room = max(job.batch.lengths) + config.max_new_tokens + config.speculative
    cache, logits = prefill(model, job.batch, room, job.reuse, cached=config.cache)
    cache, logits = spread(cache, logits, config.samples)
    found = pick(logits, rows, config)
    while True:
        for answer, chosen in zip(rows, found, strict=True):
            answer.take(chosen)
        cache.crop([answer.kept for answer in rows])
        if job.reuse is not None:
            job.reuse.keep(rows[0])
        if job.cancel is not None and job.cancel():
            for answer in rows:
                answer.finish = answer.finish or "cancelled"
        for answer in rows:
            if piece := answer.piece():
                yield piece
        cache, rows = drop_finished(cache, rows)
        if not rows:
            return
        found = advance(model, cache, rows, config)


def check_prompts(model: PerceptionLM, batch: Batch, new: int, context: int | None) -> None:
    """RequestError for prompts that cannot be, LimitError for those that leave no room for `new` tokens."""
    limits = [context, getattr(getattr(model.decoder, "config", None), "context", None)]
    limit = min((limit for limit in limits if limit is not None), default=None)
    for row, length in enumerate(batch.lengths):
        if not length:
            raise RequestError(f"prompt {row} is empty; give at least one token")
        if limit is not None and length + new > limit:
            raise LimitError(
                f"prompt {row} has {length} tokens and {new} more are asked for, but the context is {limit} tokens; "
                "use fewer tiles, frames or words, or a smaller max_new_tokens"
            )
    slots = [row.count(model.media_token) for row in prompts_of(batch)]
    each = sum(slots) / max(sum(batch.media_counts), 1)
    for row, (kept, items) in enumerate(zip(slots, batch.media_counts, strict=True)):
        if kept != items * each:
            raise RequestError(
                f"prompt {row} keeps {kept} slots for {items} media items, where {each:g} an item were expected; "
                "let the processor write the slots"
            )


def prompts_of(batch: Batch) -> list[list[int]]:
    """The token ids of each row without its padding."""
    return [ids[:length] for ids, length in zip(batch.tokens.tolist(), batch.lengths, strict=True)]


@torch.inference_mode()
def prefill(
    model: PerceptionLM, batch: Batch, capacity: int, session: "Session | None" = None, *, cached: bool = True
) -> tuple[Cache, Tensor]:
    """Run the prompts. Returns the cache, the padding still in it, and the logits after each prompt: B 1 V."""
    if session is None:
        x, cache, start = embed(model, batch), new_cache(model, len(batch), capacity, cached), 0
    else:
        session.belong_to(model)
        x = embed(model, batch, session)
        cache = session.open(batch, capacity)
        start = cache.lengths[0]
    ends = torch.tensor(batch.lengths, device=x.device)[:, None] - start - 1  # B 1
    return cache, run(model.decoder, x[:, start:], cache, ends)


def advance(
    model: PerceptionLM, cache: Cache, rows: Sequence["Answer"], config: GenerationConfig
) -> list[list[tuple[int, float]]]:
    """The tokens each answer grows by, as `pick` returns them: of several steps where the cache can write `ahead`."""
    ahead = getattr(cache, "ahead", None)
    if ahead is None or config.speculative:
        return pick(step(model, cache, rows), rows, config)
    found = ahead(rows, config)
    check_numbers([token for chosen in found for token, _ in chosen], "the weights' dtype")
    return found


@torch.inference_mode()
def step(model: PerceptionLM, cache: Cache, rows: Sequence["Answer"]) -> Tensor:
    """Feed each answer's last token and its guesses. Returns the logits after each of them: B W V."""
    fed = [[answer.tokens[-1], *answer.draft] for answer in rows]
    width = max(map(len, fed))
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in fed], device=model.device)
    # the decoder's own embedding: a media token that the model wrote is no slot
    return run(model.decoder, model.decoder.embed(ids), cache)


@torch.inference_mode()
def pick(logits: Tensor, rows: Sequence["Answer"], config: GenerationConfig) -> list[list[tuple[int, float]]]:
    """The tokens, with their log-probabilities, that each answer grows by; none where it is finished.

    A guess that is what would have been chosen anyway is accepted, and the token after it is there already.
    """
    width = logits.shape[1]
    draws = torch.tensor([answer.draws.peek(width) for answer in rows], device=logits.device)
    seen = torch.stack([answer.seen(logits) for answer in rows]) if config.penalised else None
    ids, logprobs = (t.tolist() for t in choose(logits, config, draws, seen))
    found = []
    for answer, row, likely in zip(rows, ids, logprobs, strict=True):
        count = 0 if answer.finish else 1 + accepted(answer.draft, row)
        check_numbers(row[:count], str(logits.dtype).removeprefix("torch."))
        found.append(list(zip(row[:count], likely[:count], strict=True)))
    return found


def check_numbers(ids: Sequence[int], dtype: str) -> None:
    """PerceptionError for a token that could not be chosen."""
    if -1 in ids:
        raise PerceptionError(
            f"the logits are not finite numbers in {dtype}; "
            "if the weights are sound, load the model with dtype='bfloat16' or 'float32'"
        )


def accepted(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many guesses were right before the first wrong one."""
    return next((i for i, guess in enumerate(draft) if guess != chosen[i]), len(draft))


def run(decoder: Any, x: Tensor, cache: Cache, last: Tensor | None = None) -> Tensor:
    """B T E after the cache -> logits B T V, or those at the indices `last` B k."""
    if not isinstance(cache, Replay):
        return decoder(x, cache, last=last)
    whole, places = cache.extend(x)
    return take(decoder(whole), places if last is None else places.gather(1, last))


def new_cache(model: PerceptionLM, batch: int, capacity: int, cached: bool = True) -> Cache:
    """The decoder's own cache; the plain one for decoders without."""
    if cached and hasattr(model.decoder, "new_cache"):
        return model.decoder.new_cache(batch, capacity)
    return Replay(batch)


def embed(model: PerceptionLM, batch: Batch, session: "Session | None" = None) -> Tensor:
    """The prompts with their media in place: B T E."""
    tokens = batch.tokens[:, : max(batch.lengths)].to(model.device)
    if batch.pixels is None or not len(batch.pixels):
        return model.embed(tokens)
    return model.embed(tokens, media=(session or model).encode_media(batch.pixels))


def spread(cache: Cache, logits: Tensor, samples: int) -> tuple[Cache, Tensor]:
    """Each prompt once for each of its answers."""
    if samples == 1:
        return cache, logits
    rows = [row for row in range(len(logits)) for _ in range(samples)]
    return cache.select(rows), logits[rows]


def drop_finished(cache: Cache, rows: list["Answer"]) -> tuple[Cache, list["Answer"]]:
    """Let go of finished answers once they are half of the batch: copying the cache costs more than a few idle rows."""
    live = [row for row, answer in enumerate(rows) if answer.finish is None]
    if len(live) > len(rows) // 2:
        return cache, rows
    return (cache.select(live) if live else cache), [rows[row] for row in live]


def answer_logprobs(model: PerceptionLM, cache: Cache, first: Tensor, ids: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of one answer a row after its prompt.  first  B 1 V, the logits after the prompts"""
    width = max(*map(len, ids), 1)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=first.device)
    logits = first
    if width > 1:
        rest = run(model.decoder, model.decoder.embed(tokens[:, :-1]), cache)
        logits = torch.cat([first, rest], dim=1)  # B width V
    found = likelihood(logits, tokens).tolist()
    return [row[: len(given)] for row, given in zip(found, ids, strict=True)]


def likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token under the logits of its position.  logits B k V, tokens B k' <= k -> B k' float32"""
    logits = logits[:, : tokens.shape[1]].float()
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class Answer:
    """One answer being written.  watched: somebody reads along, so its text is wanted at every step"""

    def __init__(
        self, index: int, prompt: list[int], seed: int, config: GenerationConfig, decode: Decode, watched: bool
    ):
        self.index, self.prompt, self.config, self.decode, self.watched = index, prompt, config, decode, watched
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self.draws = Draws(seed)
        self.draft: list[int] = []  # guesses at what comes after the last token
        self.lookup = Lookup(prompt) if config.speculative else None
        self.shown = self.told = 0  # characters and tokens that went out in pieces
        self.done = False  # the last piece went out
        self._seen: Tensor | None = None

    @property
    def kept(self) -> int:
        """Tokens whose keys and values are known: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1

    def take(self, found: Sequence[tuple[int, float]]) -> None:
        """Append tokens up to the first that ends the answer, and guess what comes next."""
        for token, logprob in found:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.draws.use(1)
            self.finish = self._ending(token)
            if self.lookup:
                self.lookup.add(token)
            if self.finish:
                break
        left = self.config.max_new_tokens - len(self.tokens) - 1
        wanted = 0 if self.finish else min(self.config.speculative, left)
        self.draft = self.lookup.guess(wanted) if self.lookup else []

    def read(self) -> tuple[str, bool]:
        """The text so far, cut at the first stop string, and whether there was one."""
        stopped = self.tokens[-1] in self.config.stop_tokens
        text = self.decode(self.tokens[:-1] if stopped else list(self.tokens))
        cuts = [at for at in map(text.find, self.config.stop) if at >= 0]
        return (text[: min(cuts)], True) if cuts else (text, False)

    def piece(self) -> Piece | None:
        """What can be told now that could not before; None when that is nothing."""
        if self.done or not (self.watched or self.finish):
            return None
        text = self.read()[0]
        ready = len(text) if self.finish else safe_length(text, self.config.stop)
        if ready <= self.shown and not self.finish:
            return None
        piece = Piece(self.index, text[self.shown : ready], self.tokens[self.told :], self._reply(text))
        self.shown, self.told, self.done = ready, len(self.tokens), self.finish is not None
        return piece

    def seen(self, like: Tensor) -> Tensor:
        """V bool: the tokens of prompt and answer.  like  B W V"""
        if self._seen is None:
            self._seen = like.new_zeros(like.shape[-1], dtype=torch.bool)
            self._seen[self.prompt] = True
        self._seen[self.tokens] = True
        return self._seen

    def _ending(self, token: int) -> Finish | None:
        if token in self.config.stop_tokens or (self.config.stop and self.read()[1]):
            return "stop"
        return "length" if len(self.tokens) == self.config.max_new_tokens else None

    def _reply(self, text: str) -> Reply | None:
        if self.finish is None:
            return None
        logprobs = list(self.logprobs) if self.config.logprobs else None
        return Reply(text=text, tokens=list(self.tokens), finish=self.finish, logprobs=logprobs)


def safe_length(text: str, stop: Sequence[str]) -> int:
    """Characters that later tokens cannot take back: no half character at the end, no beginning of a stop string."""
    text = text.rstrip("\ufffd")
    held = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return len(text) - max(held, default=0)


class Lookup:
    """Guesses by memory: how the last two tokens went on when they were last seen (prompt lookup, Saxena 2023)."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # a pair of tokens: the place behind it
        self.found: int | None = None
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        pair = tuple(self.tokens[-2:])
        self.found = self.after.get(pair)
        self.after[pair] = len(self.tokens)

    def guess(self, count: int) -> list[int]:
        if self.found is None:
            return []
        period = len(self.tokens) - self.found  # where memory ends, it is taken to start over
        return [self.tokens[self.found + i % period] for i in range(count)]


class Session:
    """What a conversation keeps between its turns: keys and values of the tokens so far, and features of its media.

    Give the same one as `reuse=` at each turn. A turn runs only what comes after the longest beginning that it shares
    with the one before; a medium that was shown before is not encoded again. Two prompts share a media token only
    when the pixels are the same. Changing the model's weights in between calls for `clear()`.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self.model: PerceptionLM | None = None
        self.cache: Cache | None = None
        self.tokens: list[int] = []  # in the cache; -1 for a media token that the model itself wrote
        self.items: list[bytes] = []  # names of the media in the cache
        self.coming: list[bytes] = []  # names of the media of the present turn
        self.features: dict[bytes, Tensor] = {}  # by name, n E

    def belong_to(self, model: PerceptionLM) -> None:
        """Begin a turn; what another model left is of no use."""
        if self.model is not model:
            self.clear()
        self.model, self.coming = model, []

    def encode_media(self, pixels: Tensor) -> Tensor:
        """M 3 S S -> M n E, encoding only what is new."""
        assert self.model is not None, "belong_to() comes first"
        self.coming = [name_of(item) for item in pixels]
        new = {name: i for i, name in enumerate(self.coming) if name not in self.features}
        if new:
            self.features.update(zip(new, self.model.encode_media(pixels[list(new.values())]), strict=True))
        self.features = {name: self.features[name] for name in self.coming}
        return torch.stack([self.features[name] for name in self.coming])

    def open(self, batch: Batch, capacity: int) -> Cache:
        """The cache, cropped to what this turn's prompt begins with, and with room for `capacity` tokens."""
        assert self.model is not None, "belong_to() comes first"
        (ids,) = prompts_of(batch)
        kept = min(self.shared(ids, self.coming), len(ids) - 1)  # one token at least must run: its logits are wanted
        if self.cache is None:
            self.cache = new_cache(self.model, 1, capacity)
        self.cache.crop([kept])
        self.cache = self.cache.resized(capacity)
        self.tokens, self.items = ids[:kept], self.coming
        return self.cache

    def shared(self, ids: Sequence[int], coming: Sequence[bytes]) -> int:
        """How many tokens at the beginning of `ids` the cache knows, media and all.  coming: names of its media"""
        assert self.model is not None, "belong_to() comes first"
        same = next((i for i, (a, b) in enumerate(zip(self.tokens, ids, strict=False)) if a != b), None)
        same = min(len(self.tokens), len(ids)) if same is None else same
        slots = [i for i, token in enumerate(ids) if token == self.model.media_token]
        each = len(slots) // max(len(coming), 1)
        for item, name in enumerate(coming):
            if item >= len(self.items) or self.items[item] != name:
                return min(same, slots[item * each])
        return same

    def keep(self, answer: Answer) -> None:
        """Note what the cache holds after a step."""
        assert self.model is not None, "belong_to() comes first"
        prompt, media = answer.prompt, self.model.media_token
        self.tokens += prompt[len(self.tokens) :]
        new = answer.tokens[len(self.tokens) - len(prompt) : answer.kept - len(prompt)]  # at each step, these alone
        self.tokens += [-1 if token == media else token for token in new]


def name_of(item: Tensor) -> bytes:
    """A name that only these very pixels have.  item  3 S S"""
    raw = item.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16, key=str(item.dtype).encode()).digest()
