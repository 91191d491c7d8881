"""The fast pixels are Pillow's within the bound that their docstring gives, and say that they are not the same."""

import gc
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import perception_encoder
from perception.borrowing import borrow
from perception.errors import ConfigError, LimitError, MediaError
from perception.media import read_image
from perception.pixels import FastPixels, PixelSpec, load_batch

PHOTOS = sorted((Path(perception_encoder.__file__).parent / "samples" / "photos").iterdir())


def noise(width: int, height: int, kind: str = "noise") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white":
        values = (values > 127).astype(np.uint8) * 255
    return Image.fromarray(values[..., 0] if kind == "grey" else values)


def difference(spec: PixelSpec, image: object, decode: str = "whole") -> torch.Tensor:
    fast = spec.fast(decode).codes(image)  # type: ignore[arg-type]
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    assert fast.shape == (3, spec.size, spec.size)
    return (fast.int() - spec.codes(image).int()).abs()


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.name)
def test_photographs_within_one_code(photo: Path, resize: str) -> None:
    for size in (64, 224, 640):
        off = difference(PixelSpec(size=size, resize=resize), photo)  # type: ignore[arg-type]
        assert (off > 1).float().mean() < 1e-5
        assert off.max() <= 2
        assert off.float().mean() < 0.05


@pytest.mark.parametrize("kind", ["noise", "grey", "black and white"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 501), (501, 17), (333, 221), (2, 2000)], ids=str)
def test_noise_within_one_code_down_and_up(size: tuple[int, int], kind: str) -> None:
    image = noise(*size, kind)
    for side in (1, 7, 64, 300):
        assert difference(PixelSpec(size=side), image).max() <= 1


def test_bicubic_within_two_codes_where_the_passes_are_in_one_order() -> None:
    for width, height, side in [(400, 300, 224), (600, 300, 64), (90, 70, 224)]:
        off = difference(PixelSpec(size=side, interpolation="bicubic"), noise(width, height))
        assert off.max() <= 2
        assert off.float().mean() < 0.05


@pytest.mark.parametrize("file", ["palette.png", "rgba.png", "onebit.png", "cmyk.jpg", "grey16.png"])
def test_other_modes_are_pillows_own(golden: Path, file: str) -> None:
    spec, path = PixelSpec(size=24), golden / "preprocess" / file
    wanted = 1 if file == "grey16.png" else 0  # sixteen bits become eight, which are resized as any grey
    assert difference(spec, path).max() <= wanted


def test_orientation_is_obeyed(golden: Path) -> None:
    file, spec = golden / "preprocess" / "exif_rotated.jpg", PixelSpec(size=32)
    for orient in (True, False):
        off = (spec.fast().codes(file, orient).int() - spec.codes(file, orient).int()).abs()
        assert off.max() <= 1
    assert not torch.equal(spec.fast()(file), spec.fast()(file, orient=False))


@pytest.mark.parametrize("photo", [path for path in PHOTOS if path.suffix == ".jpg"], ids=lambda path: path.name)
def test_a_scaled_jpeg_is_within_the_bound_stated(photo: Path) -> None:
    for size in (64, 224, 448):
        off = difference(PixelSpec(size=size), photo, "scaled")
        assert off.max() <= 51
        assert off.float().mean() <= 1.4


def test_scaled_decoding_leaves_enough_pixels() -> None:
    file = io.BytesIO()
    noise(320, 200).save(file, "JPEG")
    data = file.getvalue()
    sizes = [read_image(data, at_least=side).size for side in (20, 26, 51, 101, 500)]
    assert sizes == [(40, 25), (80, 50), (160, 100), (320, 200), (320, 200)]
    with pytest.raises(LimitError, match="320x200"):  # the limit is for what the file holds
        read_image(data, at_least=20, max_pixels=50_000)
    png = io.BytesIO()
    noise(320, 200).save(png, "PNG")
    assert read_image(png.getvalue(), at_least=20).size == (320, 200)
    assert difference(PixelSpec(size=20), png.getvalue(), "scaled").max() <= 1
    # Where nothing can be saved, nothing differs from "whole".
    spec = PixelSpec(size=150)
    assert torch.equal(spec.fast("scaled").codes(data), spec.fast().codes(data))
    with pytest.raises(MediaError, match="cut short"):
        spec.fast("scaled").codes(data[:2000])


def test_borrowed_pixels() -> None:
    """Pillow's own memory, which outlives the picture; nothing where it would have to be copied."""
    codes = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    picture = Image.fromarray(codes)
    if not hasattr(picture, "__arrow_c_array__"):
        pytest.skip("this Pillow lends nothing")
    lent = borrow(picture)
    assert lent is not None
    del picture
    gc.collect()
    others = [Image.new("RGB", (80, 60), "red") for _ in range(50)]
    assert np.array_equal(lent[..., :3].numpy(), codes)
    assert (
        borrow(others[0].convert("L")) is borrow(others[0].convert("RGBA")) is borrow(Image.new("RGB", (0, 5))) is None
    )
    assert borrow(Image.new("RGB", (3000, 2000))) is None  # several pieces


@pytest.mark.parametrize("size", [32, 300])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_borrowed_pixels_are_resized_alike(size: int, interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 200, 3), np.uint8))
    for resize in ("squash", "crop"):
        fast = PixelSpec(size=size, interpolation=interpolation, resize=resize).fast()  # type: ignore[arg-type]
        borrowed, stretched = fast.codes(picture), fast.stretch(picture, size, size)
        with monkeypatch.context() as patch:
            patch.setattr("perception.pixels.borrow", lambda image: None)
            assert torch.equal(fast.codes(picture), borrowed)
            assert torch.equal(fast.stretch(picture, size, size), stretched)


def test_the_resize_sees_that_channels_are_last() -> None:
    """Only then it works on the bytes as they lie, and so do the bytes that it makes."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    stretched = PixelSpec(size=64).fast().stretch(picture, 96, 64)
    assert stretched.shape == (3, 64, 96)
    assert stretched.stride(0) == 1


def test_normalised_and_batched_as_the_plain_rule() -> None:
    spec = PixelSpec(size=24, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    images = [noise(40, 30), noise(31, 77, "grey")]
    fast = spec.fast()
    batch = fast.batch(images)
    assert torch.equal(batch[1], spec.normalize(fast.codes(images[1])))
    torch.testing.assert_close(batch, spec.batch(images), rtol=0, atol=1.01 / 255 / 0.5)
    assert torch.equal(load_batch(images, fast, workers=2).pixels, batch)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_frames_within_two_codes(interpolation: str) -> None:
    frames = torch.from_numpy(np.stack([np.array(noise(60, 45)), np.array(noise(45, 60)).transpose(1, 0, 2)]))
    frames = frames.permute(0, 3, 1, 2)
    for resize in ("squash", "crop"):
        spec = PixelSpec(size=24, resize=resize, interpolation=interpolation)  # type: ignore[arg-type]
        off = (spec.fast().frames(frames) - spec.frames(frames)).abs() * 127.5
        assert off.max() <= 2.01
        assert off.mean() < 0.2


def test_a_rule_of_its_own_that_survives_being_written_down() -> None:
    spec = PixelSpec(size=24, resize="crop")
    rules = [spec, spec.fast(), spec.fast("scaled")]
    assert len({rule.fingerprint() for rule in rules}) == 3
    for rule in rules[1:]:
        again = PixelSpec.from_dict(json.loads(json.dumps(rule.to_dict())))
        assert again == rule
        assert type(again) is FastPixels
        assert rule.plain == spec
        assert rule.plain.fast(rule.decode) == rule
    assert spec.fast() != spec
    assert replace(spec.fast("scaled"), size=48) == PixelSpec(size=48, resize="crop").fast("scaled")
    with pytest.raises(ConfigError, match="decode is 'half'"):
        spec.fast("half")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="decode"):
        PixelSpec.from_dict({**spec.to_dict(), "decode": "half"})


def test_a_strip_too_long_to_resize_whole_is_cropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, strip = PixelSpec(size=16, resize="crop"), noise(6, 400)
    monkeypatch.setattr("perception.pixels.MAX_PIXELS", 4000)
    assert torch.equal(spec.fast().codes(strip), spec.codes(strip))


def test_a_model_takes_it_as_its_preprocess(tmp_path: Path) -> None:
    clip = perception_encoder.load_clip("PE-Core-nano")
    clip.preprocess = clip.preprocess.fast()
    plain = perception_encoder.load_clip("PE-Core-nano")
    fast, wanted = (model.encode_image(model.preprocess(PHOTOS[0])[None], normalize=True) for model in (clip, plain))
    assert (fast * wanted).sum() > 0.9995
    perception_encoder.save(clip, tmp_path / "model")
    assert perception_encoder.load_clip(str(tmp_path / "model")).preprocess == clip.preprocess
