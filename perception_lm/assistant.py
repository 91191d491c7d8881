"""A model, its processor and its tokenizer as one thing that answers: about pictures, videos, regions, or plain text.

assistant = perception_lm.load("facebook/Perception-LM-1B")
assistant.ask("chart.png", "Describe the bar plot in the image.")
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perception.errors import ConfigError, RequestError
from perception.media import DEMUXERS, HEAD, open_media, read_image, sniff, to_rgb
from perception_lm import generation
from perception_lm.chat import Clip, Message, Part, Picture, Text
from perception_lm.generation import Job, Reply, Session
from perception_lm.memory import Memory
from perception_lm.model import PerceptionLM
from perception_lm.processor import Processor, read_conversations
from perception_lm.regions import Box, Moment, check_box, draw_boxes, parse_boxes, parse_moment, parse_moments
from perception_lm.tokenizer import LlamaTokenizer

MediaType = Literal["auto", "image", "video"]

# The questions that the models were trained and measured with, to the letter, slips and all.
CAPTION_IMAGE = "Describe the image in details."
CAPTION_VIDEO = "What is happening in the video?"
GROUND = "Provide a bounding box of the region this sentence describes: '{caption}'.\nUse the format [x1, y1, x2, y2]."
DESCRIBE_BOX = "Please describe the region ({box}) in details.\nThe region is in the format of [x1, y1, x2, y2]."
DESCRIBE_DRAWN = "Please describe the region inside the rec rectangle."
DESCRIBE_TRACK = (
    "Give a detailed description of the events occurring in the region marked by the red rectangle within frames "
    "[{start}, {end}] in this {total} frame video."
)
LOCALIZE = (
    "Given the region marked by the red rectangle in the video, please provide the start and end frame of when "
    "'{event}' happens. Use the format [start, end] where start and end are frame numbers between 0 and {last} in "
    "this {total} frame video."
)
DENSE_CAPTIONS = (
    "Create a dense caption of the subject's actions within the red rectangles, including action frames ids and brief "
    "descriptions. For each item use the format [start, end]: [description] separated by a newline, where start and "
    "end are frame numbers between 0 and {last} in this {total} frame video."
)


class Words(str):
    """A piece of a streamed answer: text, and the tokens it was made of; `reply` comes with the last."""

    tokens: list[int]
    reply: Reply | None

    @classmethod
    def of(cls, piece: generation.Piece) -> "Words":
        words = cls(piece.text)
        words.tokens, words.reply = piece.tokens, piece.reply
        return words

    @property
    def text(self) -> str:
        return str(self)


class Assistant:
    """What `perception_lm.load` and `perception_lm.compose` give.

    In every method, keywords are first the processor's: tiling, max_tiles, frames, start, end, fps; then fields of
    `perception_lm.sampling.GenerationConfig`: max_new_tokens, temperature, top_p, seed, stop and so on. Answers end
    where the tokenizer says, unless stop_tokens= is given.
    """

    fast = "perception_lm.fast:fast_assistant"

    def __init__(self, model: PerceptionLM, processor: Processor, tokenizer: LlamaTokenizer):
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        self.memory = Memory(0)

    def remember(self, conversations: int) -> None:
        """Keep what was computed of so many of the last conversations, so that another question about the same picture
        starts behind it. 0 forgets them all, and is how an assistant starts; a fast one (`perception.optimize`) starts
        with two. Each takes the keys and values of its tokens. While it is on, the model's weights must not change.
        """
        self.memory = Memory(conversations)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"Assistant({millions:.1f} M parameters on {self.device}, context {self.processor.media.context})"

    # --- questions ---

    def ask(self, media: Any, question: str, *, media_type: MediaType = "auto", **options: Any) -> str:
        """The answer to one question.

        media       a picture or a video as paths, bytes, PIL images or arrays; a list of them; None for text alone
        media_type  "auto" looks at the bytes: a video file, a folder and an array N H W 3 are videos, all else pictures
        """
        return self.generate([question_about(media, question, media_type)], **options)[0].text

    def caption(self, media: Any, *, media_type: MediaType = "auto", **options: Any) -> Any:
        """A description of a picture or video; of a list of them, a list of descriptions, made as one batch."""
        listed = media if isinstance(media, list | tuple) else [media]
        parts = [media_part(item, media_type) for item in listed]
        asked = [CAPTION_VIDEO if isinstance(part, Clip) else CAPTION_IMAGE for part in parts]
        talks = [[Message("user", (part, Text(text=text)))] for part, text in zip(parts, asked, strict=True)]
        texts = [reply.text for reply in self.generate(talks, **options)] if talks else []
        return texts if listed is media else texts[0]

    def generate(
        self,
        conversations: Any,
        *,
        tiling: Any = None,
        max_tiles: int | None = None,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
        reuse: Session | None = None,
        cancel: Any = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Reply]:
        """Answers to a batch of conversations, each the one it would get alone; `samples` of each.

        batch_size  so many conversations at a time, for lists that do not fit into memory at once; all by default
        reuse       what an earlier turn of the same conversation left (`Chat` does that)
        cancel      asked before each step; True ends all answers as they are, and those not begun are empty

        Raises RequestError, LimitError and MediaError as the processor does, ConfigError for settings that cannot be.
        """
        config = self._config(settings)
        media = {"tiling": tiling, "max_tiles": max_tiles, "frames": frames, "start": start, "end": end, "fps": fps}
        context = self.processor.media.context
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        talks = read_conversations(conversations)
        size = batch_size or len(talks)
        config = replace(config, seed=config.seeds(len(talks)) if size < len(talks) else config.seed)
        replies: list[Reply] = []
        for at in range(0, len(talks), size):
            if at and cancel is not None and cancel():
                left = (len(talks) - at) * config.samples
                return replies + [Reply(text="", tokens=[], finish="cancelled")] * left
            batch = self.processor(talks[at : at + size], **media)
            some = replace(config, seed=part_of(config, at, len(batch)))
            with self.memory.lent(self.model, batch, some, reuse) as session:
                replies += generation.generate(
                    self.model, batch, self._read, some, context=context, reuse=session, cancel=cancel
                )
        return replies

    def stream(
        self,
        messages: Any,
        *,
        tiling: Any = None,
        max_tiles: int | None = None,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
        reuse: Session | None = None,
        cancel: Any = None,
        **settings: Any,
    ) -> Iterator[Words]:
        """The answer to one conversation as it is written. What is wrong is said here and now, not at the first piece.

        The pieces put together are the text of the reply, which the last one has as `reply`. Leaving the loop stops the
        work. `reuse=Session()`, the same at every turn, keeps what earlier turns computed (`Chat` does that).
        """
        config = self._config({"samples": 1, **settings})
        talks = read_conversations(messages)
        if len(talks) != 1 or config.samples != 1:
            raise RequestError("a stream is one answer to one conversation; generate() gives many")
        batch = self.processor(talks, tiling=tiling, max_tiles=max_tiles, frames=frames, start=start, end=end, fps=fps)
        context = self.processor.media.context
        job = Job.of(self.model, batch, self._read, config, {}, context, reuse, cancel, watched=True)
        return self._words(job)

    def score(
        self,
        conversations: Any,
        answers: Sequence[Any],
        *,
        end: bool = True,
        mean: bool = False,
        **options: Any,
    ) -> Any:
        """Log-probabilities of given answers: the largest is the choice.

        conversations  a list of them, and for each a list of answers; or one, and its answers
        end            with the end of the turn, so that "no" is not favoured over "nothing"
        mean           a token, so that long answers are not put down for their length
        options        of the processor
        return         a number an answer; a list of lists, or a list for one conversation
        """
        one = bool(answers) and isinstance(answers[0], str)
        listed = [answers] if one else answers
        if not listed or any(isinstance(row, str) or not row for row in listed):
            raise RequestError("answers are a list of texts for each conversation, at least one each")
        ends = [self.tokenizer.eot] if end else []
        ids = [[self.tokenizer.encode(answer) + ends for answer in row] for row in listed]
        batch = self.processor(conversations, **options)
        found = generation.score(self.model, batch, ids, context=self.processor.media.context)
        sums = [[sum(row) / (max(len(row), 1) if mean else 1) for row in rows] for rows in found]
        return sums[0] if one else sums

    def chat(self, system: str | None = None, **options: Any) -> "Chat":
        """A conversation that remembers; `options` hold for all its turns."""
        return Chat(self, system, options)

    # --- regions of pictures ---

    @overload
    def ground(self, image: Any, caption: str, *, draw: Literal[False] = False, **options: Any) -> list[Box]: ...
    @overload
    def ground(
        self, image: Any, caption: str, *, draw: Literal[True], **options: Any
    ) -> tuple[list[Box], Image.Image]: ...
    def ground(self, image: Any, caption: str, *, draw: bool = False, **options: Any) -> Any:
        """Where in a picture is what the sentence says: boxes in its pixels, none when the answer has none.

        draw  also give a copy of the picture with the boxes on it
        """
        picture = self._picture(image)
        answer = self._about(Picture(image=picture), GROUND.format(caption=caption), options)
        boxes = [box.upright for box in parse_boxes(answer, width=picture.width, height=picture.height)]
        return (boxes, draw_boxes(picture, boxes)) if draw else boxes

    def describe_region(
        self,
        media: Any,
        region: Box | Sequence[float] | Mapping[Any, Sequence[float] | None],
        *,
        drawn: bool = False,
        within: tuple[int, int] | None = None,
        total: int | None = None,
        **options: Any,
    ) -> str:
        """What is in a part of a picture, or happens in a part of a video.

        region  of a picture: a box, x1, y1, x2, y2 in its pixels; of a video: frame number -> such a box, drawn in red
        drawn   show the model the box as a red rectangle, in place of its numbers
        within  first and last frame that the description is about, counted among the frames the model sees; all of them
        total   what the question calls the length of the video; the frames the model sees

        Raises RequestError for a box that is none, or lies outside the picture.
        """
        if isinstance(region, Mapping):
            clip, seen = self._track(media, region, options)
            first, last = (0, seen - 1) if within is None else within
            question = DESCRIBE_TRACK.format(start=first, end=last, total=seen if total is None else total)
            return self._about(clip, question, {"max_new_tokens": 512, **options})
        picture, box = self._picture(media), _box(region)
        check_box(box, picture.width, picture.height)
        if drawn:
            return self._about(Picture(image=draw_boxes(picture, [box])), DESCRIBE_DRAWN, options)
        text = box.encode(width=picture.width, height=picture.height)
        return self._about(Picture(image=picture), DESCRIBE_BOX.format(box=text), options)

    # --- regions of videos ---

    def localize(
        self, video: Any, boxes: Mapping[Any, Sequence[float] | None], event: str, **options: Any
    ) -> Moment | None:
        """When something happens to what the boxes mark, in numbers of the frames the model sees; None if it does not
        say, or says what is not among them.

        boxes  frame number of the video -> x1, y1, x2, y2 in pixels
        """
        clip, seen = self._track(video, boxes, options)
        question = LOCALIZE.format(event=event, last=seen - 1, total=seen)
        moment = parse_moment(self._about(clip, question, {"max_new_tokens": 16, **options}))
        return moment if moment is not None and moment.start <= moment.end < seen else None

    def dense_captions(self, video: Any, boxes: Mapping[Any, Sequence[float] | None], **options: Any) -> list[Moment]:
        """What the subject in the boxes does, one thing after the other; frames and boxes as in `localize`."""
        clip, seen = self._track(video, boxes, options)
        question = DENSE_CAPTIONS.format(last=seen - 1, total=seen)
        return parse_moments(self._about(clip, question, {"max_new_tokens": 512, **options}))

    # --- keeping ---

    def save(
        self, folder: str | Path, format: Literal["native", "original", "hf"] = "native", *, replace: bool = True
    ) -> None:
        """Write model, tokenizer and configuration as one folder that `perception_lm.load` reads back.

        replace  False: a folder that holds another model is refused
        """
        from perception_lm.checkpoints import export

        media, pixels = self.processor.media, self.processor.preprocess
        export(self.model, folder, format, media=media, tokenizer=self.tokenizer, pixels=pixels, replace=replace)

    # --- helpers ---

    def _config(self, settings: dict[str, Any]) -> generation.GenerationConfig:
        known = generation.GenerationConfig.__dataclass_fields__
        if strange := sorted(set(settings) - set(known)):
            raise TypeError(f"unknown options {strange}; generation has {', '.join(sorted(known))}")
        return generation.GenerationConfig(**{"stop_tokens": self.tokenizer.stop_ids, **settings})

    def _read(self, ids: Sequence[int]) -> str:
        """The text of an answer. A decoder may have more rows than the tokenizer has ids; those say nothing."""
        return self.tokenizer.decode(id for id in ids if id < self.tokenizer.vocab)

    def _words(self, job: Job) -> Iterator[Words]:
        with self.memory.lent(self.model, job.batch, job.config, job.reuse) as session:
            pieces = generation.write(replace(job, reuse=session))
            try:
                for piece in pieces:
                    yield Words.of(piece)
            except GeneratorExit:  # the reader left, between two steps: what the session has is whole, and is kept
                pass
            finally:
                pieces.close()  # type: ignore[attr-defined]

    def _about(self, part: Part, question: str, options: dict[str, Any]) -> str:
        """An answer to a question of ours, in which what a user filled in is no mark."""
        message = Message("user", (part, Text(text=question, literal=True)))
        return self.generate([[message]], **options)[0].text

    def _picture(self, image: Any) -> Image.Image:
        """The picture as the model sees it: boxes are in its pixels."""
        return to_rgb(read_image(image, orient=self.processor.orient))

    def _track(self, video: Any, boxes: Mapping[Any, Any], options: dict[str, Any]) -> tuple[Clip, int]:
        """The video with its boxes, and how many frames of it the model sees."""
        clip = Clip(video=video, boxes={frame: box and _box(box).xyxy for frame, box in boxes.items()})
        named = {name: options[name] for name in ("frames", "start", "end", "fps") if name in options}
        (found,) = self.processor.estimate([[Message("user", (clip,))]], **named)
        return clip, found.pieces[0]


class Chat:
    """A conversation with its memory: messages, and what the model computed for them.

    chat.ask("What is this?", "cat.jpg"); chat.ask("What colour is it?")
    """

    def __init__(self, assistant: Assistant, system: str | None = None, options: Mapping[str, Any] | None = None):
        self.assistant, self.options = assistant, dict(options or {})
        self.start = [Message("system", (Text(text=system),))] if system is not None else []
        self.messages = list(self.start)
        self.session = Session()

    def ask(self, question: str, *media: Any, media_type: MediaType = "auto", **options: Any) -> str:
        return "".join(self.stream(question, *media, media_type=media_type, **options))

    def stream(
        self, question: str | Message, *media: Any, media_type: MediaType = "auto", **options: Any
    ) -> Iterator[Words]:
        """The next answer as it is written. A question that cannot be asked leaves the conversation as it was; an
        answer that is left early stays as far as it came."""
        if not isinstance(question, Message):
            (question,) = question_about(list(media), question, media_type)
        messages = [*self.messages, question]
        pieces = self.assistant.stream(messages, reuse=self.session, **{**self.options, **options})
        return self._listen(pieces, messages)

    def clear(self) -> None:
        """Begin anew; a system message stays."""
        self.messages = list(self.start)
        self.session.clear()

    def _listen(self, pieces: Iterator[Words], messages: list[Message]) -> Iterator[Words]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        except Exception:
            self.session.clear()
            raise
        except BaseException as stop:  # the reader left, or pressed Ctrl-C
            if not isinstance(stop, GeneratorExit):
                self.session.clear()  # a step may have been cut in half
            self._keep(messages, said)
            raise
        else:
            self._keep(messages, said)
        finally:
            pieces.close()  # type: ignore[attr-defined]

    def _keep(self, messages: list[Message], said: str) -> None:
        self.messages = [*messages, Message("assistant", (Text(text=said),))]


def part_of(config: generation.GenerationConfig, start: int, prompts: int) -> Any:
    """The seed for the answers to `prompts` prompts from number `start` on."""
    if not isinstance(config.seed, Sequence):
        return config.seed
    return config.seed[start * config.samples : (start + prompts) * config.samples]


def question_about(media: Any, question: str, media_type: MediaType = "auto") -> list[Message]:
    """A conversation of one question: the media first, then the text, whose marks count."""
    if not isinstance(question, str):
        raise RequestError(f"a question is text; given {type(question).__name__}")
    listed = [] if media is None else list(media) if isinstance(media, list | tuple) else [media]
    return [Message("user", (*(media_part(item, media_type) for item in listed), Text(text=question)))]


def media_part(source: Any, media_type: MediaType = "auto") -> Part:
    """A picture or a video as a part of a message. Raises RequestError for another `media_type`."""
    if media_type not in ("auto", "image", "video"):
        raise RequestError(f"media_type={media_type!r}; expected 'auto', 'image' or 'video'")
    if isinstance(source, Picture | Clip):
        return source
    if media_type == "auto":
        media_type = "video" if _is_video(source) else "image"
    return Clip(video=source) if media_type == "video" else Picture(image=source)


def _is_video(source: Any) -> bool:
    if isinstance(source, np.ndarray | Tensor):
        return source.ndim == 4
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return True
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or (
        hasattr(source, "seekable") and source.seekable()
    ):
        with open_media(source) as file:
            return sniff(file.read(HEAD)) in DEMUXERS
    return False


def _box(region: Any) -> Box:
    if isinstance(region, Box):
        return region
    if isinstance(region, Sequence) and not isinstance(region, str) and len(region) == 4:
        x1, y1, x2, y2 = map(float, region)
        return Box(x1, y1, x2, y2)
    raise RequestError(f"a region is a Box, or x1, y1, x2, y2 in pixels; given {region!r}")
