"""What the language model adds to `perception demo`: questions about a bar chart, a scene and a clip."""

import html
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from perception.cli import note
from perception.media import read_image
from perception_encoder.demo import Section, Step, figure, grid
from perception_lm.assistant import Assistant
from perception_lm.samples import samples

MODEL = "PLM-nano"
LARGER = 4  # the pictures are 64 pixels wide; so much larger they are shown
HONEST = (
    "PLM-nano knows drawings of this kind and nothing else; its card has the figures on held-out ones. The code path "
    "is that of the published models."
)


def steps() -> list[Step]:
    """For the entry-point group `perception.demo`; none where the model or its tokenizer's package is not here."""
    from perception_lm.zoo import list_models

    if not list_models(MODEL):
        return []
    if find_spec("tiktoken") is None:
        note(f"without {MODEL}, which needs tiktoken: pip install 'perception-vision[lm]'")
        return []
    return [partial(step, _assistant) for step in (chart, scene, clip)]


@cache
def _assistant() -> Assistant:
    from perception_lm.zoo import load

    return load(MODEL, device="cpu")


def chart(model: Any, out: Path) -> tuple[Section, dict[str, Any]]:
    """A bar chart, described and asked about."""
    entry = samples()["chart"]
    talk = _ask(model(), entry)
    body = grid([figure(_large(read_image(entry["path"])), "")]) + _answers(talk)
    return ("Ask about a bar chart", f"Answers of {MODEL}. {HONEST}", body), {"chart": _summary(talk)}


def scene(model: Any, out: Path) -> tuple[Section, dict[str, Any]]:
    """Shapes, counted and found."""
    entry = samples()["scene"]
    assistant, picture = model(), read_image(entry["path"])
    talk = _ask(assistant, entry)
    name, expected = entry["find"]
    boxes, drawn = assistant.ground(picture, f"the {name}", draw=True, max_new_tokens=24)
    found = " ".join(box.encode(width=picture.width, height=picture.height) for box in boxes)
    talk.append((f"Where is the {name}?", found, expected))
    cards = [figure(_large(picture), ""), figure(_large(drawn), f"{html.escape(name)} {html.escape(found)}")]
    text = "A count, an attribute, and a box in thousandths of the picture, drawn on it in red."
    return ("Count shapes, and find one", text, grid(cards) + _answers(talk)), {"scene": _summary(talk)}


def clip(model: Any, out: Path) -> tuple[Section, dict[str, Any]]:
    """Four frames, and what happens in them."""
    entry = samples()["clip"]
    talk = _ask(model(), entry)
    frames = sorted(entry["path"].glob("*.png"))
    cards = [figure(_large(read_image(path)), f"frame {i}") for i, path in enumerate(frames)]
    text = "A folder of frames is a video; what is asked cannot be told from one of them."
    return ("Ask about a clip", text, grid(cards) + _answers(talk)), {"video": _summary(talk)}


Talk = list[tuple[str, str, str]]  # question, answer, what it should be


def _ask(assistant: Assistant, entry: dict[str, Any]) -> Talk:
    asked = entry["questions"]
    return [(q, assistant.ask(entry["path"], q, max_new_tokens=96).strip(), expected) for q, expected in asked]


def _summary(talk: Talk) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer, "expected": expected} for question, answer, expected in talk]


def _answers(talk: Talk) -> str:
    rows = []
    for question, answer, expected in talk:
        right = "" if answer == expected else f" <small>(it shows: {html.escape(expected)})</small>"
        rows.append(f"<dt>{html.escape(question)}</dt><dd><b>{html.escape(answer)}</b>{right}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _large(picture: Image.Image) -> Image.Image:
    side = LARGER * picture.width, LARGER * picture.height
    return picture.convert("RGB").resize(side, Image.Resampling.NEAREST)
