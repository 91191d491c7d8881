"""Prompts and pixels as published, every slot counted, and what cannot be served refused before it is decoded."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from perception.errors import ConfigError, LimitError, MediaError, RequestError
from perception.media import choose_frames, draw_box
from perception.pixels import PixelSpec
from perception_encoder import samples
from perception_lm import processor as processing
from perception_lm.config import MediaConfig
from perception_lm.processor import Batch, Processor
from perception_lm.tokenizer import SPECIAL, LlamaTokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "plm"
TOKENIZER = LlamaTokenizer.from_file(GOLDEN / "tokenizer.model")
SIZES = {"A": (32, 16), "B": (30, 9)}  # side of a tile, slots of one
CASES = {model: json.loads((GOLDEN / model / "cases.json").read_text())["cases"] for model in SIZES}
STORED = {model: load_file(GOLDEN / model / "io.safetensors") for model in SIZES}
NAMES = ("one", "tile", "strip", "video", "multi", "inter", "text")


def made(model: str = "A", **changes: Any) -> Processor:
    tile, slots = SIZES[model]
    return Processor(
        TOKENIZER, MediaConfig(**{"tile": tile, "max_tiles": 4, "frames": 3, "context": 1024, **changes}), slots
    )


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def image(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **options}


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **options}


def golden_messages(model: str, name: str) -> list[dict[str, Any]]:
    first, second = (image(GOLDEN / model / f"image{i}.png") for i in (1, 2))
    clip = video(STORED[model]["video.frames_uint8"])
    media = {"video": [clip], "multi": [first, second], "inter": [first, second], "text": []}.get(name, [first])
    return user(*media, CASES[model][name]["question"])


def codes(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 127.5 + 127.5).round().to(torch.uint8)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_published_prompts_and_pixels(model: str, name: str) -> None:
    """To the code: 0 of 255 away from the reference's, where 1 would do (traps 11 to 16 meet here: order of tiles,
    columns and rows, stretched and not padded, bicubic of both kinds, mean and std). Trap 15: frames through the
    path of a picture would be up to 0.12 away (normalised)."""
    batch = made(model)([golden_messages(model, name)], tiling="vanilla" if name == "one" else None)
    case = CASES[model][name]
    assert batch.tokens.tolist() == [case["prompt_ids"]]
    assert batch.lengths == (len(case["prompt_ids"]),)
    assert batch.media_counts == (case["n_chunks"],)
    if name == "text":
        assert batch.pixels is None
    else:
        assert batch.pixels is not None
        assert batch.pixels.dtype == torch.float32
        assert torch.equal(codes(batch.pixels), STORED[model][case["media_pixels"]])


@pytest.mark.parametrize("model", SIZES)
def test_a_batch_is_its_singles(model: str) -> None:
    """Trap 23: 5 tiles, text, 3 frames, two pictures, side by side; each row's items and ids are its own."""
    processor, talks = made(model), [golden_messages(model, name) for name in NAMES[1:]]
    batch = processor(talks)
    assert len(batch) == 6
    assert batch.media_counts == (5, 5, 3, 2, 2, 0)
    for row, talk in enumerate(talks):
        alone, part = processor([talk]), batch[row]
        assert torch.equal(part.tokens, alone.tokens)
        assert (part.lengths, part.media_counts) == (alone.lengths, alone.media_counts)
        assert (part.pixels is None) == (alone.pixels is None)
        assert part.pixels is None or torch.equal(part.pixels, alone.pixels)
        assert (batch.tokens[row, batch.lengths[row] :] == TOKENIZER.pad).all()
    assert torch.equal(batch[-1].tokens, batch[5].tokens)
    with pytest.raises(IndexError):
        batch[6]


def test_padding_is_known_by_its_place() -> None:
    """Trap 33: the padding is end_of_text (434), an id that a text may hold; `lengths` says where it begins."""
    batch = made()([user("a"), user("a much longer question than the other one")])
    short, long = batch.lengths
    assert short < long == batch.tokens.shape[1]
    assert batch.tokens[0, short - 1] != TOKENIZER.pad
    assert (batch.tokens[0, short:] == TOKENIZER.pad).all()
    ended = Batch(tokens=torch.tensor([[433, 434, 434], [433, 65, 66]]), lengths=(2, 3))
    assert ended[0].tokens.tolist() == [[433, 434]]


def test_moving() -> None:
    batch = made()([golden_messages("A", "tile"), user("text")])
    moved = batch.to("meta", torch.bfloat16)
    assert moved.pixels is not None
    assert (moved.tokens.device.type, moved.pixels.device.type, moved.pixels.dtype) == ("meta", "meta", torch.bfloat16)
    assert moved.tokens.dtype == torch.int64
    assert batch[1].to("cpu", torch.float16).pixels is None
    assert Batch(tokens=torch.zeros(2, 3), lengths=(3, 3)).media_counts == (0, 0)
    with pytest.raises(AssertionError):
        Batch(tokens=torch.zeros(1, 3), lengths=(3,), media_counts=(2,))


# --- property: slots and items ------------------------------------------------------------------------------------


@st.composite
def talks(draw: st.DrawFn) -> list[dict[str, Any]]:
    words = st.lists(st.sampled_from([*SPECIAL[:11], "<|video|>", "a", " ", "\n", "é"])).map("".join)
    messages: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 3))):
        if turn:
            messages.append({"role": "assistant", "content": draw(words)})
        parts: list[Any] = [{"type": "text", "text": draw(words)}]
        for _ in range(draw(st.integers(0, 2))):
            size = draw(st.integers(1, 90)), draw(st.integers(1, 90))
            part = (
                image(Image.new("RGB", size))
                if draw(st.booleans())
                else video(np.zeros((*size[:1], 4, 4, 3), np.uint8))
            )
            parts.insert(draw(st.integers(0, len(parts))), part)
        messages.append({"role": "user", "content": parts})
    return messages


@settings(deadline=None, max_examples=40)
@given(st.lists(talks(), min_size=1, max_size=3), st.integers(1, 4), st.sampled_from([None, "vanilla", "thumb+tile"]))
@pytest.mark.filterwarnings("ignore:a picture of")
def test_as_many_slots_as_media_tokens(given: list[Any], max_tiles: int, tiling: Any) -> None:
    """Trap 24 and F-85: in every row, whatever its text says, image ids are 16 times its items."""
    processor = made(context=100_000)
    batch = processor(given, max_tiles=max_tiles, tiling=tiling)
    items = (batch.tokens == TOKENIZER.image_token).sum(dim=1) / processor.slots
    assert items.tolist() == list(batch.media_counts)
    assert sum(batch.media_counts) == (0 if batch.pixels is None else len(batch.pixels))
    found = processor.estimate(given, max_tiles=max_tiles, tiling=tiling)
    assert [e.tokens for e in found] == list(batch.lengths)
    assert [sum(e.pieces) for e in found] == list(batch.media_counts)


# --- options ------------------------------------------------------------------------------------------------------


def test_a_picture_alone_is_tiled_and_several_are_not() -> None:
    processor, one = made(), picture()
    assert processor([user(image(one), "a")]).media_counts == (5,)
    assert processor([user(image(one), image(one), "a")]).media_counts == (2,)
    assert processor([user(image(one), image(one), "a")], tiling="thumb+tile").media_counts == (10,)
    assert processor([user(image(one), "a")], tiling="vanilla").media_counts == (1,)
    assert processor([user(image(one), "a")], max_tiles=1).media_counts == (2,)  # as published: thumbnail and tile
    assert made(tiling="vanilla")([user(image(one), "a")]).media_counts == (1,)
    # A second picture, later, leaves the first as it was: what was read of it stays good.
    first, then = user(image(one), "a"), user(image(one), "b")
    assert processor([[*first, {"role": "assistant", "content": "c"}, *then]]).media_counts == (10,)


def test_a_part_knows_better_than_the_call() -> None:
    processor, one = made(), picture()
    both = user(image(one, tiling="thumb+tile", max_tiles=2), image(one), "a")
    assert processor([both], tiling="vanilla", max_tiles=4).media_counts == (1 + 2 + 1,)
    frames = np.zeros((9, 4, 4, 3), np.uint8)
    assert processor([user(video(frames, frames=2), "a")], frames=7).media_counts == (2,)
    assert processor([user(video(frames), "a")], frames=7).media_counts == (7,)
    assert processor([user(video(frames, indices=[8, 0, 8, 1]), "a")]).media_counts == (4,)


def test_white_is_one_and_black_is_minus_one() -> None:
    """Trap 16: CLIP's or ImageNet's mean and std would give 1.93 or 2.64 for white."""
    for colour, value in (("white", 1.0), ("black", -1.0)):
        pixels = made()([user(image(Image.new("RGB", (64, 64), colour)), "a")]).pixels
        assert pixels is not None
        assert pixels.min() == pixels.max() == value


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_before_it_is_resized(mode: str) -> None:  # F-45
    source = picture().convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        source = Image.fromarray(np.asarray(source).astype(np.uint16) * 257)
    rgb = picture().convert("L") if mode == "I;16" else source
    processor = made()
    for tiling in ("vanilla", "thumb+tile"):
        got, wanted = (processor([user(image(i), "a")], tiling=tiling).pixels for i in (source, rgb.convert("RGB")))  # type: ignore[arg-type]
        assert got is not None
        assert wanted is not None
        assert torch.equal(got, wanted)


def test_pictures_come_in_every_form(tmp_path: Path) -> None:
    stored = io.BytesIO()
    picture().save(stored, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(stored.getvalue())
    array = np.array(picture())
    processor = made()
    wanted = processor([user(image(picture()), "a")]).pixels
    assert wanted is not None

    class Stream(io.RawIOBase):  # cannot be read twice
        def __init__(self) -> None:
            self.left = io.BytesIO(stored.getvalue())

        def readinto(self, buffer: Any) -> int:
            return self.left.readinto(buffer)

        def readable(self) -> bool:
            return True

    for source in (
        path,
        str(path),
        stored.getvalue(),
        stored,
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        Stream(),
    ):
        got = processor([user(image(source), "a")]).pixels
        assert got is not None
        assert torch.equal(got, wanted), type(source)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_a_picture_on_its_side(suffix: str, tmp_path: Path) -> None:
    """The header's size and the tiles agree about EXIF, with it and without."""
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = 6
    picture(64, 16).save(path, exif=exif)
    for orient in (True, False):
        assert processing._size(path, orient) == processing.read_image(path, orient=orient).size
    if suffix == "tiff":
        return  # Pillow turns it in any case
    upright = Processor(TOKENIZER, made().media, 16)([user(image(path), "a")]).pixels
    turned = Processor(TOKENIZER, made().media, 16, orient=False)([user(image(path), "a")]).pixels
    assert upright is not None
    assert turned is not None
    assert not torch.equal(upright, turned)


def test_frames_of_a_clip() -> None:
    """Trap 17: one a second, thinned evenly, first and last among them; the sample clip has 5 seconds."""
    clip = samples.clips()["bunny"]
    processor = made(frames=8, context=10_000)
    about = processing.read_video(clip, indices=[0])
    for options in ({}, {"frames": 3}, {"start": 1.0, "end": 2.5}, {"fps": 2.0, "frames": 4}, {"start": 2.0}):
        batch, (found,) = (
            processor([user(video(clip), "a")], **options),
            processor.estimate(user(video(clip), "a"), **options),
        )
        indices = choose_frames(
            about.num_frames,
            about.fps,
            int(options.get("frames", 8)),
            options.get("start"),
            options.get("end"),
            options.get("fps", 1),
        )
        assert batch.media_counts == found.pieces == (len(indices),)
        assert batch.pixels is not None
        wanted = processor.preprocess.frames(processing.read_video(clip, indices=indices).frames)
        assert torch.equal(batch.pixels, wanted)


def test_boxes_are_drawn_on_the_frames() -> None:
    frames = torch.zeros(4, 3, 24, 24, dtype=torch.uint8)
    boxes = {"1": [2, 3, 12, 13], "2": None}
    batch = made(frames=4)([user(video(frames, boxes=boxes), "a")])
    assert batch.pixels is not None
    assert torch.equal(batch.pixels, made().preprocess.frames(draw_box(frames, range(4), boxes)))
    red = (batch.pixels[:, 0] > 0).flatten(1).any(dim=1)
    assert red.tolist() == [False, True, False, False]


def test_marks_show_the_second_first() -> None:
    """Pixels come in the order of their slots, whatever the order of the parts."""
    black, white = Image.new("RGB", (8, 8)), np.full((2, 8, 8, 3), 255, np.uint8)
    batch = made()([user(image(black), video(white), "<video>, not <image>")])
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 1, -1]
    single = made()([user(video(np.stack([np.full((8, 8, 3), v, np.uint8) for v in (0, 255)])), "<image>, <image>")])
    assert single.pixels is not None
    assert single.pixels[:, 0, 0, 0].tolist() == [-1, 1]


def test_prompt_for_people() -> None:
    for name in NAMES[1:]:
        assert made().prompt(golden_messages("A", name)) == CASES["A"][name]["prompt"]


def test_one_conversation_or_several() -> None:
    one = user("a")
    assert torch.equal(made()(one).tokens, made()([one]).tokens)
    assert len(made()([one, one])) == 2


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("media were decoded")

    for name in ("tile_image", "read_image", "read_video"):
        monkeypatch.setattr(processing, name, refuse)


@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize(
    ("talk", "options", "error", "message"),
    [
        (user("<image>"), {}, RequestError, "1 <image> marks and 0 image parts"),
        (user(image("PICTURE"), "<image><image>"), {}, RequestError, "2 <image> marks and 1 image"),
        (user(image("PICTURE"), image("PICTURE"), "<image>"), {}, RequestError, "1 <image> marks and 2 image"),
        (user(image("PICTURE"), "a" * 3000), {}, LimitError, r"has \d+ tokens, 80 of them for 5 tiles and frames"),
        (user("a " * 3000), {}, LimitError, "all text; the model's context is 1024$"),
        (user(image("PICTURE"), "a"), {"max_tiles": 100}, LimitError, "lower max_tiles or frames"),
        (user(image("PICTURE"), "a"), {"max_tiles": 0}, ConfigError, "max_tiles=0"),
        (user(image("PICTURE"), "a"), {"max_tiles": 2000}, LimitError, "MAX_TILES"),
        (user(image("PICTURE"), "a"), {"tiling": "tiles"}, ConfigError, "tiling='tiles'"),
        (user(image("nowhere.png"), "a"), {}, MediaError, "nowhere.png"),
        (user(video("nowhere.mp4"), "a"), {"frames": 0}, ConfigError, "max_frames=0"),
        (user(video("nowhere.mp4"), "a"), {"start": 3, "end": 1}, ConfigError, "start=3 is after end=1"),
        (user(video("nowhere.mp4"), "a"), {"fps": 0.0}, ConfigError, "sampling_fps"),
        ([user("a"), [{"role": "tool", "content": "a"}]], {}, RequestError, "conversation 1: message 0"),
        ([], {}, RequestError, "at least one"),
        ("a question", {}, RequestError, "at least one"),
    ],
)
def test_refused_before_anything_is_decoded(
    talk: Any, options: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    """F-86, F-92, trap 32."""
    path = tmp_path / "a.png"
    picture(300, 200).save(path)
    for part in (
        talk[0]["content"] if talk and isinstance(talk[0], dict) and isinstance(talk[0]["content"], list) else ()
    ):
        if part.get("image") == "PICTURE":
            part["image"] = path
    with pytest.raises(error, match=message):
        made()(talk, **options)


def test_the_edge_of_the_context() -> None:
    """Trap 32: 37 tiles of 256 and 60 tokens of text are 9532 of PLM's 11520; two such pictures are not served."""
    one = user(image(picture(100, 100)), "a")
    (found,) = made().estimate(one)
    assert (found.tokens, found.text, found.slots, found.pieces) == (found.text + 80, found.text, 80, (5,))
    assert made(context=found.tokens)([one]).lengths == (found.tokens,)
    assert made(context=found.tokens).estimate(one)[0].room == 0
    with pytest.raises(
        LimitError, match=f"{found.tokens} tokens, 80 of them for 5 tiles.*context is {found.tokens - 1}"
    ):
        made(context=found.tokens - 1)([one])
    big = Processor(TOKENIZER, MediaConfig(), 256)
    (full,) = big.estimate(user(image(Image.new("RGB", (448, 448))), "a"))
    assert (full.slots, full.pieces) == (9472, (37,))
    assert full.room == 11520 - full.tokens > 0
    with pytest.raises(LimitError, match=r"conversation 1 has \d+ tokens, 18944 of them for 74 tiles and frames"):
        big([user("a"), user(*[image(Image.new("RGB", (448, 448)))] * 2, "a")], tiling="thumb+tile")


def test_a_short_clip_may_be_asked_for_many_frames() -> None:
    """A thousand frames would not fit, but the clip has two."""
    assert made()([user(video(np.zeros((2, 4, 4, 3), np.uint8)), "a")], frames=1000).media_counts == (2,)
    with pytest.raises(LimitError, match="for 90 tiles and frames"):
        made()([user(video(np.zeros((90, 4, 4, 3), np.uint8)), "a")], frames=1000)


def test_an_estimate_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture(300, 200).save(path)
    path.write_bytes(path.read_bytes()[:2000])  # the header is there, the pixels are not
    monkeypatch.setattr(processing, "read_image", None)
    (found,) = made().estimate(user(image(path), "a"))
    assert found.pieces == (5,)


def test_media_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(MediaError, match="plain text"):
        made()([user(image(tmp_path / "a.png"), "a")])
    with pytest.raises(MediaError, match="plain text"):
        made().estimate([user(image(tmp_path / "a.png"), "a")])


@pytest.mark.parametrize("spec", [PixelSpec(size=16), PixelSpec(size=32, resize="crop")])
def test_a_rule_for_pixels_that_does_not_fit(spec: PixelSpec) -> None:
    with pytest.raises(ConfigError, match="tiles of 32; expected the same size, and 'squash'"):
        Processor(TOKENIZER, MediaConfig(tile=32), 16, spec)


def test_the_rule_of_another_encoder_is_obeyed() -> None:
    spec = PixelSpec(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = Processor(TOKENIZER, MediaConfig(tile=32), 16, spec)([user(image(Image.new("RGB", (32, 32))), "a")]).pixels
    assert pixels is not None
    assert pixels.abs().max() == 0
