"""Pictures nobody vouches for: each is read, or refused in one clear sentence."""

import io
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from perception.errors import LimitError, MediaError
from perception.media import flatten, grey_codes, iter_images, read_image, sniff, to_rgb
from perception.pixels import PixelSpec


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit grey with these chunks after its header."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")


@pytest.fixture
def decoding_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        pytest.fail("the picture was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


SHAM = {  # what people really find at the end of a path that says .jpg
    "an empty file": b"",
    "plain text": "déjà vu, not a picture\n".encode(),
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an SVG drawing": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9"/>',
    "an XML document": b'<?xml version="1.0"?><note/>',
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "a PDF document": b"%PDF-1.7\n\0",
    "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a ZIP archive": b"PK\3\4" + bytes(40),
    "an MP4 or QuickTime video": b"\0\0\0\x18ftypisom" + bytes(40),
    "unknown binary data": bytes(range(200, 256)) * 3,
}


@pytest.mark.parametrize("kind", SHAM)
@pytest.mark.parametrize("form", ["path", "bytes", "file"])
def test_what_is_no_picture_is_named(kind: str, form: str, tmp_path: Path) -> None:  # F-40
    path = tmp_path / "cat.jpg"
    path.write_bytes(SHAM[kind])
    source: object = {"path": path, "bytes": SHAM[kind], "file": io.BytesIO(SHAM[kind])}[form]
    with pytest.raises(MediaError, match=f"it holds {kind}") as caught:
        read_image(source)
    if form == "path":
        assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_every_way_of_handing_over_a_picture(kind: str, tmp_path: Path) -> None:
    data = saved(noise(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "picture"  # the name says nothing, and does not have to
    path.write_bytes(data)
    wanted = np.array(to_rgb(read_image(data)))
    assert wanted.shape == (30, 40, 3)
    if kind not in ("JPEG", "GIF"):
        assert np.array_equal(wanted, np.array(noise()))
    with path.open("rb") as file:
        file.seek(7)
        for source in (path, str(path), bytearray(data), memoryview(data), io.BytesIO(data), file, Pipe(data)):
            assert np.array_equal(np.array(to_rgb(read_image(source))), wanted)
        assert not file.closed
    assert sniff(data[:4096]).endswith("picture")


class Pipe:
    """A stream that cannot go back."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return self._data.read(size)


def test_streams_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perception.media.MAX_STREAM_BYTES", 1000)
    with pytest.raises(LimitError, match="MAX_STREAM_BYTES"):
        read_image(Pipe(bytes(5000)))
    with pytest.raises(MediaError, match="opened in binary mode"):
        read_image(TextPipe())


class TextPipe:
    def read(self, size: int = -1) -> str:
        return "text"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_in_half(progressive: bool, tmp_path: Path) -> None:  # F-41
    data = saved(noise(64, 64).resize((256, 256)), "JPEG", progressive=progressive)
    half = tmp_path / "half.jpg"
    half.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"half.jpg': the JPEG of 256x256 is damaged or cut short"):
        read_image(half)
    partial = np.array(read_image(half, allow_truncated=True)).astype(int)
    whole = np.array(read_image(data)).astype(int)
    assert partial.shape == whole.shape
    if not progressive:
        assert np.array_equal(partial[:80], whole[:80])
        assert partial[200:].std() < 1
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_other_pictures_cut_in_half(kind: str) -> None:
    data = saved(noise(), kind)
    for allowed in (False, True):
        with pytest.raises(MediaError):
            read_image(data[: len(data) // 2], allow_truncated=allowed)


@pytest.mark.usefixtures("decoding_fails_the_test")
@pytest.mark.parametrize("side", [60000, 12650, 7100])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:  # F-42, F-43
    bomb = png(side, side, (b"IDAT", zlib.compress(bytes(2000))))
    assert len(bomb) < 1000
    with pytest.raises(LimitError, match=r"max_pixels=50000000|decompression bomb"):
        read_image(bomb)
    with pytest.raises(LimitError):
        read_image(bomb, allow_truncated=True)


def test_the_limit_is_a_setting() -> None:
    assert read_image(noise(10, 10), max_pixels=100).size == (10, 10)
    for source in (noise(10, 11), saved(noise(10, 11)), np.zeros((11, 10, 3), np.uint8)):
        with pytest.raises(LimitError, match="10x11, 110 pixels; the limit is max_pixels=100"):
            read_image(source, max_pixels=100)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_text_chunk_that_unpacks_to_much(place: str) -> None:  # F-44
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000)))
    pixels = (b"IDAT", zlib.compress(bytes(9 * 8)))
    with pytest.raises(MediaError, match="too large"):
        read_image(png(8, 8, *((text, pixels) if place == "before" else (pixels, text))))


def palette(transparency: object = None) -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


MODES = {
    "L": (Image.new("L", (4, 4), 100), (100, 100, 100)),
    "LA": (Image.new("LA", (4, 4), (100, 7)), (100, 100, 100)),
    "1": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "P": (palette(), (10, 20, 30)),
    "P with one clear colour": (palette(1), (10, 20, 30)),
    "P with clear colours": (palette(b"\xff\x40"), (10, 20, 30)),
    "RGBA": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (10, 20, 30)),
    "CMYK": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    "YCbCr": (Image.new("YCbCr", (4, 4), (100, 128, 128)), (100, 100, 100)),
    "I up to 255": (Image.new("I", (4, 4), 200), (200, 200, 200)),
    "I up to 65535": (Image.new("I", (4, 4), 200 * 257), (200, 200, 200)),
    "I;16": (Image.fromarray(np.full((4, 4), 77 * 257, np.uint16)), (77, 77, 77)),  # F-46
    "I;16 rounds": (Image.fromarray(np.full((4, 4), 129, np.uint16)), (1, 1, 1)),
    "F up to 1": (Image.new("F", (4, 4), 0.2), (51, 51, 51)),
    "F up to 255": (Image.new("F", (4, 4), 51.4), (51, 51, 51)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:  # F-45
    image, colour = MODES[mode]
    assert to_rgb(read_image(image)).getcolors() == [(16, colour)]
    codes = PixelSpec(size=4).codes(image)
    assert codes.shape == (3, 4, 4)
    if mode != "RGBA":  # resized with its alpha, which leaves nothing of a clear colour
        assert [int(channel[0, 0]) for channel in codes] == list(colour)


def test_modes_that_survive_a_file(tmp_path: Path) -> None:
    for mode in ("L", "LA", "1", "P with clear colours", "RGBA", "I;16"):
        image, colour = MODES[mode]
        image.save(tmp_path / "picture.png")
        assert to_rgb(read_image(tmp_path / "picture.png")).getcolors() == [(16, colour)]
    for mode in ("CMYK", "F up to 1", "I up to 65535"):
        image, colour = MODES[mode]
        image.save(tmp_path / "picture.tiff")
        assert to_rgb(read_image(tmp_path / "picture.tiff")).getcolors() == [(16, colour)]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_to_eight_is_exact_and_needs_no_floats(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value there is; in floats a large picture took three arrays of eight bytes a pixel."""
    every = np.arange(65536, dtype=np.uint32)
    mode = "I;16B" if order == ">u2" else "I;16"
    image = Image.frombytes(mode, (256, 256), every.astype(order).tobytes())

    def no_floats(*_: object, **__: object) -> None:
        raise AssertionError("rounded in floats")

    monkeypatch.setattr(np, "rint", no_floats)
    codes = grey_codes(image)
    assert codes.mode == "L"
    assert np.asarray(codes).ravel().tolist() == [round(v / 257) for v in every.tolist()]


@pytest.mark.parametrize("values", [np.arange(65536, dtype=np.int32), np.linspace(0, 1, 65536, dtype=np.float32)])
def test_grey_in_place_leaves_the_picture_as_it_was(values: np.ndarray) -> None:
    image = Image.fromarray(values.reshape(256, 256))
    expected = np.rint(values.astype(np.float64) * (255 / values.max()))
    assert (np.asarray(grey_codes(image)).ravel() == expected).all()
    assert (np.asarray(image).ravel() == values).all()


@pytest.mark.parametrize("values", [np.float32([[np.nan, 0]]), np.float32([[-1, 0]]), np.float32([[0, 1000]])])
def test_grey_values_that_mean_nothing(values: np.ndarray) -> None:
    with pytest.raises(MediaError, match=r"scale them to 0\.\.255"):
        read_image(Image.fromarray(values))
    with pytest.raises(MediaError, match="values -5 to 0"):
        read_image(Image.fromarray(np.int32([[-5, 0]])))


def test_a_colour_space_without_a_way_to_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(self: object, mode: str) -> Image.Image:
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(MediaError, match="mode LAB cannot be made RGB: conversion not supported"):
        to_rgb(read_image(Image.new("LAB", (4, 4))))


def test_alpha_over_a_colour() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert flatten(clear).getcolors() == [(16, (255, 255, 255))]
    assert flatten(clear, (1, 2, 3)).getcolors() == [(16, (1, 2, 3))]
    assert flatten(palette(b"\xff\x00")).getcolors() == [(16, (255, 255, 255))]


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_every_orientation(turn: int, kind: str) -> None:  # F-47
    exif = Image.Exif()
    exif[0x0112] = turn
    data = saved(noise(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    assert np.array_equal(np.array(to_rgb(read_image(data))), np.array(to_rgb(upright)))
    assert read_image(data).size == ((30, 40) if turn >= 5 else (40, 30))
    assert np.array_equal(np.array(to_rgb(read_image(data, orient=False))), np.array(noise()))
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.array(read_image(image)), np.array(upright))


def test_a_picture_that_was_turned_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    once = read_image(saved(noise(), "PNG", exif=exif))
    assert np.array_equal(np.array(read_image(once)), np.array(once))
    assert once.size == (30, 40)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = saved(noise(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert np.array_equal(np.array(read_image(data)), np.array(noise()))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_picture_of_many(kind: str) -> None:  # F-48
    pages = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = saved(
        pages[0], kind, save_all=True, append_images=pages[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    image = read_image(data)
    assert to_rgb(image).getcolors() == [(64, (255, 0, 0))]
    assert not getattr(image, "is_animated", False)  # the other pictures went with the file
    assert PixelSpec(size=4).codes(image)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_extreme_sizes(size: tuple[int, int], resize: str) -> None:  # F-49
    codes = PixelSpec(size=224, resize=resize).codes(Image.new("RGB", size, (9, 8, 7)))  # type: ignore[arg-type]
    assert codes.shape == (3, 224, 224)
    assert codes.flatten(1).unique(dim=1).tolist() == [[9], [8], [7]]


ARRAYS = {  # F-50: what each becomes, as width, height, mode
    "H W": (np.zeros((5, 7), np.uint8), (7, 5, "L")),
    "H W 1": (np.zeros((5, 7, 1), np.uint8), (7, 5, "L")),
    "H W 3": (np.zeros((5, 7, 3), np.uint8), (7, 5, "RGB")),
    "H W 4": (np.zeros((5, 7, 4), np.uint8), (7, 5, "RGBA")),
    "3 H W": (np.zeros((3, 5, 7), np.uint8), (7, 5, "RGB")),
    "tensor 3 H W": (torch.zeros(3, 5, 7, dtype=torch.uint8), (7, 5, "RGB")),
    "tensor H W 3": (torch.zeros(5, 7, 3, dtype=torch.uint8), (7, 5, "RGB")),
    "tensor 1 H W": (torch.zeros(1, 5, 7, dtype=torch.uint8), (7, 5, "L")),
    "array 3 W 4, both could be channels": (np.zeros((3, 7, 4), np.uint8), (7, 3, "RGBA")),
    "tensor 3 W 4, both could be channels": (torch.zeros(3, 7, 4, dtype=torch.uint8), (4, 7, "RGB")),
    "not contiguous": (np.zeros((10, 14, 3), np.uint8)[::-2, ::2], (7, 5, "RGB")),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str) -> None:
    array, (width, height, mode) = ARRAYS[name]
    image = read_image(array)
    assert (image.width, image.height, image.mode) == (width, height, mode)


def test_arrays_are_the_pictures_they_came_from() -> None:
    image, spec = noise(), PixelSpec(size=16)
    last = np.array(image)
    first = torch.from_numpy(last).permute(2, 0, 1)
    for array in (last, last.transpose(2, 0, 1), first, first.contiguous(), torch.from_numpy(last)):
        assert torch.equal(spec(array), spec(image))


BAD_ARRAYS = {
    "no pixels": (np.zeros((0, 5, 3), np.uint8), "has no pixels: 5x0"),
    "no pixels, tensor": (torch.zeros(3, 5, 0, dtype=torch.uint8), "has no pixels: 0x5"),
    "NaN": (np.full((5, 5, 3), np.nan), r"expected uint8, 0 to 255; for values 0\.\.1 give"),
    "float": (torch.rand(3, 5, 5), r"Tensor \(3, 5, 5\) of float32 is no picture"),
    "float above 1": (np.full((5, 5, 3), 300.0, np.float32), "expected uint8"),
    "int64": (torch.zeros(3, 5, 5, dtype=torch.int64), "int64 is no picture; expected uint8"),
    "uint16": (np.zeros((5, 5), np.uint16), "expected uint8"),
    "bool": (np.zeros((5, 5), bool), "expected uint8"),
    "two channels": (np.zeros((5, 7, 2), np.uint8), "with 1, 3 or 4 channels"),
    "a batch": (torch.zeros(2, 3, 5, 5, dtype=torch.uint8), "for many frames use PixelSpec.frames"),
    "one number": (np.uint8(3)[None], "expected H W"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_no_pictures(name: str) -> None:
    array, message = BAD_ARRAYS[name]
    with pytest.raises(MediaError, match=message):
        read_image(array)


@pytest.mark.parametrize("source", [None, 3, [b""], {"image": 1}, object()], ids=str)
def test_what_is_no_source(source: object) -> None:
    with pytest.raises(MediaError, match="is no media; expected a path"):
        read_image(source)


@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F-54
    os.mkfifo(tmp_path / "fifo.png")
    for path, what in ((tmp_path / "fifo.png", "a FIFO"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(MediaError, match=f"is {what}; expected a regular file"):
            read_image(path)
    opened = []
    os_open = os.open
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *a, **k: (opened.append(a), os_open(*a, **k))[1])
        with pytest.raises(MediaError):
            read_image("/dev/zero")
    assert not opened  # to open a device can have effects
    # A file that turns into a FIFO between the look and the open.
    saved_stat = os.stat
    (tmp_path / "real.png").write_bytes(saved(noise()))
    as_regular = saved_stat(tmp_path / "real.png")
    monkeypatch.setattr(os, "stat", lambda path, **k: as_regular if "fifo" in str(path) else saved_stat(path, **k))
    with pytest.raises(MediaError, match="a FIFO"):
        read_image(tmp_path / "fifo.png")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", "cannot be opened: No such file"),
        ("https://example.org/cat.jpg", "looks like a URL; nothing is fetched"),
        ("file:///etc/hostname", "looks like a URL"),
        ("data:image/png;base64,AAAA", "looks like a URL"),
        ("nul\0byte.png", "cannot be opened: embedded null"),
        ("x" * 4096, "cannot be opened: File name too long"),
        ("line\nbreak\x1b[31m.png", r"'line\\nbreak\\x1b\[31m.png' cannot be opened"),
    ],
)
def test_paths_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        read_image(path)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_names_that_are_not_utf8(tmp_path: Path) -> None:  # F-55
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.png", b"y" * 250 + b".png", "π 図.png".encode()):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(saved(noise()))
    paths = list(iter_images(tmp_path))
    assert sorted(os.fsencode(path.name) for path in paths) == sorted(
        [b"caf\xe9.png", b"y" * 250 + b".png", "π 図.png".encode()]
    )
    for path in paths:
        assert read_image(path).size == (40, 30)
        assert Path(json.loads(json.dumps(str(path)))) == path  # a manifest keeps them
        path.write_bytes(b"")
        with pytest.raises(MediaError) as caught:
            read_image(path)
        str(caught.value).encode()  # can be printed and logged


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "notes.txt", "z/c.webp", "z/deep/d.gif", "m/e.tiff", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def names(paths: Iterator[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


def test_a_folder_is_walked_in_order(tree: Path) -> None:
    assert names(iter_images(tree), tree) == ["a.JPG", "b.png", "m/e.tiff", "z/c.webp", "z/deep/d.gif"]
    assert names(iter_images(str(tree), recursive=False), tree) == ["a.JPG", "b.png"]


def test_links_that_lead_back(tree: Path, caplog: pytest.LogCaptureFixture) -> None:  # F-53
    (tree / "z" / "deep" / "up").symlink_to(tree)
    (tree / "self.png").symlink_to("self.png")
    (tree / "gone.png").symlink_to("nowhere.png")
    (tree / "side").symlink_to(tree / "m")
    with caplog.at_level(logging.WARNING):
        found = names(iter_images(tree), tree)
    assert found == ["a.JPG", "b.png", "m/e.tiff", "side/e.tiff", "z/c.webp", "z/deep/d.gif"]
    assert "a link back to a folder it lies in" in caplog.text


def test_a_folder_that_may_not_be_listed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # F-53
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/m"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with caplog.at_level(logging.WARNING):
        assert names(iter_images(tree), tree) == ["a.JPG", "b.png", "z/c.webp", "z/deep/d.gif"]
    assert "/m': Permission denied" in caplog.text
    for folder in (tree / "m", tree / "missing", tree / "b.png"):
        with pytest.raises(MediaError, match="cannot be listed"):
            iter_images(folder)


def test_a_folder_is_listed_only_as_far_as_it_is_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F-53
    scandir, seen = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: (seen.append(str(path)), scandir(path))[1])
    walk = iter_images(tree)
    next(walk)
    assert set(seen) == {str(tree)}
