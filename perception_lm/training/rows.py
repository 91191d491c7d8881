"""Rows of a data file to conversations: the reference's format, and chat messages.

{"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}, {"from": "assistant", "value": "A cat."}]}
{"image": ["a.jpg", "b.jpg"], "conversations": [... "<image> and <image>" ...]}
{"image": "a.jpg", "bbox": [[x, y, w, h]], "width": 640, "height": 480, "conversations": [... "<|bbox0|>" ...]}
{"video": "a.mp4", "start_time": 1, "end_time": 5, "conversations": [...]}
{"video": "a.mp4", "bbox_map": {"17": [x1, y1, x2, y2]}, "conversations": [...]}
{"image": "a.jpg", "text": "a caption"}
{"conversations": [...]}
{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]}]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perception.errors import MediaError, RequestError
from perception_lm.chat import Clip, Conversation, Message, Part, Picture, Text, read_conversation, strip_marks
from perception_lm.regions import Box, fill_boxes

ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
MEDIA_KEYS = ("image", "images", "video")


def read_row(row: Any, root: Path | None = None) -> Conversation:
    """The conversation of a row.

    root  the folder that every path must stay in; None leaves media as they are given (pictures in memory, say)

    Raises RequestError for a row that is none, MediaError for a path that leaves the root.
    """
    if not isinstance(row, Mapping):
        raise RequestError(f"a row is a table; given {type(row).__name__}")
    if "messages" in row:
        talk = _answered(read_conversation(row["messages"]))
    elif "conversations" in row or "text" in row:
        talk = _conversations(row)
    else:
        raise RequestError(f"a row has 'conversations', 'text' or 'messages'; given {sorted(map(str, row))[:8]}")
    if not any(message.role == "assistant" for message in talk.messages):
        raise RequestError("nothing to learn: no turn of the assistant follows one of the user")
    return talk if root is None else _confined(talk, root)


def _answered(talk: Conversation) -> Conversation:
    """Without a last question that nobody answered."""
    messages = talk.messages
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    return Conversation(messages)


def _conversations(row: Mapping[str, Any]) -> Conversation:
    turns = _turns(row)
    if "bbox" in row:
        boxes = _boxes(row)
        turns = [(role, fill_boxes(text, boxes, width=row["width"], height=row["height"])) for role, text in turns]
    media, several = _media(row), isinstance(row.get("image"), list) and len(row["image"]) > 1
    messages: list[Message] = []
    waiting = list(media)
    for role, text in turns:
        parts: tuple[Part, ...] = (Text(text=text, literal=True),)
        if several and role == "user":
            # The marks say where each picture goes; `chat` checks that there are as many.
            marks = text.count("<image>")
            shown, waiting = waiting[:marks], waiting[marks:]
            parts = (*shown, Text(text=text)) if marks else parts
        elif role == "user" and waiting:
            # One picture or video stands before the first question, whose marks are left out.
            parts, waiting = (*waiting, Text(text=strip_marks(text), literal=True)), []
        messages.append(Message(role, parts))  # type: ignore[arg-type]
    if waiting:
        raise RequestError(f"{len(waiting)} of {len(media)} pictures have no mark <image> in the user's turns")
    return read_conversation(Conversation(tuple(messages)))


def _turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) from the user's first turn to the assistant's last."""
    if "conversations" not in row:
        if not isinstance(row["text"], str):
            raise RequestError(f"'text' is a {type(row['text']).__name__}; expected text")
        return [("user", ""), ("assistant", row["text"])]
    given = row["conversations"]
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise RequestError("'conversations' is empty or no list; expected turns of 'from' and 'value'")
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(given):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise RequestError(f"turn {number} has no 'from' and 'value' of text")
        role = ROLES.get(turn.get("from", "")) if isinstance(turn.get("from"), str) else None
        if role is None:
            raise RequestError(f"turn {number} is from {turn.get('from')!r}; expected 'human' or 'assistant'")
        turns.append((role, turn["value"]))
    system = turns[:1] if turns[0][0] == "system" else []
    turns = turns[len(system) :]
    while turns and turns[0][0] == "assistant":
        turns = turns[1:]
    while turns and turns[-1][0] == "user":
        turns = turns[:-1]
    if not turns:
        raise RequestError("nothing to learn: no turn of the assistant follows one of the user")
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise RequestError(f"turn {number} is from {role!r}; user and assistant take turns")
    return system + turns


def _media(row: Mapping[str, Any]) -> list[Picture | Clip]:
    if "images" in row:
        raise RequestError("the key is 'image', for several pictures too; given 'images'")
    if row.get("image") is not None and row.get("video") is not None:
        raise RequestError("a row has an 'image' or a 'video', not both; 'messages' can mix them")
    if (video := row.get("video")) is not None:
        boxes = row.get("bbox_map")
        if boxes is not None and not isinstance(boxes, Mapping):
            raise RequestError("'bbox_map' is frame number -> [x1, y1, x2, y2]")
        return [Clip(video=video, start=row.get("start_time"), end=row.get("end_time"), boxes=boxes)]
    image = row.get("image")
    if isinstance(image, list) and len(image) > 1:
        return [Picture(image=one, tiling="vanilla") for one in image]
    if isinstance(image, list):
        image = image[0] if image else None
    return [] if image is None else [Picture(image=image)]


def _boxes(row: Mapping[str, Any]) -> list[Box]:
    boxes, width, height = row["bbox"], row.get("width"), row.get("height")
    if not all(isinstance(side, int | float) and not isinstance(side, bool) and side > 0 for side in (width, height)):
        raise RequestError(f"boxes of a picture of {width!r} x {height!r}; expected its 'width' and 'height'")
    try:
        return [Box.from_xywh(float(x), float(y), float(w), float(h)) for x, y, w, h in boxes]
    except (TypeError, ValueError) as error:
        raise RequestError(f"'bbox' is {str(boxes)[:80]}; expected a list of [x, y, w, h] in pixels") from error


# --- paths ----------------------------------------------------------------------------------------------------------


def _confined(talk: Conversation, root: Path) -> Conversation:
    return Conversation(
        tuple(replace(m, parts=tuple(_part_within(part, root) for part in m.parts)) for m in talk.messages)
    )


def _part_within(part: Part, root: Path) -> Part:
    if isinstance(part, Picture):
        return replace(part, image=_source_within(part.image, root))
    return replace(part, video=_source_within(part.video, root)) if isinstance(part, Clip) else part


def _source_within(source: Any, root: Path) -> Any:
    if isinstance(source, list):
        return [_source_within(one, root) for one in source]
    if not isinstance(source, str):
        raise MediaError(f"a data file names media by their paths; given {type(source).__name__}")
    return path_within(root, source)


def path_within(root: Path, name: str) -> Path:
    """The file `name` under `root`, links followed. Raises MediaError for one that is elsewhere (F-126)."""
    if not name or "\0" in name or "://" in name:
        raise MediaError(f"media {name!r}: expected the path of a file under {root}")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise MediaError(f"media {name!r} is outside {root}; refused, set the root to a folder that holds all of it")
    return path
