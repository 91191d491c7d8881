"""The Llama decoder: the published numbers, the laws of a causal model, and the mistakes each would let through."""

import json
import math
from dataclasses import replace

import plm_golden as golden
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perception.attention import KERNELS, attention_kernel
from perception.errors import ConfigError
from perception.rope import RopeScaling, frequencies
from perception_lm.config import DecoderConfig
from perception_lm.decoder import Decoder, RMSNorm

TINY = golden.TINY.decoder


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 1.0)
    return model


def formula(model: Decoder, x: torch.Tensor) -> torch.Tensor:
    """One row of embeddings T E to logits T V, in float64 and loops: the definition, and nothing shared with ours."""
    c, T = model.config, len(x)
    w = {name: parameter.double() for name, parameter in model.named_parameters()}
    x = x.double()

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turned(head):  # T head_dim
        out = torch.empty_like(head)
        for p in range(T):
            for i in range(c.head_dim // 2):
                frequency = c.rope_theta ** (-2 * i / c.head_dim)
                if c.rope_scaling:
                    s = c.rope_scaling
                    length = 2 * math.pi / frequency
                    if length > s.original_context / s.low_freq_factor:
                        frequency /= s.factor
                    elif length > s.original_context / s.high_freq_factor:
                        share = s.original_context / length - s.low_freq_factor
                        share /= s.high_freq_factor - s.low_freq_factor
                        frequency = (1 - share) * frequency / s.factor + share * frequency
                a, b = head[p, 2 * i], head[p, 2 * i + 1]
                cos, sin = math.cos(p * frequency), math.sin(p * frequency)
                out[p, 2 * i], out[p, 2 * i + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    for i in range(c.depth):
        b = f"blocks.{i}."
        y = norm(x, w[b + "norm1.weight"])
        q, k, v = ((y @ w[b + f"attn.{n}.weight"].T).unflatten(-1, (-1, c.head_dim)) for n in "qkv")
        heads = []
        for h in range(c.heads):
            served = h // (c.heads // c.kv_heads)
            scores = turned(q[:, h]) @ turned(k[:, served]).T / c.head_dim**0.5
            for p in range(T):
                scores[p, p + 1 :] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, served])
        x = x + torch.cat(heads, dim=-1) @ w[b + "attn.o.weight"].T
        y = norm(x, w[b + "norm2.weight"])
        gate, up = y @ w[b + "mlp.gate.weight"].T, y @ w[b + "mlp.up.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[b + "mlp.down.weight"].T
    return norm(x, w["norm.weight"]) @ w.get("head.weight", w["token_embed.weight"]).T


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "rope_scaling": None},
        {"kv_heads": 1, "head_dim": 6},
        {"kv_heads": 4, "rope_scaling": RopeScaling(factor=2, original_context=4, high_freq_factor=8)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_equals_the_formula(changes: dict, kernel: str) -> None:
    model = decoder(**changes)
    x = torch.randn(2, 7, TINY.width)
    with attention_kernel(kernel):
        found = model(x)
    for row in range(2):
        torch.testing.assert_close(found[row].double(), formula(model, x[row]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", golden.MODELS)
@torch.inference_mode()
def test_golden_blocks_and_logits(name: str) -> None:
    """From the reference's own embeddings: every block's output, and all logits."""
    model, io = golden.load(name).decoder, golden.values(name)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    logits = model(io["one.input_embeddings"][None])[0]
    assert len(outputs) == model.config.depth
    for layer, output in enumerate(outputs):
        assert (output - io[f"one.layer{layer}_output"]).abs().max() < 1e-4
    assert (logits - io["one.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", golden.MODELS)
def test_golden_frequencies(name: str) -> None:
    """Trap 3: scaling by the file's own numbers, and none on a model without."""
    c = golden.load(name).decoder.config
    wanted = torch.tensor(golden.facts(name)["checks"]["rope_inv_freq"])
    torch.testing.assert_close(frequencies(c.head_dim, c.rope_theta, c.rope_scaling), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("head_dim", "kept", "divided", "blended"), [(64, 15, 14, 3), (128, 29, 29, 6)])
def test_published_split_of_frequencies(head_dim: int, kept: int, divided: int, blended: int) -> None:
    """Trap 3: factor 32 and high_freq_factor 4, as the published 1B and 3B have."""
    plain = frequencies(head_dim, 500_000.0)
    ratio = plain / frequencies(head_dim, 500_000.0, RopeScaling(factor=32))
    same, slow = ratio < 1 + 1e-5, ratio > 32 - 1e-3
    assert (int(same.sum()), int(slow.sum()), int((~same & ~slow).sum())) == (kept, divided, blended)


@torch.inference_mode()
def test_last_asks_for_few_logits() -> None:
    """Logits only where they are wanted: the head sees no other position."""
    model = decoder()
    x, seen = torch.randn(2, 6, TINY.width), []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    full = model(x)
    torch.testing.assert_close(model(x, last=0), full)
    torch.testing.assert_close(model(x, last=2), full[:, -2:])
    places = torch.tensor([[0, 5, 3], [2, 2, 1]])
    torch.testing.assert_close(model(x, last=places), torch.stack([full[0, places[0]], full[1, places[1]]]))
    assert seen == [6, 6, 2, 3]


@torch.inference_mode()
def test_a_longer_prompt_does_not_change_earlier_logits() -> None:
    model = decoder()
    x = torch.randn(1, 9, TINY.width)
    torch.testing.assert_close(model(x)[:, :5], model(x[:, :5]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x)[:, 5:], model(x[:, 4:])[:, 1:], rtol=1e-2)  # and earlier ones matter


@torch.inference_mode()
def test_documents_laid_end_to_end() -> None:
    """With positions that start again and a block mask, documents in one row are what they are alone."""
    model, lengths = decoder(), [3, 5]
    parts = [torch.randn(1, n, TINY.width) for n in lengths]
    document = torch.tensor([0] * 3 + [1] * 5)
    mask = (document[:, None] == document) & torch.ones(8, 8, dtype=torch.bool).tril()
    positions = torch.tensor([*range(3), *range(5)])
    packed = model(torch.cat(parts, dim=1), positions=positions, mask=mask)
    alone = torch.cat([model(part) for part in parts], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(torch.cat(parts, dim=1)), alone, rtol=1e-2)


def test_norm_multiplies_in_float32() -> None:
    """Trap 29: the weight is applied before the cast to half precision, not after."""
    norm = RMSNorm(64, 1e-5).bfloat16()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(200, 64).bfloat16()
    exact = F.rms_norm(x.float(), (64,), eps=1e-5) * norm.weight.float()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    assert (found != exact.bfloat16()).float().mean() < 0.002  # a rounding of the mean may differ
    cast_first = F.rms_norm(x.float(), (64,), eps=1e-5).bfloat16() * norm.weight
    assert (cast_first != exact.bfloat16()).float().mean() > 0.05


@torch.inference_mode()
def test_rotation_stays_in_float32_in_a_half_precision_model() -> None:
    """Trap 29: the angles of a bfloat16 model are float32; at position 1000 bfloat16 angles are wrong by radians."""
    cos, sin = decoder().bfloat16().rope(torch.tensor([[1000]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert abs(float(cos[0, 0]) - math.cos(1000)) < 1e-4


def test_tied_head_is_the_embedding() -> None:
    """Trap 28: one matrix, which learns from both of its uses."""
    model = decoder(tied=True)
    assert "head.weight" not in model.state_dict()
    assert "head.weight" in decoder().state_dict()
    tokens = torch.tensor([[1, 2, 3]])
    model(model.embed(tokens)).sum().backward()
    rows = model.token_embed.weight.grad.abs().sum(-1)
    assert (rows > 0).all()  # as the output, every row; as the input, only three
    assert float(rows[1]) != float(rows[10])


@torch.inference_mode()
def test_fresh_weights_keep_the_scale() -> None:
    torch.manual_seed(0)
    model = Decoder(replace(TINY, width=64, heads=8, depth=4, vocab=500))
    logits = model(model.embed(torch.randint(0, 500, (2, 32))))
    assert 0.3 < float(logits.std()) < 3
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)


# --- The config -------------------------------------------------------------------------------------------------------


def test_config_there_and_back() -> None:
    for config in (TINY, DecoderConfig(width=64, depth=1, heads=4, kv_heads=4, mlp_width=8, vocab=9)):
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DecoderConfig(width=64, depth=1, heads=4, kv_heads=4, mlp_width=8, vocab=9).head_dim == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 10**9}, "depth is 1000000000"),
        ({"heads": 0}, "heads is 0"),
        ({"kv_heads": 3}, "3 key heads cannot be shared by 4"),
        ({"head_dim": 7}, "must be even"),
        ({"head_dim": 0, "width": 25}, "does not divide into 4 heads; give head_dim"),
        ({"vocab": -1}, "vocab is -1"),
        ({"norm_eps": 2.0}, "norm_eps is 2.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ],
)
def test_sizes_that_cannot_be(changes: dict, words: str) -> None:
    """F-25: refused before anything is allocated."""
    with pytest.raises(ConfigError, match=words):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"layers": 2}, "unknown keys"), ({"width": "24"}, "expected int"), ({"tied": 1}, "expected bool")],
)
def test_config_files_are_read_strictly(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DecoderConfig.from_dict(TINY.to_dict() | changes)
