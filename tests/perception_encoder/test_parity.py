"""Same weights, same pixels, same numbers as the reference: float32, every token, native and other sizes.

The weights are random and perturbed and go through the conversion tables, so one test proves table and model together.
"""

from pathlib import Path

import pytest
import torch
from golden_models import SIZES, TOWERS, clip_config, load_tower, relative, tower_io
from safetensors.torch import load_file

import perception_encoder as pe
from perception.attention import KERNELS, attention_kernel
from perception.errors import ConfigError

TOLERANCE = 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TOWERS)
@torch.inference_mode()
def test_tower(golden: Path, name: str, size: str, kernel: str) -> None:
    tower, io = load_tower(golden, name), tower_io(golden, name)
    pixels, depth = io[f"{size}.input"], tower.config.depth
    with attention_kernel(kernel):
        layers = tower.intermediates(pixels, list(range(depth)))
        for index, features in enumerate(layers):
            assert relative(features.tokens(), io[f"{size}.layer{index}"]) < TOLERANCE, f"layer {index}"
        last = tower(pixels)
        assert relative(last.tokens(), io[f"{size}.layer{depth - 1}"]) < TOLERANCE
        h, w = pixels.shape[2] // tower.patch_size, pixels.shape[3] // tower.patch_size
        assert last.patches.shape[1:3] == (h, w)
        assert last.prefix.shape[1] == int(tower.config.class_token)
        if tower.config.norm_post:
            normed = tower.intermediates(pixels, [-1], norm=True)[0]
            assert relative(normed.tokens(), io[f"{size}.normed"]) < TOLERANCE
        if tower.config.pool:
            assert relative(tower.pooled(pixels), io[f"{size}.forward"]) < TOLERANCE


@pytest.mark.parametrize("name", ["core_cls", "core_nocls_hd24"])
def test_ragged_size_is_refused_by_name(golden: Path, name: str) -> None:
    """The reference drops the right and bottom remainder without a word (F-51)."""
    tower, io = load_tower(golden, name), tower_io(golden, name)
    pixels = io["ragged.input"]
    with pytest.raises(ConfigError, match=r"do not divide into patches of \d; the nearest good size is"):
        tower(pixels)
    h, w = (side // tower.patch_size * tower.patch_size for side in pixels.shape[2:])
    with torch.inference_mode():
        assert relative(tower.pooled(pixels[:, :, :h, :w]), io["ragged.forward"]) < TOLERANCE


LAYOUTS = ["clip.pt", "clip_open_clip.safetensors"]


@pytest.mark.parametrize("file", LAYOUTS)
@torch.inference_mode()
def test_clip(golden: Path, file: str) -> None:
    clip = pe.load_clip(golden / "clip" / file, config=clip_config(golden), device="cpu")
    io = load_file(golden / "clip" / "io.safetensors")
    pixels, tokens = io["input.pixels"], io["input.token_ids"]
    assert relative(clip.encode_image(pixels), io["output.image_features"]) < TOLERANCE
    assert relative(clip.encode_text(tokens), io["output.text_features"]) < TOLERANCE
    assert relative(clip.encode_text(io["input.token_ids_garbage_after_eot"]), io["output.text_features"]) < TOLERANCE

    image, text, scale = clip(pixels, tokens)
    assert relative(image, io["output.image_features_normalized"]) < TOLERANCE
    assert relative(text, io["output.text_features_normalized"]) < TOLERANCE
    torch.testing.assert_close(scale, io["output.logit_scale_exp"])
    logits = scale * image @ text.T
    torch.testing.assert_close(logits, io["output.logits_per_image"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits.softmax(-1), io["output.image_to_text_probs"], rtol=1e-4, atol=1e-5)
    assert clip(pixels)[1] is None
    assert clip(tokens=tokens)[0] is None


@torch.inference_mode()
def test_clip_video_protocols(golden: Path) -> None:
    clip = pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu")
    io = load_file(golden / "clip" / "io.safetensors")
    video, raw, unit = (
        io[f"{k}"]
        for k in ("input.video", "output.video_features_normalize_false", "output.video_features_normalize_true")
    )
    assert relative(clip.encode_video(video), raw) < TOLERANCE
    assert relative(clip.encode_video(video, protocol="raw-mean"), raw) < TOLERANCE
    assert relative(clip.encode_video(video, protocol="unit-mean"), unit) < TOLERANCE
    ones = torch.ones(len(video))
    for protocol, direction in {"raw-mean": raw, "unit-mean": unit, None: unit}.items():
        got = clip.encode_video(video, normalize=True, protocol=protocol)
        torch.testing.assert_close(got.norm(dim=-1), ones)
        assert relative(got, torch.nn.functional.normalize(direction, dim=-1)) < TOLERANCE
    with pytest.raises(ConfigError, match="no video protocol 'median'"):
        clip.encode_video(video, protocol="median")
    with pytest.raises(ConfigError, match="at least one frame"):
        clip.encode_video(video[:, :0])


@torch.inference_mode()
def test_timm_file_loads_as_a_tower(golden: Path) -> None:
    tower = pe.load_encoder(
        golden / "clip" / "clip_timm_vision.safetensors", config=clip_config(golden).vision, device="cpu"
    )
    io = load_file(golden / "clip" / "io.safetensors")
    assert relative(tower.pooled(io["input.pixels"]), io["output.image_features"]) < TOLERANCE


@torch.inference_mode()
def test_wrapped_pickle(golden: Path) -> None:
    """`{"state_dict": {"module.visual.<key>": bfloat16}}`, as a training loop leaves it."""
    from golden_models import tower_config

    config = tower_config(golden, "spatial_cls_nols")
    tower = pe.load_encoder(golden / "pe" / "spatial_cls_nols.wrapped.pt", config=config, device="cpu")
    io = tower_io(golden, "spatial_cls_nols")
    assert relative(tower(io["native.input"]).tokens(), io["native.layer2"]) < 2e-2  # the file is in bfloat16
