"""optimize(): which models have a twin, what a twin refuses, and that the model is left alone."""

import pytest
import torch

import perception_encoder as pe
from perception.errors import ConfigError
from perception.kernels import linear
from perception.optimize import FastPart, Plan, has_twin, optimize, optimize_part
from perception_lm.config import DecoderConfig
from perception_lm.decoder import Decoder

SMALL = pe.VisionConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, output_width=16)


@pytest.fixture
def tower() -> pe.VisionTransformer:
    torch.manual_seed(0)
    return pe.VisionTransformer(SMALL).eval()


def test_a_model_without_a_twin_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no fast twin; optimize\(\) takes CLIP"):
        optimize(torch.nn.Linear(2, 2))


def test_a_part_without_a_twin_stays_as_it_is() -> None:
    part = torch.nn.Linear(2, 2)
    assert not has_twin(part)
    assert optimize_part(part, Plan()) is part


def test_an_unknown_quantisation_is_refused(tower: pe.VisionTransformer) -> None:
    with pytest.raises(ConfigError, match="no quantisation 'int3'; there are: int8, int4, fp8"):
        optimize(tower, "int3")  # type: ignore[arg-type]


def test_the_model_is_left_alone_and_found_again(tower: pe.VisionTransformer) -> None:
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    fast = optimize(tower)
    fast.pooled(torch.randn(1, 3, 16, 16))
    assert fast.plain is tower
    assert "plain" not in dict(fast.named_modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert all(parameter.requires_grad for parameter in tower.parameters())
    tower.pooled(torch.randn(1, 3, 16, 16)).sum().backward()  # it can still be trained
    assert tower.patch_embed.weight.grad is not None


def test_each_model_may_measure_anew(tower: pe.VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_spent", [99.0])
    optimize(tower)
    assert sum(linear._spent) < 99


def test_a_twin_has_no_twin(tower: pe.VisionTransformer) -> None:
    fast = optimize(tower)
    with pytest.raises(ConfigError, match=r"no fast twin|twin already"):
        optimize(fast)
    text = pe.TextTransformer(pe.TextConfig(context=8, width=32, depth=1, heads=2, output_width=16, vocab=20)).eval()
    with pytest.raises(ConfigError, match=r"twin already; `\.plain` is the model"):
        optimize(optimize(pe.CLIP(tower, text)))


def test_keep_false_empties_the_model(tower: pe.VisionTransformer) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = tower.pooled(pixels)
    fast = optimize(tower, keep=False)
    assert fast.plain is None
    assert sum(parameter.numel() for parameter in tower.parameters()) == 0
    torch.testing.assert_close(fast.pooled(pixels), wanted, rtol=1e-5, atol=1e-5)


def test_a_twin_refuses_training_moving_and_saving(tower: pe.VisionTransformer) -> None:
    fast = optimize(tower)
    assert isinstance(fast, FastPart)
    assert fast.eval() is fast
    for refused, message in (
        (lambda: fast.train(), "for inference"),
        (lambda: fast.half(), "stays on cpu in torch.float32"),
        (lambda: fast.to("meta"), "stays on cpu"),
        (lambda: fast.state_dict(), "has no state_dict"),
        (lambda: fast.load_state_dict({}), "loads no weights"),
        (lambda: fast(torch.randn(1, 3, 16, 16, requires_grad=True)), "computes no gradients"),
        (lambda: fast.pooled(torch.randn(1, 3, 16, 16, requires_grad=True)), "computes no gradients"),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert fast.to("cpu").float() is fast  # where it is already
    assert not fast.training
    with torch.no_grad():
        fast(torch.randn(1, 3, 16, 16, requires_grad=True))  # nobody asked for a gradient here


def test_fp8_is_for_gpus(tower: pe.VisionTransformer) -> None:
    """Refused before anything is emptied, in every part, and the message says what may be had here."""
    text = pe.TextTransformer(pe.TextConfig(context=8, width=32, depth=1, heads=2, output_width=16, vocab=20)).eval()
    decoder = Decoder(DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, mlp_width=32, vocab=20, tied=True)).eval()
    for model in (tower, text, pe.CLIP(tower, text), decoder):
        with pytest.raises(
            ConfigError, match=r"fp8 is for CUDA devices .* lies on cpu; .* take quantize='int8' or 'int4'"
        ):
            optimize(model, "fp8", keep=False)
        assert all(parameter.numel() for parameter in model.parameters())


def test_a_twin_does_not_compile(tower: pe.VisionTransformer) -> None:
    """nn.Module's own way would reach `forward` alone, and find nothing to fuse. Plain calls compile, one by one."""
    text = pe.TextTransformer(pe.TextConfig(context=8, width=32, depth=1, heads=2, output_width=16, vocab=20)).eval()
    fast = optimize(pe.CLIP(tower, text))
    for twin in (fast, fast.vision, fast.text):
        with pytest.raises(
            ConfigError, match=rf"{type(twin).__name__}.compile\(\) .* torch.compile\(clip.plain.encode"
        ):
            twin.compile()
    assert isinstance(fast, pe.CLIP)
    torch.compiler.reset()
    compiled, pixels = torch.compile(fast.plain.encode_image, backend="eager"), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), fast.encode_image(pixels), rtol=1e-4, atol=1e-5)


def test_a_head_can_be_trained_on_a_twins_features(tower: pe.VisionTransformer) -> None:
    head = torch.nn.Linear(16, 2)
    head(optimize(tower).pooled(torch.randn(1, 3, 16, 16))).sum().backward()
    assert head.weight.grad is not None
