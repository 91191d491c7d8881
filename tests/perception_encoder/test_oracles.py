"""timm and open_clip, run live on the same perturbed random weights: tiny, small and base towers at native size.

They are the reference at native resolution only (they stretch positions and rotary angles in another way elsewhere).
"""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_models import relative
from PIL import Image
from safetensors.torch import save_file

import perception_encoder as pe
from perception.errors import ConfigError, MissingExtra
from perception_encoder.interop import OpenClip, OpenClipEncoder, TimmEncoder, load_open_clip, load_timm

TIMM = {
    "vit_pe_core_tiny_patch16_384": "PE-Core-T16-384",
    "vit_pe_core_small_patch16_384": "PE-Core-S16-384",
    "vit_pe_core_base_patch16_224": "PE-Core-B16-224",
    "vit_pe_spatial_tiny_patch16_512": "PE-Spatial-T16-512",
}


def oracle(name: str) -> ModuleType:
    try:
        return __import__(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    return oracle("timm")


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    return oracle("open_clip")


@torch.no_grad()
def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights with nothing at its default, so that no tensor can stand in for another. No bias on the head."""
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        parameter += (0.3 if parameter.ndim == 1 else 0.02) * noise
        if name.endswith("head.bias"):
            parameter.zero_()
    return model.eval()


@pytest.mark.parametrize(("theirs", "ours"), TIMM.items())
@torch.inference_mode()
def test_equals_timm(timm: ModuleType, tmp_path: Path, theirs: str, ours: str) -> None:
    entry_config = pe.zoo.MODELS.get(ours).config
    config = getattr(entry_config, "vision", entry_config)
    settings = {"num_classes": config.output_width} if config.output_width else {}
    model = perturb(timm.create_model(theirs, **settings))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    tower = pe.load_encoder(tmp_path / "timm.safetensors", config=config, device="cpu")
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    layers = [0, config.depth // 2, config.depth - 1]
    for got, (grid, prefix) in zip(
        tower.intermediates(pixels, layers),
        model.forward_intermediates(pixels, indices=layers, return_prefix_tokens=True, intermediates_only=True),
        strict=True,
    ):
        assert relative(got.patches, grid.permute(0, 2, 3, 1)) < 1e-5
        assert relative(got.prefix, prefix) < 1e-5
    if config.pool:
        assert relative(tower.pooled(pixels), model(pixels)) < 1e-5


@pytest.mark.parametrize("name", ["PE-Core-T-16-384", "PE-Core-B-16"])
@torch.inference_mode()
def test_equals_open_clip(open_clip: ModuleType, tmp_path: Path, name: str) -> None:
    model = perturb(open_clip.create_model(name))
    save_file(model.state_dict(), tmp_path / "open_clip.safetensors")
    ours = {"PE-Core-T-16-384": "PE-Core-T16-384", "PE-Core-B-16": "PE-Core-B16-224"}[name]
    clip = pe.load_clip(tmp_path / "open_clip.safetensors", config=pe.zoo.MODELS.get(ours).config, device="cpu")
    size = clip.vision.config.image_size
    pixels, tokens = torch.randn(1, 3, size, size), clip.tokenize(["a cat", "two dogs on a red car"])
    assert torch.equal(tokens, open_clip.get_tokenizer(name)(["a cat", "two dogs on a red car"]))
    image, text, scale = clip(pixels, tokens)
    assert relative(image, model.encode_image(pixels, normalize=True)) < 1e-5
    assert relative(text, model.encode_text(tokens, normalize=True)) < 1e-5
    assert float(scale) == pytest.approx(float(model.logit_scale.exp()))


@torch.inference_mode()
def test_any_timm_vit_is_an_encoder(timm: ModuleType, tmp_path: Path) -> None:
    tower = load_timm("vit_tiny_patch16_224", pretrained=False, device="cpu")
    assert isinstance(tower, TimmEncoder)
    assert isinstance(tower, pe.VisionEncoder)
    assert (tower.width, tower.patch_size, tower.training) == (192, 16, False)
    assert tower.preprocess.size == 224
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.png")
    pixels = tower.preprocess(tmp_path / "a.png")
    config = timm.data.resolve_model_data_config(tower.model)
    theirs = timm.data.create_transform(**config, is_training=False)
    torch.testing.assert_close(pixels, theirs(Image.open(tmp_path / "a.png")))
    first, last = pe.features(tower, tmp_path / "a.png", [0, -1])
    assert last.patches.shape == (1, 14, 14, 192)
    assert last.prefix.shape == (1, 1, 192)
    normed = tower.intermediates(pixels[None], [-1], norm=True)[0]
    torch.testing.assert_close(normed.tokens(), tower.model.forward_features(pixels[None]))
    assert (first.patches - last.patches).abs().max() > 1e-3
    assert pe.embed(tower, [tmp_path / "a.png"]).shape == (1, 192)
    assert pe.pca_image(tower, tmp_path / "a.png").size == (224, 224)
    with pytest.raises(ConfigError, match="no layers"):
        tower.intermediates(pixels[None], [12])
    with pytest.raises(ConfigError, match="not a vision transformer"):
        load_timm("resnet10t", pretrained=False)
    with pytest.raises(ConfigError, match="timm knows no model 'vit_gargantuan'"):
        load_timm("vit_gargantuan", pretrained=False)


@pytest.mark.parametrize("name", ["ViT-B-32", "PE-Core-T-16-384"])
@torch.inference_mode()
def test_any_open_clip_tower_is_an_encoder(open_clip: ModuleType, name: str) -> None:
    tower = load_open_clip(name, pretrained=False, device="cpu")
    assert isinstance(tower, OpenClipEncoder)
    assert isinstance(tower, pe.VisionEncoder)
    size = {"ViT-B-32": 224, "PE-Core-T-16-384": 384}[name]
    pixels = torch.randn(1, 3, size, size)
    side = size // tower.patch_size
    first, last = tower.intermediates(pixels, [0, -1])
    assert last.patches.shape == (1, side, side, tower.width)
    assert last.prefix.shape == (1, 1, tower.width)
    assert (first.patches - last.patches).abs().max() > 1e-3
    torch.testing.assert_close(tower.pooled(pixels), tower.visual(pixels))
    with pytest.raises(ConfigError, match=f"open_clip/{name} needs a tag"):
        load_open_clip(name)


@torch.inference_mode()
def test_open_clip_pair_in_our_classifier(open_clip: ModuleType) -> None:
    from perception_encoder.interop import load_open_clip_pair

    clip = load_open_clip_pair("ViT-B-32", pretrained=False, device="cpu")
    assert isinstance(clip, OpenClip)
    picture = Image.new("RGB", (50, 40), "red")
    row = pe.ZeroShotClassifier(clip, ["a", "b"], "{}").predict(picture)[0]
    assert {p.label for p in row} == {"a", "b"}
    assert pe.embed(clip, [picture, picture]).shape == (2, 512)


@torch.inference_mode()
def test_names_of_foreign_folders(timm: ModuleType, open_clip: ModuleType, tmp_path: Path) -> None:
    """`timm/local-dir:...` and `open_clip/local-dir:...` load weights, with the preprocessing that lies beside them."""
    config = pe.ClipConfig(
        vision=pe.zoo.MODELS.get("PE-Core-T16-384").vision,
        text=pe.TextConfig(context=32, width=64, depth=1, heads=2, output_width=512),
    )
    torch.manual_seed(0)
    clip = perturb(pe.CLIP(pe.VisionTransformer(config.vision), pe.TextTransformer(config.text)))
    pe.zoo.export(clip, tmp_path / "pair", "open_clip")
    pe.zoo.export(clip.vision, tmp_path / "tower", "timm")
    pixels, tokens = torch.randn(1, 3, 384, 384), clip.tokenize(["a cat"])
    pair = pe.load_clip(f"open_clip/local-dir:{tmp_path / 'pair'}", device="cpu")
    assert relative(pair.encode_text(tokens), clip.encode_text(tokens)) < 1e-5
    for name in (f"open_clip/local-dir:{tmp_path / 'pair'}", f"timm/local-dir:{tmp_path / 'tower'}"):
        tower = pe.load_encoder(name, device="cpu")
        assert relative(tower(pixels).patches, clip.vision(pixels).patches) < 1e-5
        red = Image.new("RGB", (90, 70), (250, 20, 20))
        torch.testing.assert_close(tower.preprocess(red), clip.preprocess(red))


def test_untrained_architectures(timm: ModuleType) -> None:
    tower = pe.load_encoder("timm/vit_tiny_patch16_224", pretrained=False, device="cpu")
    assert isinstance(tower, TimmEncoder)
    ours = pe.load_encoder("PE-Spatial-T16-512", pretrained=False, device="cpu")
    assert ours.config == pe.zoo.MODELS.get("PE-Spatial-T16-512").vision
    assert not ours.training
    with pytest.raises(ConfigError, match="PE-Spatial-T16-512 has no text tower"):
        pe.load_clip("PE-Spatial-T16-512", pretrained=False)


def test_f02_torchvision_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm and open_clip then raise RuntimeError at import; ours says what to install."""
    import importlib

    def broken(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    for load in (lambda: load_timm("vit_tiny_patch16_224"), lambda: load_open_clip("ViT-B-32:openai")):
        with pytest.raises(
            MissingExtra, match=r"torchvision release that matches torch.*pip install 'perception-vision"
        ):
            load()
