"""Pixels are the published ones, code for code, and their rule survives being written down."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from perception.errors import ConfigError, LimitError, MediaError
from perception.pixels import PixelSpec, load_batch, normalize

RESIZE = {"squash": "squash", "center_crop": "crop"}
FILES = (
    *("cmyk.jpg", "exif_rotated.jpg", "gradient.png", "grey_l.png", "onebit.png"),
    *("palette.png", "rgb_nonsquare.png", "rgba.png", "tiny_upscale.png"),
)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("kind", RESIZE)
@pytest.mark.parametrize("file", FILES)
def test_published_codes(golden: Path, file: str, kind: str) -> None:
    wanted = load_file(golden / "preprocess" / "expected.safetensors")[f"{file}:{kind}"]
    spec = PixelSpec(size=32, resize=RESIZE[kind])  # type: ignore[arg-type]
    codes = spec.codes(golden / "preprocess" / file, orient=False)
    # JPEG decoders differ by a code or two from build to build; everything after them does not.
    torch.testing.assert_close(codes.int(), wanted.int(), rtol=0, atol=2 if file.endswith(".jpg") else 0)


@pytest.mark.parametrize("file", ["gradient.png", "rgba.png", "palette.png"])
def test_published_floats(golden: Path, file: str) -> None:
    codes = load_file(golden / "preprocess" / "expected.safetensors")[f"{file}:squash"]
    pixels = PixelSpec(size=32)(golden / "preprocess" / file, orient=False)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, (codes.float() / 255 - 0.5) / 0.5)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(golden: Path) -> None:
    file = golden / "preprocess" / "grey16.png"
    with Image.open(file) as image:
        eight = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    assert torch.equal(PixelSpec(size=32).codes(file), PixelSpec(size=32).codes(eight))
    published = load_file(golden / "preprocess" / "expected.safetensors")["grey16.png:squash"]
    assert published.float().mean() > 250  # what clipping makes of the same picture
    assert PixelSpec(size=32).codes(file).float().mean() < 200


def test_exif_orientation_is_applied_unless_told_otherwise(golden: Path) -> None:
    file, spec = golden / "preprocess" / "exif_rotated.jpg", PixelSpec(size=32)
    with Image.open(file) as image:
        assert image.getexif()[0x0112] != 1
    assert not torch.equal(spec(file), spec(file, orient=False))


def test_mean_and_std_are_per_channel() -> None:
    codes = torch.full((3, 2, 2), 51, dtype=torch.uint8)
    wanted = (0.2 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 1.0, 2.0])
    spec = PixelSpec(size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    torch.testing.assert_close(spec.normalize(codes), wanted[:, None, None].expand(3, 2, 2))
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("size", [(6, 400), (400, 6), (30, 900)])
def test_the_crop_of_a_long_strip_needs_no_long_picture(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Of low contrast, because Pillow clips between its two passes.
    strip = picture(*size).point(lambda value: 64 + value // 2)
    spec = PixelSpec(size=16, resize="crop", interpolation="bicubic")
    whole = spec.codes(strip)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr("perception.pixels.MAX_PIXELS", 4000)
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: (sizes.append(a[1]), resize(*a, **k))[1])
    torch.testing.assert_close(spec.codes(strip).int(), whole.int(), rtol=0, atol=1)
    assert sizes == [(16, 16)]


@pytest.mark.parametrize("boxes", [False, True])
def test_published_video_frames(golden: Path, boxes: bool) -> None:
    tensors = load_file(golden / "video" / "frames.safetensors")
    frames = tensors["frames_with_boxes" if boxes else "frames"]
    wanted = tensors["transformed_32_with_boxes_codes" if boxes else "transformed_32_codes"]
    pixels = PixelSpec(size=32, interpolation="bicubic").frames(frames)
    difference = ((pixels * 0.5 + 0.5) * 255 - wanted).abs()
    assert difference.max() < 1.01
    assert difference.mean() < 0.05  # codes are rounded, not cut off


def test_frames_are_whole_codes_close_to_those_of_pictures() -> None:
    image = picture(90, 50)
    frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for resize in ("squash", "crop"):
        spec = PixelSpec(size=24, resize=resize)  # type: ignore[arg-type]
        codes = (spec.frames(frames)[0] * 0.5 + 0.5) * 255
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        torch.testing.assert_close(codes, spec.codes(image).float(), rtol=0, atol=1.01)


def test_many_frames_are_resized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8)
    spec = PixelSpec(size=8)
    whole = spec.frames(frames)
    monkeypatch.setattr("perception.pixels._CHUNK", 2 * frames[0].numel())
    parts = []
    inner = PixelSpec._resized_frames
    monkeypatch.setattr(
        PixelSpec, "_resized_frames", lambda self, part: (parts.append(len(part)), inner(self, part))[1]
    )
    assert torch.equal(spec.frames(frames), whole)
    assert parts == [2, 2, 1]
    assert spec.frames(frames[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)],
    ids=["float", "one frame", "channels last"],
)
def test_what_are_no_frames(frames: torch.Tensor) -> None:
    with pytest.raises(MediaError, match="expected N 3 H W uint8"):
        PixelSpec(size=4).frames(frames)


@given(
    st.builds(
        PixelSpec,
        size=st.integers(1, 16384),
        resize=st.sampled_from(["squash", "crop"]),
        interpolation=st.sampled_from(["bilinear", "bicubic"]),
        mean=st.tuples(*[st.floats(-1, 1)] * 3),
        std=st.tuples(*[st.floats(0.01, 2)] * 3),
    )
)
def test_there_and_back(spec: PixelSpec) -> None:
    again = PixelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()


def test_fingerprints_tell_rules_apart() -> None:
    specs = [
        PixelSpec(size=224),
        PixelSpec(size=225),
        PixelSpec(size=224, resize="crop"),
        PixelSpec(size=224, interpolation="bicubic"),
        PixelSpec(size=224, mean=(0.5, 0.5, 0.4)),
        PixelSpec(size=224, std=(0.5, 0.5, 0.4)),
    ]
    assert len({spec.fingerprint() for spec in specs}) == len(specs)
    # Written into files of embeddings: a change here is a change of format.
    assert specs[0].to_dict() == {
        "version": 1,
        "size": 224,
        "resize": "squash",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; expected 1"),  # F-26
        ({"version": None}, "version None"),
        ({"size": "224"}, "size"),
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size"),
        ({"resize": "pad"}, "resize"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0.0]}, "std"),
        ({"std": [0.5, 0.5, float("nan")]}, "std"),
        ({"colour": "bgr"}, "unknown keys"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PixelSpec.from_dict({**PixelSpec(size=224).to_dict(), **change})


@pytest.mark.parametrize("key", ["version", "size", "resize", "interpolation", "mean", "std"])
def test_nothing_is_assumed(key: str) -> None:
    data = PixelSpec(size=224).to_dict()
    del data[key]
    with pytest.raises(ConfigError, match=key):
        PixelSpec.from_dict(data)
    with pytest.raises(ConfigError, match="expected a table"):
        PixelSpec.from_dict([1])


def test_one_bad_picture_among_64(caplog: pytest.LogCaptureFixture) -> None:  # F-52
    spec = PixelSpec(size=8)
    images: list[object] = [picture(seed=i) for i in range(64)]
    wanted = torch.stack([spec(image) for i, image in enumerate(images) if i != 17])
    images[17] = b"<html>not found</html>"

    with pytest.raises(MediaError, match=r"picture 17: .*an HTML page"):
        spec.batch(images)
    for workers in (1, 4):
        skipped = load_batch(images, spec, on_error="skip", workers=workers)
        assert torch.equal(skipped.pixels, wanted)
        assert skipped.indices == tuple(i for i in range(64) if i != 17)
        assert [index for index, _ in skipped.errors] == [17]
        assert "an HTML page" in str(skipped.errors[0][1])
    assert not caplog.records
    load_batch(images, spec, on_error="log", workers=2)
    assert "left out picture 17" in caplog.text


def test_batches_at_the_edges() -> None:
    spec = PixelSpec(size=8)
    assert spec.batch([]).shape == (0, 3, 8, 8)
    assert load_batch([b"", b""], spec, on_error="skip").pixels.shape == (0, 3, 8, 8)
    assert torch.equal(spec.batch(picture(seed=i) for i in range(3))[2], spec(picture(seed=2)))
    with pytest.raises(ConfigError, match="on_error"):
        load_batch([], spec, on_error="ignore")
    with pytest.raises(ConfigError, match="workers"):
        load_batch([], spec, workers=0)
    with pytest.raises(LimitError, match="picture 0: "):
        spec.batch([Image.new("1", (10000, 10000))])


def test_exif_is_passed_on_in_batches(golden: Path) -> None:
    file, spec = golden / "preprocess" / "exif_rotated.jpg", PixelSpec(size=16)
    assert torch.equal(spec.batch([file], orient=False)[0], spec(file, orient=False))
