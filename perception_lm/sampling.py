"""Which token comes next: greedy, or drawn from a distribution that was cut to its better part.

B rows  W positions of one step (the next token, and one after each guess)  V vocabulary
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perception.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are written.

    max_new_tokens      tokens of an answer at most, the stop token among them
    temperature         0: the likeliest token; above 0: drawn from softmax(logits / temperature)
    top_k, top_p, min_p draw among the k likeliest; the likeliest that together reach p (Holtzman et al. 2020); those at
                        least p times as likely as the likeliest (Nguyen et al. 2024). In this order
    repetition_penalty  above 1: logits of tokens already in the prompt or the answer are divided by it, or multiplied
                        if negative (Keskar et al. 2019). 1 or None: off
    seed                of the draws. An int: the j-th answer to any prompt draws with seed + j, so an answer does not
                        depend on its neighbours in a batch. A sequence: one for each answer. None: another each time
    samples             answers to each prompt
    stop                strings that end an answer; they and what follows are not part of its text
    stop_tokens         ids that end an answer; not part of its text, but the last of its tokens
    logprobs            report each token's log-probability under the model itself (temperature 1, nothing cut)
    speculative         tokens guessed at once by looking up how the last two went on before (Saxena 2023); the answers
                        stay the same. 0: off
    cache               keep keys and values; False runs all tokens again at each step

    Raises ConfigError for what cannot be.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | Sequence[int] | None = None
    samples: int = 1
    stop: Sequence[str] = ()
    stop_tokens: frozenset[int] = frozenset()
    logprobs: bool = False
    speculative: int = 0
    cache: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))
        _number("max_new_tokens", self.max_new_tokens, low=1, whole=True)
        _number("temperature", self.temperature, low=0)
        _number("samples", self.samples, low=1, high=10_000, whole=True)
        _number("speculative", self.speculative, low=0, high=1_000, whole=True)
        _number("top_k", self.top_k, low=1, whole=True)
        _number("top_p", self.top_p, low=0, high=1, above=True)
        _number("min_p", self.min_p, low=0, high=1)
        _number("repetition_penalty", self.repetition_penalty, low=0, above=True)
        for seed in self.seed if isinstance(self.seed, Sequence) else [self.seed]:
            _number("seed", seed, low=0, high=2**62, whole=True)
        if bad := [s for s in self.stop if not isinstance(s, str) or not s]:
            raise ConfigError(f"stop strings are not empty; given {bad}")

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty not in (None, 1)

    def seeds(self, prompts: int) -> list[int]:
        """A seed for each answer, prompt by prompt. ConfigError when a sequence has another number of them."""
        answers = prompts * self.samples
        if self.seed is None:
            return torch.randint(2**62, (answers,)).tolist()
        if isinstance(self.seed, Sequence):
            if len(self.seed) != answers:
                raise ConfigError(f"{len(self.seed)} seeds for {answers} answers; give one each, or one int for all")
            return list(self.seed)
        return [self.seed + j for _ in range(prompts) for j in range(self.samples)]


def choose(logits: Tensor, config: GenerationConfig, draws: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token after each position of a step, as if the one before it had been accepted.

    logits  B W V
    draws   B W      uniform in [0, 1); unused at temperature 0
    seen    B V      bool, the tokens that are penalised; None without a penalty
    return  B W int64, -1 where the logits are not numbers; and B W float32, its log-probability
    """
    ids = []
    for scores, draw in zip(logits.float().unbind(1), draws.unbind(1), strict=True):
        scores = penalise(scores, seen, config.repetition_penalty) if seen is not None else scores
        picked = draw_from(cut(scores, config), draw) if config.temperature else scores.argmax(-1)
        seen = seen.scatter(1, picked[:, None], True) if seen is not None else None
        ids.append(picked)
    found = torch.stack(ids, dim=1)  # B W
    likely = logits.float().log_softmax(-1).gather(-1, found[..., None])[..., 0] if config.logprobs else draws
    return found.masked_fill(~logits.amax(-1).isfinite(), -1), likely


def penalise(scores: Tensor, seen: Tensor, penalty: float | None) -> Tensor:
    """B V -> B V: seen tokens made less likely, whatever the sign of their score."""
    penalty = penalty or 1.0
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def cut(scores: Tensor, config: GenerationConfig) -> Tensor:
    """B V logits -> B V, at the temperature, and -inf for the tokens that are out."""
    scores = scores / config.temperature
    if config.top_k is not None:
        scores = keep_top_k(scores, config.top_k)
    if config.top_p is not None:
        scores = keep_top_p(scores, config.top_p)
    if config.min_p is not None:
        scores = keep_min_p(scores, config.min_p)
    return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """The k best, and those that tie with the last of them; all when there are no more than k."""
    worst = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < worst, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """The fewest of the likeliest that together reach p; always the likeliest."""
    ranked, order = scores.sort(descending=True, stable=True)
    probs = ranked.softmax(-1)
    out = probs.cumsum(-1) - probs >= p  # those before it reach p already
    out[..., 0] = False
    return scores.masked_fill(out.scatter(-1, order, out), -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Those at least p times as likely as the likeliest."""
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)


def draw_from(scores: Tensor, draw: Tensor) -> Tensor:
    """The token at which the running sum of softmax(scores) passes `draw`.  B V, B -> B int64

    One uniform number a token makes the draws the same on every device, and a row's own whatever its batch.
    """
    total = scores.softmax(-1).cumsum(-1)  # B V
    found = torch.searchsorted(total, draw[:, None].to(total) * total[:, -1:], right=True)[:, 0]
    return found.minimum((total < total[:, -1:]).sum(-1))  # rounding may carry a draw past the end


class Draws:
    """Uniform numbers from a seed, a token each; looked at first, and used up when the token is accepted."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.ready: list[float] = []

    def peek(self, count: int) -> list[float]:
        while len(self.ready) < count:
            self.ready += torch.rand(64, generator=self.generator).tolist()
        return self.ready[:count]

    def use(self, count: int) -> None:
        del self.ready[:count]


def _number(
    name: str, value: Any, *, low: float, high: float = math.inf, whole: bool = False, above: bool = False
) -> None:
    """ConfigError unless the value is None or a number in its range.  above: `low` itself is out"""
    kinds = (int,) if whole else (int, float)
    if value is None:
        return
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high or (above and value == low):
        least = "above" if above else "at least"
        most = f" and at most {high:g}" if high < math.inf else ""
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} is {value!r}; expected {kind} {least} {low:g}{most}")
