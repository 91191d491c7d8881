"""Where transformers' Perception LM does something else than ours, by name: a change on either side is noticed."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from perception.media import choose_frames, uniform_frames
from perception_lm.config import MediaConfig
from perception_lm.processor import Processor
from perception_lm.tokenizer import LlamaTokenizer

TALL, WIDE = Image.new("RGB", (40, 200), "red"), Image.new("RGB", (64, 43), "blue")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    try:
        import transformers
        from transformers import PerceptionLMForConditionalGeneration  # noqa: F401
    except Exception as error:
        pytest.skip(f"transformers with its PerceptionLM cannot be imported here: {error}")
    return transformers


@pytest.fixture
def ours(golden: Path) -> Processor:
    tokenizer = LlamaTokenizer.from_file(golden / "plm" / "tokenizer.model")
    return Processor(tokenizer, MediaConfig(tile=32, max_tiles=36), 16)


def question(*images: Image.Image) -> list:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": "?"}]}
    ]


def test_max_tiles_at_the_call(transformers: ModuleType, ours: Processor) -> None:
    """Theirs ignores `max_num_tiles` at the call; ours obeys `max_tiles`."""
    theirs = transformers.PerceptionLMImageProcessor(vision_input_type="thumb+tile", tile_size=32, max_num_tiles=36)
    many = theirs(WIDE, return_tensors="pt")["pixel_values"].shape[1]
    assert theirs(WIDE, max_num_tiles=4, return_tensors="pt")["pixel_values"].shape[1] == many > 5
    assert ours([question(WIDE)]).media_counts == (many,)
    assert ours([question(WIDE)], max_tiles=4).media_counts == (5,)


def test_pictures_of_different_tile_counts(transformers: ModuleType, ours: Processor) -> None:
    """Theirs cannot put them into one batch; ours lays the tiles of all rows end to end."""
    theirs = transformers.PerceptionLMImageProcessor(vision_input_type="thumb+tile", tile_size=32, max_num_tiles=9)
    counts = [theirs(image, return_tensors="pt")["pixel_values"].shape[1] for image in (TALL, WIDE)]
    assert counts[0] != counts[1]
    with pytest.raises(ValueError):  # noqa: PT011  the words are theirs
        theirs([TALL, WIDE], return_tensors="pt")
    batch = ours([question(TALL), question(WIDE)], max_tiles=9)
    assert list(batch.media_counts) == counts
    assert len(batch.pixels) == sum(counts)


def test_frames_of_a_video(transformers: ModuleType) -> None:
    """Theirs takes floor(i * N / n) and never the last frame; training, and ours, took both ends."""
    from transformers.video_utils import VideoMetadata

    theirs = transformers.PerceptionLMVideoProcessor()
    facts = VideoMetadata(total_num_frames=40, fps=1.0, duration=40.0, video_backend="none", width=8, height=8)
    assert np.asarray(theirs.sample_frames(facts, num_frames=8)).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert uniform_frames(40, 8) == choose_frames(40, 1.0, 8) == [0, 6, 11, 17, 22, 28, 33, 39]


def test_several_pictures_in_one_question(transformers: ModuleType, ours: Processor) -> None:
    """Theirs tiles each; the reference, and ours unless asked, gives each one tile."""
    theirs = transformers.PerceptionLMImageProcessor(vision_input_type="thumb+tile", tile_size=32, max_num_tiles=4)
    assert theirs([WIDE, WIDE], return_tensors="pt")["pixel_values"].shape[:2] == (2, 5)
    assert ours([question(WIDE, WIDE)], max_tiles=4).media_counts == (2,)
    assert ours([question(WIDE, WIDE)], max_tiles=4, tiling="thumb+tile").media_counts == (10,)
