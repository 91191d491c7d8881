"""Weight-only quantisation: which layers, how close, and what is refused."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from plm_tiny import tiny_config, tiny_model
from torch import nn

from perception.errors import ConfigError, MissingExtra
from perception_lm.checkpoints import export
from perception_lm.config import DecoderConfig
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM
from perception_lm.quantize import decoder_linears, quantize, quantized_layers, weight_bytes


@pytest.fixture
def torchao() -> None:
    try:
        import torchao.quantization  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchao cannot be imported here: {error}")


@pytest.fixture
def model() -> PerceptionLM:
    return tiny_model(tiny_config(tied=False, width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=96))


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.05), ("int4", 0.6)])
@torch.inference_mode()
def test_only_the_decoders_blocks_are_rounded(model: PerceptionLM, kind: str, error: float) -> None:
    """14 layers of 2 blocks: every other tensor is the one it was, to the bit; logits move a little."""
    before = copy.deepcopy(model)
    tokens, pixels = torch.randint(0, 430, (1, 30)), torch.randn(1, 3, 24, 24)
    tokens[0, 3:7] = 435
    assert quantize(model, kind) is model
    layers = quantized_layers(model)
    assert len(layers) == 14
    assert all(name.startswith("decoder.blocks.") for name in layers)
    old, new = dict(before.named_parameters()), dict(model.named_parameters())
    assert old.keys() == new.keys()
    for name in old.keys() - {f"{layer}.weight" for layer in layers}:
        assert torch.equal(old[name], new[name]), name
    assert weight_bytes(model) < weight_bytes(before)
    wanted, got = before(tokens, pixels), model(tokens, pixels)
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < error


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_weights_take_what_they_should(kind: str, dtype: torch.dtype) -> None:
    """Of a matrix: a byte a weight and 5 a row; or half a byte, and a scale and an offset for each group of 64."""
    config = DecoderConfig(width=256, depth=1, heads=4, kv_heads=4, mlp_width=256, vocab=8, tied=True)
    decoder = Decoder(config).to(dtype)
    rest = weight_bytes(decoder) - sum(layer.weight.nbytes for layer in decoder_linears(decoder).values())
    quantize(decoder, kind)
    rows, weights, size = 7 * 256, 7 * 256**2, dtype.itemsize
    wanted = weights + 5 * rows if kind == "int8" else weights // 2 + 2 * size * weights // 64
    assert weight_bytes(decoder) - rest == wanted


@pytest.mark.usefixtures("torchao")
@torch.inference_mode()
def test_a_cache_gives_the_same_logits_as_one_pass(model: PerceptionLM) -> None:
    decoder = quantize(model, "int8").decoder
    x = decoder.embed(torch.randint(0, 430, (1, 12)))
    cache = decoder.new_cache(1, 12)
    got = torch.cat([decoder(x[:, :7], cache), *(decoder(x[:, n : n + 1], cache) for n in range(7, 12))], 1)
    torch.testing.assert_close(got, decoder(x), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("torchao")
def test_int4_leaves_what_it_cannot_group() -> None:
    """Widths of 48 and 40 do not divide by 32: those matrices stay; with none left it is an error."""
    config = DecoderConfig(width=64, depth=1, heads=4, kv_heads=2, mlp_width=48, vocab=8)
    decoder = quantize(Decoder(config), "int4", group=128)
    left = set(decoder_linears(decoder)) - set(quantized_layers(decoder))
    assert left == {"blocks.0.mlp.down"}
    with pytest.raises(ConfigError, match="groups of 128, 64, 32 columns; 40 divides into none"):
        quantize(Decoder(DecoderConfig(width=40, depth=1, heads=5, kv_heads=1, mlp_width=48, vocab=8)), "int4")


@pytest.mark.usefixtures("torchao")
@torch.inference_mode()
def test_a_model_of_transformers_keeps_its_head() -> None:
    try:
        import transformers
    except Exception as error:
        pytest.skip(f"transformers cannot be imported here: {error}")
    from perception_lm.integrations.transformers_decoder import TransformersDecoder

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)
    decoder = TransformersDecoder(transformers.LlamaForCausalLM(config))
    quantize(decoder, "int8")
    layers = quantized_layers(decoder)
    assert len(layers) == 14
    assert not any("lm_head" in name for name in layers)
    assert type(decoder.model.lm_head.weight.data) is torch.Tensor


@pytest.mark.usefixtures("torchao")
def test_a_quantised_model_is_not_written_or_rounded_twice(model: PerceptionLM, tmp_path: Path) -> None:
    quantize(model, "int8")
    with pytest.raises(ConfigError, match="14 layers are quantised already"):
        quantize(model, "int4")
    for layout in ("native", "original", "hf"):
        with pytest.raises(ConfigError, match="not plain"):
            export(model, tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()


def test_what_cannot_be_quantised_is_refused(model: PerceptionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no quantisation 'int2'"):
        quantize(model, "int2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="group is 48"):
        quantize(model, "int4", group=48)
    with pytest.raises(ConfigError, match="Linear has no decoder"):
        quantize(nn.Linear(2, 2), "int8")
    with torch.device("meta"):
        empty = Decoder(tiny_config().decoder)
    with pytest.raises(ConfigError, match="no weights yet"):
        quantize(empty, "int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtra, match=r"pip install 'perception-vision\[quantize\]'"):
        quantize(model, "int8")
    assert all(type(p.data) is torch.Tensor for p in model.parameters())
