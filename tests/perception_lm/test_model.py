"""Pixels and text to logits: the published numbers of both tiny models, the seams, and the mistakes we know of."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import plm_golden as golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perception.layers
import perception_encoder.vision
import perception_lm.cache
import perception_lm.decoder
import perception_lm.projector
from perception.errors import ConfigError, RequestError
from perception.rope import RopeScaling, rope_2d
from perception_encoder.protocol import Features
from perception_lm.config import MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.model import PerceptionLM, build, next_token_loss, splice
from perception_lm.projector import PixelShuffleProjector

TOLERANCE = 1e-4
EVERY = [(name, case) for name in golden.MODELS for case in golden.CASES]


def prompt(name: str, case: str) -> tuple[Tensor, Tensor | None]:
    batch = golden.batch(name, [case])
    return batch.tokens, batch.pixels


# --- The published numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), EVERY)
@torch.inference_mode()
def test_golden_logits(name: str, case: str) -> None:
    io, logits = golden.values(name), golden.load(name)(*prompt(name, case))[0]
    assert (logits[-1] - io[f"{case}.last_logits"]).abs().max() < TOLERANCE
    if f"{case}.logits" in io:
        assert (logits - io[f"{case}.logits"]).abs().max() < TOLERANCE
    if f"{case}.logits_every16" in io:
        assert (logits[::16] - io[f"{case}.logits_every16"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", golden.MODELS)
@torch.inference_mode()
def test_golden_stages(name: str) -> None:
    """Trap 6: as many tokens as patches, the class token not among them; then the projector; then the slots."""
    io, model = golden.values(name), golden.load(name)
    tokens, pixels = prompt(name, "one")
    features = model.encoder(pixels)
    assert (features.patches.flatten(1, 2) - io["one.vision_output"]).abs().max() < TOLERANCE
    assert features.prefix.shape[1] == {"A": 1, "B": 0}[name]
    for case in ("one", "tile", "video"):
        media = model.encode_media(golden.pixels(name, case))
        assert (media - io[f"{case}.projector_output"]).abs().max() < TOLERANCE
    assert (model.embed(tokens, pixels)[0] - io["one.input_embeddings"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", golden.MODELS)
@torch.inference_mode()
def test_the_tower_has_no_final_norm_and_no_pool(name: str) -> None:
    """Trap 7: what is not in the file is not in the model."""
    keys = golden.load(name).state_dict().keys()
    assert not [key for key in keys if "norm_post" in key or "pool." in key or "project." in key]
    assert sum(key.endswith("ls2.gamma") for key in keys) == 2  # trap 10: both layers' gains are there


@pytest.mark.parametrize("name", golden.MODELS)
@torch.inference_mode()
def test_rows_side_by_side(name: str) -> None:
    """Trap 23: an image of five chunks, a text and a video in one batch, each as it is alone."""
    model, io = golden.load(name), golden.values(name)
    for cases in (["tile", "text", "video"], ["text", "one", "inter", "tile"]):
        batch = golden.batch(name, cases)
        logits = model(batch.tokens, batch.pixels)
        for row, (case, length) in enumerate(zip(cases, batch.lengths, strict=True)):
            assert (logits[row, length - 1] - io[f"{case}.last_logits"]).abs().max() < TOLERANCE


# --- The seams --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_media_chunks_do_not_matter() -> None:
    """At most `media_chunk` items are in the encoder at a time."""
    model, pixels = build(golden.TINY, golden.SLOT), torch.randn(7, 3, 8, 8)
    sizes: list[int] = []
    model.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.media_chunk = None
    whole = model.encode_media(pixels)
    model.media_chunk = 3
    torch.testing.assert_close(model.encode_media(pixels), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [7, 3, 3, 1]


def test_splice_in_reading_order() -> None:
    text = torch.zeros(2, 4, 1)
    media = torch.arange(1.0, 5).view(2, 2, 1)  # two items of two tokens
    slots = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    assert splice(text, media, slots)[..., 0].tolist() == [[0, 1, 0, 2], [3, 4, 0, 0]]
    assert text.sum() == 0  # the text given is untouched


@pytest.mark.parametrize("items", [0, 1, 3])
@torch.inference_mode()
def test_slots_and_media_must_agree(items: int) -> None:
    """Trap 24: neither cut short nor filled up in silence."""
    model = golden.tiny()
    tokens = torch.full((1, 8), golden.SLOT)  # two items' worth
    words = f"keeps 8 slots for media, but {items} items of"
    with pytest.raises(RequestError, match=words if items else "keeps 8 slots"):
        model(tokens, torch.randn(items, 3, 8, 8))
    with pytest.raises(RequestError, match="keeps 8 slots"):
        model(tokens)


@torch.inference_mode()
def test_text_and_media_alone() -> None:
    """F-95: no media at all, and nothing but media."""
    model = golden.tiny()
    text = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(text), model(text, torch.zeros(0, 3, 8, 8)))
    assert model(torch.full((1, 4), golden.SLOT), torch.randn(1, 3, 8, 8)).shape == (1, 4, golden.VOCAB)


def test_labels_are_the_tokens_themselves() -> None:
    """Trap 25: label t is asked of the logits at t - 1; what is -100 is not asked."""
    model = golden.tiny()
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    labels = tokens.masked_fill(torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool), -100)
    loss, logits = model(tokens, labels=labels)
    log_p = logits.log_softmax(-1)
    asked = [(0, 1, 4), (0, 2, 1), (0, 3, 5), (1, 3, 3)]
    torch.testing.assert_close(loss, -torch.stack([log_p[place] for place in asked]).mean())
    torch.testing.assert_close(logits, model(tokens))
    assert loss.requires_grad


def test_nothing_to_learn_is_no_loss() -> None:
    """Trap 26: a sample without a label gives 0 and zero gradients, not NaN."""
    logits = torch.randn(1, 4, 9, requires_grad=True)
    loss = next_token_loss(logits, torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_gradients_reach_every_part() -> None:
    model = build(golden.TINY, golden.SLOT)
    tokens = torch.tensor([[1, 60, 60, 60, 60, 2, 3]])
    model(tokens, torch.randn(1, 3, 8, 8), labels=tokens).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_widths_that_do_not_fit() -> None:
    model = golden.tiny()
    with pytest.raises(ConfigError, match="maps 8 to 24, but the encoder gives 16 and the decoder takes 24"):
        PerceptionLM(model.encoder, PixelShuffleProjector(8, 24), model.decoder, golden.SLOT)


class Squares:
    """An encoder that is no torch module: the mean colour of each square."""

    width, patch_size = 3, 4

    def __call__(self, pixels: Tensor) -> Features:
        patches = F.avg_pool2d(pixels, 4).permute(0, 2, 3, 1)
        return Features(patches=patches, prefix=patches.new_zeros(len(pixels), 0, 3))


class Bigram(nn.Module):
    """A decoder without a cache: the next token depends on the last embedding alone."""

    width = 6

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 6), nn.Linear(6, 11)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return self.out(x)


@torch.inference_mode()
def test_any_encoder_and_any_decoder() -> None:
    """What fits the protocols is a part; it inherits nothing from us."""
    model = PerceptionLM(Squares(), PixelShuffleProjector(3, 6), Bigram(), media_token=10)
    tokens, pixels = torch.tensor([[1, 10, 10, 2]]), torch.rand(1, 3, 8, 16)
    logits = model(tokens, pixels)
    assert logits.shape == (1, 4, 11)
    assert not torch.equal(logits, model(tokens, pixels.flip(-1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector": ProjectorConfig(in_width=16, width=20)}, "the decoder takes 24"),
        ({"projector": ProjectorConfig(in_width=16, width=24, pool=3)}, "4 patches does not pool by 3"),
        ({"media": MediaConfig(tile=9)}, "9 pixels do not divide into patches of 2"),
    ],
)
def test_parts_that_do_not_fit(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(golden.TINY, **changes)


def test_config_there_and_back() -> None:
    data = json.loads(json.dumps(golden.TINY.to_dict()))
    assert PlmConfig.from_dict(data) == golden.TINY
    data["decoder"]["sliding_window"] = 4096
    with pytest.raises(ConfigError, match="sliding_window"):
        PlmConfig.from_dict(data)
    for wrong in ({"tile": 0}, {"max_tiles": 5000}, {"frames": -1}, {"context": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MediaConfig(**wrong)


def test_a_model_on_meta_takes_no_memory() -> None:
    with torch.device("meta"):
        model = build(golden.TINY, golden.SLOT)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# --- Every known mistake is seen --------------------------------------------------------------------------------------


@contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def gelu(module: object, name: str = "F") -> Callable:
    """`module.F` with a tanh GELU."""

    class Wrong:
        def __getattr__(self, function: str):
            real = getattr(F, function)
            return (lambda x: real(x, approximate="tanh")) if function == "gelu" else real

    return lambda model: replaced(module, name, Wrong())


@contextmanager
def decoder_config(model, **changes):
    with replaced(model.decoder, "config", replace(model.decoder.config, **changes)):
        yield


def scaling(**changes) -> Callable:
    """Trap 3: another stretch of the rotary frequencies."""
    return lambda model: decoder_config(model, rope_scaling=RopeScaling(**changes) if changes else None)


def halves(x: Tensor, rope) -> Tensor:
    cos, sin = (t[:, None] for t in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@contextmanager
def q_of_one_layer_in_halves(model):
    q = model.decoder.blocks[0].attn.q.weight
    q.data = q.data.unflatten(0, (-1, model.decoder.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    yield


@contextmanager
def k_and_v_permuted(model, part: str):
    weight = getattr(model.decoder.blocks[0].attn, part).weight
    weight.data = weight.data.unflatten(0, (-1, model.decoder.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    yield


def tiled_heads(model):
    """Key head j serves the queries j, j + kv_heads, ... instead of a run of neighbours."""
    real = perception_lm.cache.attend

    def wrong(q, k, v, **options):
        times = q.shape[2] // k.shape[2]
        return real(q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), **options)

    return replaced(perception_lm.cache, "attend", wrong)


def bidirectional(model):
    real = perception_lm.cache.attend
    return replaced(perception_lm.cache, "attend", lambda q, k, v, causal, mask: real(q, k, v))


def projecting(change: Callable[[nn.Module, Tensor], Tensor]) -> Callable:
    return lambda model: replaced(model.projector, "forward", lambda patches: change(model.projector, patches))


def mean_first(p, x):
    return p.fc2(F.gelu(p.fc1(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2))))


def pooled(p, x, how):
    return how(p.fc2(F.gelu(p.fc1(x))).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


def encoding(change: Callable[[Features], Features]) -> Callable:
    def broken(model):
        real = model.encoder.forward
        return replaced(model.encoder, "forward", lambda pixels: change(real(pixels)))

    return broken


def shifted(features: Features) -> Features:
    flat = features.tokens()[:, : features.patches[0, ..., 0].numel()]
    return Features(patches=flat.view_as(features.patches), prefix=features.prefix)


@contextmanager
def one_layer_less(model):
    with replaced(model.encoder, "blocks", model.encoder.blocks[:-1]):
        yield


@contextmanager
def one_layer_more(model):
    with replaced(model.encoder, "blocks", nn.ModuleList([*model.encoder.blocks, model.encoder.blocks[-1]])):
        yield


@contextmanager
def layer_scale(model, value: float | None):
    for block in model.encoder.blocks:
        for part in (block.ls1, block.ls2):
            part.gamma.data = torch.full_like(part.gamma, 1.0 if value is None else value)
    yield


def vision_rope(change: Callable[[Tensor, int], Tensor]) -> Callable:
    def table(h, w, head_dim, *, prefix=0, device=None):
        return tuple(change(t, prefix) for t in rope_2d(h, w, head_dim, prefix=prefix))

    return lambda model: replaced(perception_encoder.vision, "rope_2d", table)


def grid_from_zero(model):
    def table(h, w, head_dim, *, prefix=0, device=None):
        cos, sin = rope_2d(h, w, head_dim)
        return torch.cat([cos.new_ones(prefix, cos.shape[1]), cos]), torch.cat(
            [sin.new_zeros(prefix, sin.shape[1]), sin]
        )

    return replaced(perception_encoder.vision, "rope_2d", table)


@contextmanager
def decoder_eps(model):
    for module in model.decoder.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6
    yield


@contextmanager
def gate_and_up_swapped(model):
    for block in model.decoder.blocks:
        block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate
    yield


@contextmanager
def decoder_norms_swapped(model):
    for block in model.decoder.blocks:
        block.norm1, block.norm2 = block.norm2, block.norm1
    yield


@contextmanager
def tied_anyway(model):
    with replaced(model.decoder, "head", None):
        yield


def splicing(change: Callable) -> Callable:
    real = perception_lm.model.splice
    return lambda model: replaced(
        perception_lm.model, "splice", lambda text, media, slots: change(real, text, media, slots)
    )


A, B, BOTH = ["A"], ["B"], ["A", "B"]
MUTATIONS: dict[str, tuple[Callable, list[str]]] = {
    "1 rope: half-split planes": (lambda model: replaced(perception_lm.decoder, "rotate", halves), BOTH),
    "1 rope: q of one layer permuted": (q_of_one_layer_in_halves, BOTH),
    "1 rope: v permuted": (lambda model: k_and_v_permuted(model, "v"), BOTH),
    "2 rope: k of one layer permuted": (lambda model: k_and_v_permuted(model, "k"), BOTH),
    "2 attention: key heads tiled": (tiled_heads, A),
    "3 rope: no scaling": (scaling(), A),
    "3 rope: high_freq_factor 32": (scaling(factor=32, high_freq_factor=32), A),
    "3 rope: factor 8": (scaling(factor=8), BOTH),
    "3 rope: theta 10000": (lambda model: decoder_config(model, rope_theta=1e4), BOTH),
    "4 projector: the mean before the MLP": (projecting(mean_first), BOTH),
    "4 projector: the maximum": (projecting(lambda p, x: pooled(p, x, lambda y: F.max_pool2d(y, 2))), BOTH),
    "4 projector: every other patch": (projecting(lambda p, x: pooled(p, x, lambda y: y[..., ::2, ::2])), BOTH),
    "4 projector: column by column": (
        projecting(lambda p, x: pooled(p, x, lambda y: F.avg_pool2d(y, 2).transpose(2, 3))),
        BOTH,
    ),
    "5 projector: tanh GELU": (gelu(perception_lm.projector), BOTH),
    "5 vision: tanh GELU": (gelu(perception.layers), BOTH),
    "6 vision: class token kept, last patch dropped": (encoding(shifted), A),
    "7 vision: one layer less": (one_layer_less, BOTH),
    "7 vision: one layer more": (one_layer_more, BOTH),
    "7 vision: a final norm": (
        encoding(lambda f: Features(F.layer_norm(f.patches, f.patches.shape[-1:]), f.prefix)),
        BOTH,
    ),
    "8 vision rope: class token's row last": (vision_rope(lambda t, prefix: t.roll(-prefix, 0)), A),
    "8 vision rope: grid from 0 beside a class token": (grid_from_zero, A),
    "10 vision: layer scale ignored": (lambda model: layer_scale(model, None), BOTH),
    "10 vision: layer scale left at its start": (lambda model: layer_scale(model, 0.1), BOTH),
    "23 splice: items in the wrong order": (splicing(lambda f, text, media, s: f(text, media.flip(1), s)), BOTH),
    "23 splice: media added to the text": (splicing(lambda f, text, media, s: text + f(0 * text, media, s)), BOTH),
    "28 head: tied although it is not": (tied_anyway, B),
    "decoder: sees what comes after": (bidirectional, BOTH),
    "decoder: eps 1e-6": (decoder_eps, BOTH),
    "decoder: gate and up swapped": (gate_and_up_swapped, BOTH),
    "decoder: the two norms of a block swapped": (decoder_norms_swapped, BOTH),
    "decoder: no final norm": (lambda model: replaced(model.decoder, "norm", nn.Identity()), BOTH),
}


def error(model: PerceptionLM, name: str) -> float:
    """What the golden tests look at: the worst logit of the case `one`."""
    return float((model(*prompt(name, "one"))[0] - golden.values(name)["one.logits"]).abs().max())


@pytest.mark.parametrize(
    ("mistake", "name"),
    [(mistake, name) for mistake, (_, names) in MUTATIONS.items() for name in names],
    ids=lambda value: value.replace(" ", "-"),
)
@torch.inference_mode()
def test_mistake_is_seen(mistake: str, name: str) -> None:
    """Traps 1 to 8, 10, 23 and 28, each put in: the very comparison of the golden tests must fail."""
    model = golden.load(name)
    assert error(model, name) < TOLERANCE
    with MUTATIONS[mistake][0](model):
        assert error(model, name) > 5 * TOLERANCE
    assert error(golden.load(name), name) < TOLERANCE  # nothing leaked
