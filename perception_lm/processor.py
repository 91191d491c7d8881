"""Messages and media to a `Batch`: every tile cut, every slot counted, on the CPU, before a model sees anything.

B rows of the batch  T text tokens  M media items (images, tiles, frames)  S side of an item
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perception.errors import ConfigError, LimitError, PerceptionError, RequestError
from perception.media import PICTURE_FORMATS, FrameChoice, draw_box, iter_images, open_media, read_image, read_video
from perception.pixels import PixelSpec
from perception.tiling import choose_grid, tile_image
from perception_lm import chat
from perception_lm.chat import Clip, Conversation, Media, Picture, Slots
from perception_lm.config import MediaConfig
from perception_lm.tokenizer import LlamaTokenizer

T = TypeVar("T")
Tiling = Literal["thumb+tile", "vanilla"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of different length and different media, side by side.

    tokens        B T int64, padded on the right
    lengths       B tokens of each row that are not padding
    pixels        M 3 S S, the items of all rows, row after row; None when no row has any
    media_counts  B items of each row; they sum to M
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pixels: Tensor | None = None
    media_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.media_counts:
            object.__setattr__(self, "media_counts", (0,) * len(self.lengths))
        M = 0 if self.pixels is None else len(self.pixels)
        assert len(self.tokens) == len(self.lengths) == len(self.media_counts), "one length and one count a row"
        assert sum(self.media_counts) == M, "as many items as the rows have"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> "Batch":
        """The one row, without its padding: a batch of its own."""
        row = range(len(self))[row]
        first = sum(self.media_counts[:row])
        count, length = self.media_counts[row], self.lengths[row]
        pixels = self.pixels[first : first + count] if self.pixels is not None and count else None
        tokens = self.tokens[row : row + 1, :length]
        return Batch(tokens=tokens, lengths=(length,), pixels=pixels, media_counts=(count,))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """On another device; `dtype` is of the pixels."""
        pixels = None if self.pixels is None else self.pixels.to(device, dtype)
        return replace(self, tokens=self.tokens.to(device), pixels=pixels)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a prompt will cost.

    tokens  of the whole prompt
    text    of them, text and template
    slots   of them, places for media
    pieces  tiles or frames of each picture and video
    room    tokens left in the context for an answer; below 0 the prompt is refused
    """

    tokens: int
    text: int
    slots: int
    pieces: tuple[int, ...]
    room: int


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """What a call says about its media, in place of the model's own numbers."""

    tiling: Tiling | None = None
    max_tiles: int | None = None
    frames: int | None = None
    start: float | None = None
    end: float | None = None
    fps: float | None = None


class Processor:
    """Conversations to a `Batch`.

    media       how the model was shown pictures and videos
    slots       tokens of one item: what the projector says of a tile's grid
    preprocess  how an item becomes pixels; its size is the tile's. Bicubic, 0.5 and 0.5 by default
    orient      turn pictures as EXIF says; False is the reference's behaviour
    """

    def __init__(
        self,
        tokenizer: LlamaTokenizer,
        media: MediaConfig,
        slots: int,
        preprocess: PixelSpec | None = None,
        *,
        orient: bool = True,
    ):
        self.tokenizer, self.media, self.slots, self.orient = tokenizer, media, slots, orient
        self.preprocess = preprocess or PixelSpec(size=media.tile, interpolation="bicubic")
        if self.preprocess.size != media.tile or self.preprocess.resize != "squash":
            raise ConfigError(
                f"a preprocess of size {self.preprocess.size} that resizes by {self.preprocess.resize!r} for tiles of "
                f"{media.tile}; expected the same size, and 'squash'"
            )

    def __call__(
        self,
        conversations: Any,
        *,
        tiling: Tiling | None = None,
        max_tiles: int | None = None,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
        add_generation_prompt: bool = True,
    ) -> Batch:
        """The batch of some conversations.

        conversations  a list of them, each a list of messages (`perception_lm.chat.read_conversation`); or one
        tiling         "thumb+tile": a thumbnail, then tiles; "vanilla": one squashed tile. By default the model's own
                       for a picture alone in its message, and "vanilla" where there are several
        max_tiles      tiles of a picture, the thumbnail not counted: fewer is faster, and sees less
        frames         frames of a video, of those taken every 1 / `fps` seconds between `start` and `end`

        Raises RequestError for messages that cannot be, LimitError for a prompt beyond the model's context (both before
        anything is decoded), MediaError for media that cannot be read.
        """
        options = MediaOptions(tiling=tiling, max_tiles=max_tiles, frames=frames, start=start, end=end, fps=fps)
        talks = read_conversations(conversations)
        for row, talk in enumerate(talks):
            found = self._estimate(talk, options, add_generation_prompt, exact=False)
            if found.room < 0:
                found = self._estimate(talk, options, add_generation_prompt, exact=True)
            self._check_room(found, f"conversation {row}" if len(talks) > 1 else "the prompt")
        every = [item for talk in talks for item in self._settled(talk, options)]
        decoded = iter(_map(self._pixels, every))
        rows: list[list[int]] = []
        pixels: list[Tensor] = []
        counts: list[int] = []
        for talk in talks:
            items = [next(decoded) for _ in talk.media]
            segments = chat.render(talk, list(map(len, items)), add_generation_prompt=add_generation_prompt)
            rows.append(self._ids(segments, list(map(len, items))))
            # In the order of the slots: marks may show the second video first.
            shown = [_taken(items[s.item], s) for s in segments if isinstance(s, Slots)]
            pixels += shown
            counts.append(sum(map(len, shown)))
        tokens = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        return Batch(
            tokens=tokens,
            lengths=tuple(map(len, rows)),
            pixels=torch.cat(pixels) if pixels else None,
            media_counts=tuple(counts),
        )

    def estimate(
        self,
        conversations: Any,
        *,
        tiling: Tiling | None = None,
        max_tiles: int | None = None,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
        add_generation_prompt: bool = True,
    ) -> list[Estimate]:
        """What each conversation will cost, from the headers of its files: of a video one frame is decoded."""
        options = MediaOptions(tiling=tiling, max_tiles=max_tiles, frames=frames, start=start, end=end, fps=fps)
        talks = read_conversations(conversations)
        return [self._estimate(talk, options, add_generation_prompt, exact=True) for talk in talks]

    def prompt(self, conversation: Any, *, add_generation_prompt: bool = True, **options: Any) -> str:
        """The prompt of one conversation as text, for people: `<|image|>*256 ` where media go."""
        (talk,) = read_conversations(conversation)
        pieces = self._pieces(talk, MediaOptions(**options), exact=True)
        segments = chat.render(talk, pieces, add_generation_prompt=add_generation_prompt)
        return chat.show(segments, lambda slots: self._count(slots, pieces))

    # --- counting ---

    def _estimate(self, talk: Conversation, options: MediaOptions, prompt: bool, *, exact: bool) -> Estimate:
        pieces = self._pieces(talk, options, exact=exact)
        segments = chat.render(talk, pieces, add_generation_prompt=prompt)
        slots = sum(self._count(s, pieces) for s in segments if isinstance(s, Slots))
        tokens = len(self._ids(segments, pieces))
        room = self.media.context - tokens
        return Estimate(tokens=tokens, text=tokens - slots, slots=slots, pieces=tuple(pieces), room=room)

    def _check_room(self, found: Estimate, what: str) -> None:
        if found.room < 0:
            media = f"{found.slots} of them for {sum(found.pieces)} tiles and frames" if found.slots else "all text"
            hint = "; lower max_tiles or frames" if found.slots else ""
            raise LimitError(
                f"{what} has {found.tokens} tokens, {media}; the model's context is {self.media.context}{hint}"
            )

    def _ids(self, segments: Sequence[chat.Segment], pieces: Sequence[int]) -> list[int]:
        return chat.to_ids(segments, self.tokenizer, lambda slots: self._count(slots, pieces))

    def _count(self, slots: Slots, pieces: Sequence[int]) -> int:
        return self.slots * (pieces[slots.item] if slots.piece is None else 1)

    def _pieces(self, talk: Conversation, options: MediaOptions, *, exact: bool) -> list[int]:
        """Tiles or frames of each item. Not exact: for a video, the most there can be, without opening it."""
        pieces = []
        items = iter(self._settled(talk, options))
        for message in talk.messages:
            # Where marks stand for frames, it matters how many there are.
            marked = any(isinstance(part, chat.Text) and "<image>" in part.text for part in message.parts)
            for item in (next(items) for _ in message.media):
                if isinstance(item, Clip):
                    pieces.append(_frame_count(item, exact=exact or marked))
                elif item.tiling == "vanilla":
                    pieces.append(1)
                else:
                    cols, rows = choose_grid(*_size(item.image, self.orient), self.media.tile, item.max_tiles or 1)
                    pieces.append(1 + cols * rows)
        return pieces

    def _settled(self, talk: Conversation, options: MediaOptions) -> list[Media]:
        """The media of a conversation with every option filled in: the part's own, the call's, the model's."""
        settled: list[Media] = []
        for message in talk.messages:
            alone = len(message.media) == 1
            for item in message.media:
                if isinstance(item, Picture):
                    tiling = _first(item.tiling, options.tiling, self.media.tiling if alone else "vanilla")
                    if tiling not in ("thumb+tile", "vanilla"):
                        raise ConfigError(f"tiling={tiling!r}; expected 'thumb+tile' or 'vanilla'")
                    max_tiles = _first(item.max_tiles, options.max_tiles, self.media.max_tiles)
                    choose_grid(1, 1, self.media.tile, max_tiles)  # a max_tiles that cannot be is refused here
                    settled.append(replace(item, tiling=tiling, max_tiles=max_tiles))
                else:
                    item = replace(
                        item,
                        frames=_first(item.frames, options.frames, self.media.frames),
                        start=_first(item.start, options.start),
                        end=_first(item.end, options.end),
                        fps=_first(item.fps, options.fps, 1.0),
                    )
                    _choice(item)
                    settled.append(item)
        return settled

    # --- pixels ---

    def _pixels(self, item: Media) -> Tensor:
        """M 3 S S of one picture or video whose options are settled."""
        if isinstance(item, Picture):
            tiled = item.tiling == "thumb+tile"
            return tile_image(
                item.image,
                self.media.tile,
                item.max_tiles or 1 if tiled else 1,
                spec=self.preprocess,
                thumbnail=tiled,
                orient=self.orient,
            )
        choice = _choice(item)
        video = read_video(
            item.video,
            max_frames=choice.max_frames,
            start=choice.start,
            end=choice.end,
            sampling_fps=choice.sampling_fps,
            indices=choice.indices,
        )
        frames = video.frames if item.boxes is None else draw_box(video.frames, video.indices, item.boxes)
        return self.preprocess.frames(frames)


def read_conversations(conversations: Any) -> list[Conversation]:
    """A list of conversations, or one, checked. Open files in them become bytes, for they are read more than once."""
    one = isinstance(conversations, Conversation) or (
        isinstance(conversations, Sequence) and conversations and isinstance(conversations[0], Mapping | chat.Message)
    )
    given = [conversations] if one else conversations
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise RequestError("expected a conversation (a list of messages) or a list of them, at least one")
    talks = []
    for row, messages in enumerate(given):
        try:
            talk = chat.read_conversation(messages)
        except RequestError as error:
            raise RequestError(f"conversation {row}: {error}" if len(given) > 1 else str(error)) from error
        read = (replace(m, parts=tuple(map(_in_memory, m.parts))) for m in talk.messages)
        talks.append(Conversation(tuple(read)))
    return talks


def _in_memory(part: chat.Part) -> chat.Part:
    if isinstance(part, Picture):
        return replace(part, image=_bytes(part.image))
    return replace(part, video=_bytes(part.video)) if isinstance(part, Clip) else part


def _bytes(source: Any) -> Any:
    if not hasattr(source, "read"):
        return source
    with open_media(source) as file:
        return file.read()


def _size(source: Any, orient: bool) -> tuple[int, int]:
    """Width and height of a picture, from its header where there is one."""
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        try:
            with open_media(source) as file, Image.open(file, formats=_known_formats()) as image:
                return (image.height, image.width) if orient and _on_its_side(image) else image.size
        except PerceptionError:
            raise
        except Exception:  # whatever it is, `read_image` says it better
            pass
    return read_image(source, orient=orient).size


def _on_its_side(image: Image.Image) -> bool:
    """Whether EXIF asks for a quarter turn, as far as the header tells: Pillow turns a TIFF itself, and would decode a
    PNG to look for EXIF behind the pixels."""
    known = "exif" in image.info and image.format != "TIFF"
    return known and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)


def _known_formats() -> list[str]:
    Image.init()
    return [known for known in PICTURE_FORMATS if known in Image.OPEN]


def _choice(item: Clip) -> FrameChoice:
    return FrameChoice(
        max_frames=item.frames or 0,
        start=item.start,
        end=item.end,
        sampling_fps=item.fps or 0,
        indices=item.indices,
    )


def _frame_count(item: Clip, *, exact: bool) -> int:
    choice, source = _choice(item), item.video
    if not exact:
        return choice.max_frames if choice.indices is None else len(choice.indices)
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):  # noqa: PTH112
        source = list(iter_images(source, recursive=False))
    if isinstance(source, list | tuple | np.ndarray | Tensor) and len(source):
        return len(choice.pick(len(source), 1.0))
    about = read_video(source, indices=[0])
    return len(choice.pick(about.num_frames, about.fps))


def _taken(pixels: Tensor, slots: Slots) -> Tensor:
    return pixels if slots.piece is None else pixels[slots.piece : slots.piece + 1]


def _first(*values: Any) -> Any:
    """The first that was given."""
    return next((value for value in values if value is not None), None)


def _map(work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(8, len(items), os.cpu_count() or 1), thread_name_prefix="perception-media") as pool:
        return list(pool.map(work, items))
