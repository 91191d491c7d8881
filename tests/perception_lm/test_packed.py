"""Documents laid end to end, and activations that are computed twice: the same numbers and the same gradients."""

import plm_golden as golden
import pytest
import torch
import torch.nn.functional as F

from perception.attention import KERNELS, attention_kernel
from perception.errors import ConfigError
from perception_lm.cache import Packed
from perception_lm.model import PerceptionLM, build

MODEL = golden.tiny().decoder
LENGTHS = [5, 1, 9, 3]


def documents() -> list[torch.Tensor]:
    return [MODEL.embed(torch.randint(0, 60, (1, n), generator=torch.Generator().manual_seed(n))) for n in LENGTHS]


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_each_document_is_as_it_is_alone(kernel: str) -> None:
    parts = documents()
    with attention_kernel(kernel):
        found = MODEL(torch.cat(parts, dim=1), Packed(LENGTHS))
        wanted = torch.cat([MODEL(part) for part in parts], dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_packed_keeps_nothing_and_gives_single_logits() -> None:
    x, packed = torch.cat(documents(), dim=1), Packed(LENGTHS)
    ends = torch.tensor([LENGTHS]).cumsum(1) - 1
    whole = MODEL(x, packed)
    torch.testing.assert_close(MODEL(x, packed, last=ends), whole[:, ends[0]])
    torch.testing.assert_close(F.linear(MODEL.hidden(x, packed), MODEL.head_weight), whole)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1, 4]])
def test_lengths_that_cannot_be(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        Packed(lengths)


def test_lengths_that_do_not_fit() -> None:
    x = torch.cat(documents(), dim=1)
    with pytest.raises(ValueError, match="are 4, but 18 were given"):
        MODEL(x, Packed([1, 3]))
    with pytest.raises(ValueError, match="2 rows of tokens were given with a cache for 1"):
        MODEL(x.expand(2, -1, -1), Packed(LENGTHS))


def gradients(model: PerceptionLM, again: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a loss, and how often a block of the decoder ran."""
    model.set_grad_checkpointing(again)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handles = [block.register_forward_pre_hook(count) for block in model.decoder.blocks]
    ids, pixels = golden.random_prompt(0, 2, 10)
    tokens = torch.tensor([ids])
    logits = model(tokens, pixels, cache=Packed([8, tokens.shape[1] - 8]))
    model.zero_grad()
    F.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, calls


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    torch.manual_seed(0)
    model = build(golden.TINY, golden.SLOT)
    wanted, once = gradients(model, again=False)
    found, twice = gradients(model, again=True)
    assert model.encoder.grad_checkpointing
    assert (once, twice) == (2, 4)
    assert wanted.keys() == found.keys()
    torch.testing.assert_close(found, wanted)


def test_gradient_checkpointing_leaves_a_cache_alone() -> None:
    """Run twice, a block would write the same tokens into the cache a second time."""
    torch.manual_seed(0)
    model = build(golden.TINY, golden.SLOT)
    model.set_grad_checkpointing()
    x = documents()[2]
    cache = model.decoder.new_cache(1, 9)
    with torch.no_grad():
        wanted = model.decoder(x, model.decoder.new_cache(1, 9))
    torch.testing.assert_close(model.decoder(x.detach(), cache), wanted)


def test_gradient_checkpointing_without_anybody_who_can() -> None:
    model = build(golden.TINY, golden.SLOT)

    class Plain(torch.nn.Module):
        width = 16

    model.encoder, model.decoder = Plain(), Plain()
    with pytest.raises(ConfigError, match="Plain and Plain cannot recompute"):
        model.set_grad_checkpointing()
