"""Messages to the prompt that Perception LM was trained on: first segments of data, then ids.

    [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]}]

becomes

    Special(<|begin_of_text|>) Special(<|start_header_id|>) "system" ... Slots(0) "What is this?" Special(<|eot_id|>)
    Special(<|start_header_id|>) "assistant" Special(<|end_header_id|>) "\\n\\n"

Only the template makes `Special` segments; what a user wrote stays text, whatever it says.

Media stand in a message where they are given, and the models expect a single picture before its question. A question
may also say itself where they go, with the marks `<image>` and `<video>`:

  - several pictures or videos: each goes to its mark, and there must be as many marks as media of that kind;
  - one picture or video in as many pieces (tiles or frames) as there are `<image>` marks: each piece goes to its mark;
  - one otherwise, and one mark: the mark and a line break beside it are left out, and the media come first;
  - any other number of marks is refused: the published code drops them and answers a question nobody asked.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol, TypeAlias

from perception.errors import RequestError
from perception_lm.tokenizer import BOS, END, END_HEADER, EOT, IMAGE, START_HEADER

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MAX_MESSAGES = 1000

_MARK = re.compile("<image>|<video>")
_MARK_AND_BREAK = re.compile(r"<(?:image|video)>\n|\n<(?:image|video)>|<(?:image|video)>")


# --- what a conversation is ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Text:
    """literal  `<image>` and `<video>` in it are text, not marks."""

    text: str
    literal: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture; `tiling` and `max_tiles` go before what the call says."""

    image: Any
    tiling: str | None = None
    max_tiles: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video; what is given here goes before what the call says.

    start, end  seconds
    fps         frames a second to choose from, before they are thinned to `frames`
    indices     frame numbers, in place of all of these
    boxes       frame number -> x1, y1, x2, y2 in pixels, drawn in red
    """

    video: Any
    frames: int | None = None
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    indices: Sequence[int] | None = None
    boxes: Mapping[Any, Sequence[float] | None] | None = None


Media: TypeAlias = Picture | Clip
Part: TypeAlias = Text | Picture | Clip
_PARTS: dict[str, type[Part]] = {"text": Text, "image": Picture, "video": Clip}


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def media(self) -> list[Media]:
        return [part for part in self.parts if not isinstance(part, Text)]


@dataclass(frozen=True)
class Conversation:
    """Messages that have been checked: system first if at all, then user and assistant in turn."""

    messages: tuple[Message, ...]

    @property
    def media(self) -> list[Media]:
        return [part for message in self.messages for part in message.media]


def read_conversation(messages: Any) -> Conversation:
    """Check messages of role and content, as chat clients send them.

    content  text, or a list of parts {"type": "text", "text": ...}, {"type": "image", "image": ...},
             {"type": "video", "video": ...}; `Text`, `Picture` and `Clip` name the other keys

    Raises RequestError naming the message and what is wrong with it.
    """
    if isinstance(messages, Conversation):
        return messages
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"a conversation is a list of messages, at least one; given {_show(messages)}")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages)} messages; the limit is MAX_MESSAGES={MAX_MESSAGES}")
    read = tuple(_message(message, f"message {number}") for number, message in enumerate(messages))
    turns = read[1:] if read[0].role == "system" else read
    for number, message in enumerate(turns, start=len(read) - len(turns)):
        expected = ("user", "assistant")[(number - len(read) + len(turns)) % 2]
        if message.role != expected:
            raise RequestError(
                f"message {number} is of role {message.role!r}; expected {expected!r}: after a system message, which "
                "may come first, user and assistant take turns, and the user begins"
            )
    return Conversation(read)


def _message(message: Any, where: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        keys = sorted(map(str, message)) if isinstance(message, Mapping) else _show(message)
        raise RequestError(f"{where} is {keys}; expected the keys role and content")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"{where} is of role {_show(role)}; expected 'system', 'user' or 'assistant'")
    if isinstance(content, str):
        return Message(role, (Text(text=content),))
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise RequestError(f"{where} has content {_show(content)}; expected text or a list of parts, at least one")
    parts = tuple(_part(part, f"{where}, part {number}") for number, part in enumerate(content))
    if role != "user" and any(not isinstance(part, Text) for part in parts):
        raise RequestError(f"{where} is of role {role!r} and has media; only the user shows pictures and videos")
    return Message(role, parts)


def _part(part: Any, where: str) -> Part:
    if isinstance(part, Text | Picture | Clip):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        raise RequestError(f"{where} is {_show(part)}; expected a part of type 'text', 'image' or 'video'")
    values = {key: part[key] for key in part if key != "type"}
    known = _PARTS[kind].__dataclass_fields__
    if strange := sorted(str(key) for key in values if key not in known):
        raise RequestError(f"{where} has unknown keys {strange}; a part of type {kind!r} has {sorted(known)}")
    if values.get(kind) is None:
        raise RequestError(f"{where} is of type {kind!r} but has no {kind!r}")
    if kind == "text" and not isinstance(values["text"], str):
        raise RequestError(f"{where} has text {_show(values['text'])}; expected text")
    return _PARTS[kind](**values)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- segments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Special:
    """A special token, by name."""

    name: str


@dataclass(frozen=True)
class Slots:
    """The place of a picture or video: of all its pieces, or of one.

    item   which of the conversation's media
    piece  which of its tiles or frames; None: all
    """

    item: int
    piece: int | None = None


Segment: TypeAlias = str | Special | Slots


def render(conversation: Conversation, pieces: Sequence[int], *, add_generation_prompt: bool = True) -> list[Segment]:
    """The prompt of a conversation.

    pieces                 tiles or frames of each of its media
    add_generation_prompt  end with the header of the answer

    Raises RequestError when marks and media do not agree, or there is nothing to answer.
    """
    if add_generation_prompt and conversation.messages[-1].role != "user":
        raise RequestError(
            f"the last message is of role {conversation.messages[-1].role!r}; an answer needs a user's message before "
            "it (add_generation_prompt=False renders a conversation as it is)"
        )
    segments = [segment for turn, _ in _turns(conversation, pieces) for segment in turn]
    return [*segments, *_header("assistant")] if add_generation_prompt else segments


def render_training(
    conversation: Conversation, pieces: Sequence[int], *, warmup: bool = False
) -> list[tuple[list[Segment], bool]]:
    """The conversation turn by turn, each with whether the model learns to write it.

    warmup  the plain form of the first stage: media, then the caption and a line break, nothing else

    An answer is learned with its header, its end and, after the last one, the end of the text.
    """
    if warmup:
        media: list[Segment] = [Slots(item) for item in range(len(conversation.media))]
        captions = [message for message in conversation.messages if message.role == "assistant"]
        learned: list[tuple[list[Segment], bool]] = [([_plain(caption) + "\n"], True) for caption in captions]
        return [(media, False), *learned]
    turns = _turns(conversation, pieces)
    if turns[-1][1]:
        turns[-1] = ([*turns[-1][0], Special(END)], True)
    return turns


def _turns(conversation: Conversation, pieces: Sequence[int]) -> list[tuple[list[Segment], bool]]:
    """Each message in its frame, and whether it is the assistant's."""
    messages = conversation.messages
    if messages[0].role != "system":
        messages = (Message("system", (Text(text=SYSTEM),)), *messages)
    turns: list[tuple[list[Segment], bool]] = []
    item = 0
    for message in messages:
        count = len(message.media)
        body = _body(message, item, pieces[item : item + count]) if message.role == "user" else [_plain(message)]
        start: list[Segment] = [Special(BOS)] if not turns else []
        framed = [*start, *_header(message.role), *(segment for segment in body if segment != ""), Special(EOT)]
        turns.append((framed, message.role == "assistant"))
        item += count
    return turns


def _header(role: str) -> list[Segment]:
    return [Special(START_HEADER), role, Special(END_HEADER), "\n\n"]


def _plain(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def _body(message: Message, first: int, pieces: Sequence[int]) -> list[Segment]:
    """Text and slots of a user's message, in their order."""
    media = message.media
    texts = [part.text for part in message.parts if isinstance(part, Text) and not part.literal]
    marks = [mark for text in texts for mark in _MARK.findall(text)]
    if not marks:
        items = iter(range(first, first + len(media)))
        return [part.text if isinstance(part, Text) else Slots(next(items)) for part in message.parts]
    if len(media) == 1 and marks == ["<image>"] * pieces[0]:
        return _at_marks(message, iter(Slots(first, piece) for piece in range(pieces[0])))
    if len(media) == 1 and len(marks) == 1:
        return [Slots(first), *(strip_marks(part) for part in message.parts if isinstance(part, Text))]
    by_kind: dict[str, list[Slots]] = {"<image>": [], "<video>": []}
    for item, part in enumerate(media, start=first):
        by_kind["<image>" if isinstance(part, Picture) else "<video>"].append(Slots(item))
    for kind, slots in by_kind.items():
        if marks.count(kind) != len(slots):
            raise RequestError(
                f"a message has {marks.count(kind)} {kind} marks and {len(slots)} {kind[1:-1]} parts; use as many "
                'marks as parts, or none, or say {"type": "text", "literal": True} to write about marks'
            )
    return _at_marks(message, iter([by_kind[mark].pop(0) for mark in marks]))


def _at_marks(message: Message, slots: Iterator[Slots]) -> list[Segment]:
    body: list[Segment] = []
    for part in message.parts:
        if not isinstance(part, Text):
            continue
        start = 0
        for mark in () if part.literal else _MARK.finditer(part.text):
            body += [part.text[start : mark.start()], next(slots)]
            start = mark.end()
        body.append(part.text[start:])
    return body


def strip_marks(part: "Text | str") -> str:
    """A text without its marks, each taken out with one line break beside it."""
    if isinstance(part, Text):
        return part.text if part.literal else strip_marks(part.text)
    return _MARK_AND_BREAK.sub("", part)


# --- ids ----------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    special: dict[str, int]
    image_token: int

    def encode(self, text: str) -> list[int]: ...


def to_ids(segments: Sequence[Segment], tokenizer: Tokenizer, count: Callable[[Slots], int]) -> list[int]:
    """The ids of segments.

    count  how many ids a place for media takes
    """
    ids: list[int] = []
    text = ""
    for segment in (*segments, None):
        if isinstance(segment, str):
            text += segment  # what stands side by side is encoded together, as one string would be
            continue
        if text:
            ids += tokenizer.encode(text)
            text = ""
        if isinstance(segment, Special):
            ids.append(tokenizer.special[segment.name])
        elif isinstance(segment, Slots):
            ids += [tokenizer.image_token] * count(segment)
    return ids


def show(segments: Sequence[Segment], count: Callable[[Slots], int]) -> str:
    """A prompt for people: `<|image|>*256 ` where 256 ids wait for media."""
    text = ""
    for slots, run in groupby(segments, key=lambda segment: isinstance(segment, Slots)):
        if slots:
            text += f"{IMAGE}*{sum(count(segment) for segment in run if isinstance(segment, Slots))} "
        else:
            text += "".join(segment.name if isinstance(segment, Special) else str(segment) for segment in run)
    return text
