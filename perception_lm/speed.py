"""The language models that `perception doctor --speed` measures: a prompt, and a token at a time behind it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from perception.optimize import optimize
from perception.speed import Case
from perception_lm.config import DecoderConfig
from perception_lm.decoder import Decoder
from perception_lm.zoo import MODELS, PACKAGED, list_models, load_model

DEFAULT = PACKAGED
PROMPT = 512  # tokens: enough to be bound by arithmetic
BEHIND = 256  # tokens that a step of decoding looks back at


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """The decoders of the models named, of those known here; the small one by default. Their towers are encoders'
    cases.

    What is not in the package is built with random weights: nothing is downloaded, and speed does not depend on them.
    """
    for name in (name for name in names or DEFAULT if name in list_models()):
        decoder = _decoder(name)
        read = float(sum(p.nbytes for p in decoder.blocks.parameters()) + decoder.head_weight.nbytes)
        for what, make, tokens, seen in (
            (f"prompt of {PROMPT} tokens", _prompt, PROMPT, 0),
            (f"a token behind {BEHIND}", _step, 1, BEHIND),
        ):
            fast = partial(_fast, decoder, make)
            yield Case(f"{name}, {what}", flops(decoder.config, tokens, seen), make(decoder), fast, read)


def flops(config: DecoderConfig, tokens: int, seen: int = 0) -> float:
    """Of `tokens` behind `seen` others, with the logits of the last one alone: every matrix product, and of attention
    what a token may look at."""
    c = config
    weights = 2 * c.width * c.head_dim * (c.heads + c.kv_heads) + 3 * c.width * c.mlp_width
    pairs = tokens * seen + tokens * (tokens + 1) // 2
    return float(c.depth * (2 * tokens * weights + 4 * pairs * c.heads * c.head_dim) + 2 * c.width * c.vocab)


def _decoder(name: str) -> Decoder:
    if name in PACKAGED:
        model: Any = load_model(name, device="cpu", dtype="float32")[0].decoder
        return model
    return Decoder(MODELS.get(name).config.decoder).eval()


def _prompt(decoder: Any) -> Callable[[], object]:
    x = torch.randn(1, PROMPT, decoder.width)

    def run() -> object:
        return decoder(x, decoder.new_cache(1, PROMPT), last=1)

    return run


def _step(decoder: Any) -> Callable[[], object]:
    x, cache = torch.randn(1, BEHIND, decoder.width), decoder.new_cache(1, BEHIND + 1)
    with torch.inference_mode():
        decoder(x, cache, last=1)

    def run() -> object:
        cache.crop([BEHIND])  # the same step again
        return decoder(x[:, :1], cache)

    return run


def _fast(decoder: Decoder, make: Callable[[Any], Callable[[], object]]) -> Callable[[], object]:
    return make(optimize(decoder, build=False))
