"""Language models of transformers behind our `Decoder` protocol: tiny random ones of three families."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from perception.errors import CheckpointError, ConfigError, MissingExtra
from perception_lm.cache import Cache, Replay
from perception_lm.integrations.transformers_decoder import RowCaches, TransformersDecoder
from perception_lm.model import PerceptionLM
from perception_lm.projector import PoolingProjector

V, E = 120, 32


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    try:
        import transformers
    except Exception as error:
        pytest.skip(f"transformers cannot be imported here: {error}")
    return transformers


@pytest.fixture(params=["llama", "qwen2", "mistral-window", "gpt2"])
def model(request: pytest.FixtureRequest, transformers: ModuleType) -> nn.Module:
    sizes = {"hidden_size": E, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 256, "tie_word_embeddings": False}
    configs: dict[str, Callable] = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "qwen2": lambda: transformers.Qwen2Config(**sizes),
        "mistral-window": lambda: transformers.MistralConfig(**sizes, head_dim=8, sliding_window=6),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=E, n_layer=2, n_head=4, vocab_size=V, n_positions=256, bos_token_id=1, eos_token_id=1
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def decoder(model: nn.Module) -> TransformersDecoder:
    return TransformersDecoder(model).eval()


@torch.inference_mode()
def test_the_logits_are_the_models_own(model: nn.Module, decoder: TransformersDecoder) -> None:
    tokens = torch.randint(0, V, (2, 11))
    wanted = model(input_ids=tokens).logits
    x = decoder.embed(tokens)
    assert (decoder.width, x.shape) == (E, (2, 11, E))
    torch.testing.assert_close(decoder(x), wanted)
    torch.testing.assert_close(decoder(x, last=3), wanted[:, -3:])
    at = torch.tensor([[0, 10, 4], [7, 7, 2]])
    torch.testing.assert_close(decoder(x, last=at), torch.stack([wanted[0, at[0]], wanted[1, at[1]]]))
    torch.testing.assert_close(decoder(x, positions=torch.arange(11)), wanted)


@torch.inference_mode()
def test_a_ragged_cache_gives_the_logits_of_one_pass(decoder: TransformersDecoder) -> None:
    """Rows of 9 and 5 tokens, padded; the padding taken back, then three tokens one by one, and one guess rejected."""
    tokens = torch.randint(0, V, (2, 14))
    x = decoder.embed(tokens)
    lengths = [9, 5]
    cache = decoder.new_cache(2, 20)
    assert isinstance(cache, Cache)
    first = decoder(x[:, :9], cache, last=torch.tensor([[8], [4]]))
    cache.crop(lengths)
    decoder(x[:, -1:], cache)  # a guess
    cache.crop(lengths)
    got = [first]
    for step in range(3):
        new = torch.stack([x[row, length + step] for row, length in enumerate(lengths)])[:, None]
        got.append(decoder(new, cache))
    assert cache.lengths == [12, 8]
    for row, length in enumerate(lengths):
        whole = decoder(x[row : row + 1, : length + 3])
        wanted = whole[:, length - 1 : length + 3]
        torch.testing.assert_close(torch.cat([g[row : row + 1] for g in got], 1), wanted, atol=1e-4, rtol=1e-4)
    twice = cache.select([1, 1, 0])
    assert twice.lengths == [8, 8, 12]
    out = decoder(x[[1, 1, 0], -1:], twice)
    torch.testing.assert_close(out[0], out[1])
    assert cache.lengths == [12, 8]
    assert cache.resized(99) is cache
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop([13, 8])
    with pytest.raises(ValueError, match="3 rows for a cache of 2"):
        decoder(x[[0, 0, 1], :1], cache)
    cache.crop([0, 0])
    torch.testing.assert_close(decoder(x[:, :9], cache), decoder(x[:, :9]), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_mask_hides_one_document_from_another(decoder: TransformersDecoder) -> None:
    """Two texts in one row: with the mask and positions of each, the second does not see the first."""
    if decoder.config.model_type == "gpt2":
        pytest.skip("its positions are learned and its own mask is not asked for here")
    x = decoder.embed(torch.randint(0, V, (1, 10)))
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[6:, :6] = False
    positions = torch.cat([torch.arange(6), torch.arange(4)])
    if getattr(decoder.config, "sliding_window", None) and decoder.config.model_type == "mistral":
        with pytest.raises(ConfigError, match="sliding window"):
            decoder(x, positions=positions, mask=mask)
        return
    got = decoder(x, positions=positions, mask=mask)
    torch.testing.assert_close(got[:, 6:], decoder(x[:, 6:]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[:, :6], decoder(x[:, :6]), atol=1e-5, rtol=1e-4)


def test_it_sees_pictures_through_a_perception_lm(decoder: TransformersDecoder) -> None:
    """Loss and gradients reach the projector and the decoder of another library."""
    from plm_tiny import tiny_config

    from perception_encoder.vision import VisionTransformer

    config = tiny_config()
    projector = PoolingProjector(24, E)
    model = PerceptionLM(VisionTransformer(config.vision), projector, decoder, 5)
    tokens = torch.randint(6, V, (1, 12))
    tokens[0, 2:6] = 5
    loss, logits = model(tokens, torch.randn(1, 3, 24, 24), labels=tokens)
    assert logits.shape == (1, 12, V)
    loss.backward()
    assert projector.fc1.weight.grad.abs().sum() > 0
    assert decoder.model.get_input_embeddings().weight.grad.abs().sum() > 0


@torch.inference_mode()
def test_generation_with_its_cache_equals_generation_without(decoder: TransformersDecoder) -> None:
    x = decoder.embed(torch.randint(0, V, (1, 14)))
    cache, replay = decoder.new_cache(1, 14), Replay(1)
    for start, stop in ((0, 5), (5, 6), (6, 9), *((n, n + 1) for n in range(9, 14))):
        whole, at = replay.extend(x[:, start:stop])
        got, wanted = decoder(x[:, start:stop], cache), decoder(whole, last=at)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_folders_load_strictly(tmp_path: Path, model: nn.Module) -> None:
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    decoder = TransformersDecoder.load(tmp_path, device="cpu", dtype="float32")
    tokens = torch.randint(0, V, (1, 7))
    with torch.inference_mode():
        torch.testing.assert_close(decoder(decoder.embed(tokens)), model(input_ids=tokens).logits)
    assert not decoder.training
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    dropped = next(key for key in state if "norm" in key or "ln_" in key)
    save_file({key: value for key, value in state.items() if key != dropped}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing_keys"):
        TransformersDecoder.load(tmp_path, device="cpu")
    save_file({**state, "extra.weight": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys \(extra\.weight\)"):
        TransformersDecoder.load(tmp_path, device="cpu")
    path.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        TransformersDecoder.load(tmp_path, device="cpu")


def test_unknown_folders_and_models_are_refused(tmp_path: Path, transformers: ModuleType) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="transformers cannot build"):
        TransformersDecoder.load(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="Linear takes no 'inputs_embeds'"):
        TransformersDecoder(nn.Linear(2, 2))


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'perception-vision\[hf\]'"):
        TransformersDecoder.load(tmp_path, device="cpu")


def test_an_empty_cache_is_empty(transformers: ModuleType) -> None:
    assert RowCaches(3).lengths == [0, 0, 0]
