"""What `perception demo` shows: models at work on bundled media, and one self-contained page about it.

Another package adds to the page through the entry-point group `perception.demo`: a function that gives more steps.
"""

import base64
import html
import io
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perception import __version__
from perception.files import atomic_write
from perception.media import read_image, read_video
from perception_encoder import samples
from perception_encoder.clip import CLIP
from perception_encoder.retrieval.embed import Embeddings, embed, fingerprint, nearest, save_embeddings
from perception_encoder.visualize import correspond, draw_matches, pca_image
from perception_encoder.zero_shot import DRAWING_TEMPLATES, ZeroShotClassifier

QUERIES = ("something to eat", "an animal", "a vehicle")
CLIP_LABELS = ("a city at night", "a rabbit", "a bowl of soup", "a football match")
HONEST = (
    "PE-Core-nano was trained on emoji drawings alone, for two and a quarter hours on one shared processor core. What "
    "it says of photographs and films is shown because the code path is the same as for the published models, not "
    "because the answer is good."
)

GROUP = "perception.demo"

Section = tuple[str, str, str]  # title, what it shows, body
Step = Callable[[Path], tuple[Section, dict[str, Any]]]  # a folder for files -> what to show, and what to sum up


def run(
    model: CLIP, out: Path, echo: Callable[[str], None], more: Iterable[Step] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Run every step, say what is happening, and write `out/index.html`. Returns the page and a summary.

    more  steps after the encoder's own; those that installed packages add when not given
    """
    start, sections = time.perf_counter(), []
    summary: dict[str, Any] = {}
    own: list[Step] = [partial(step, model) for step in (classify, search, components, matches, clip)]
    for step in [*own, *(added() if more is None else more)]:
        began = time.perf_counter()
        section, found = step(out)
        echo(f"{section[0]:<44}{time.perf_counter() - began:6.1f} s")
        sections.append(section)
        summary |= found
    summary["seconds"] = round(time.perf_counter() - start, 2)
    page = out / "index.html"
    with atomic_write(page) as temporary:
        temporary.write_text(render(sections, summary["seconds"]), "utf-8")
    return page, summary


def added() -> list[Step]:
    """The steps of other packages."""
    return [step for found in sorted(entry_points(group=GROUP), key=lambda e: e.name) for step in found.load()()]


def classify(model: CLIP, out: Path) -> tuple[Section, dict[str, Any]]:
    """Zero-shot: the labels are words, chosen now; nothing was trained on them as classes."""
    drawings = samples.drawings()
    labels = list(drawings)
    rows = ZeroShotClassifier(model, labels, DRAWING_TEMPLATES).predict(list(drawings.values()), top=3)
    cards = [
        figure(read_image(path), "".join(bar(p.label, p.score, strong=p.label == label) for p in row))
        for (label, path), row in zip(drawings.items(), rows, strict=True)
    ]
    right = sum(row[0].label == label for label, row in zip(labels, rows, strict=True))
    text = (
        f"{len(labels)} labels, written as words; {right} of {len(labels)} drawings are named right at first place. "
        "With PE-Core-nano no measure of anything: these drawings were chosen because it names them right among each "
        "other. Its card has the held-out figures."
    )
    found = {
        "classified": {
            path.name: [prediction._asdict() for prediction in row]
            for path, row in zip(drawings.values(), rows, strict=True)
        }
    }
    return ("Classify drawings without training", text, grid(cards)), found


def search(model: CLIP, out: Path) -> tuple[Section, dict[str, Any]]:
    """A folder becomes vectors in a file; sentences find pictures in it."""
    drawings = samples.drawings()
    names = list(drawings)
    vectors = embed(model, list(drawings.values()))
    save_embeddings(out / "drawings.safetensors", Embeddings(vectors, names, fingerprint(model)))
    with torch.inference_mode():
        queries = model.encode_text(model.tokenize(list(QUERIES)), normalize=True).cpu()
    body, found = "", {}
    for query, hits in zip(QUERIES, nearest(queries, vectors, k=3), strict=True):
        found[query] = [{"picture": names[row], "cosine": round(score, 4)} for row, score in hits]
        cards = [
            figure(read_image(drawings[names[row]]), f"{html.escape(names[row])} {score:.2f}") for row, score in hits
        ]
        body += f"<h3>“{html.escape(query)}”</h3>{grid(cards)}"
    text = f"{len(names)} pictures, {vectors.shape[1]} numbers each, stored in drawings.safetensors beside this page."
    return ("Embed a folder, search it with sentences", text, body), {"searched": found}


def components(model: CLIP, out: Path) -> tuple[Section, dict[str, Any]]:
    """Dense features as colours."""
    paths = [*list(samples.drawings().values())[:4], *list(samples.photos().values())[:2]]
    size = 4 * model.vision.config.image_size
    pictures = pca_image(model.vision, paths, size=size, scale=8)
    pictures[0].save(out / "pca.png")
    cards = [
        figure(read_image(path).convert("RGB").resize((size, size)), "") + figure(picture, "")
        for path, picture in zip(paths, pictures, strict=True)
    ]
    text = f"Patch features at {size} x {size} pixels, their three main directions as red, green and blue, shared axes."
    return ("Look at patch features", text, grid(cards)), {"pca": "pca.png"}


def matches(model: CLIP, out: Path) -> tuple[Section, dict[str, Any]]:
    """The same patches again in a mirrored, smaller copy."""
    path = next(iter(samples.drawings().values()))
    picture = read_image(path).convert("RGB").resize((256, 256))
    moved = Image.new("RGB", (256, 256), "white")
    moved.paste(picture.resize((180, 180)), (60, 40))
    found = correspond(model.vision, picture, moved, size=4 * model.vision.config.image_size)
    text = f"{int(found.mutual.sum())} patches of the left picture and of its smaller copy choose each other."
    body = grid([figure(draw_matches(picture, moved, found), "")])
    return ("Find the same place in two pictures", text, body), {"mutual_matches": int(found.mutual.sum())}


def clip(model: CLIP, out: Path) -> tuple[Section, dict[str, Any]]:
    """A film: frames by time, one embedding of all of them."""
    name, path = next(iter(samples.clips().items()))
    video = read_video(path, max_frames=8)
    frames = torch.stack([model.preprocess(frame) for frame in video.frames])[None]
    classifier = ZeroShotClassifier(model, CLIP_LABELS, "{}")
    with torch.inference_mode():
        scores = classifier.logits(model.encode_video(frames, protocol="raw-mean")).softmax(-1)[0].tolist()
    ranked = sorted(zip(CLIP_LABELS, scores, strict=True), key=lambda pair: -pair[1])
    cards = [
        figure(Image.fromarray(frame.permute(1, 2, 0).numpy()), f"{seconds:.2f} s")
        for frame, seconds in zip(video.frames, video.timestamps, strict=True)
    ]
    text = f"{path.name}: {len(video.frames)} of {video.num_frames} frames, read with {video.backend}. {HONEST}"
    body = grid(cards) + "".join(bar(label, score) for label, score in ranked)
    found = {"clip": name, "timestamps": [round(t, 3) for t in video.timestamps], "backend": video.backend}
    return ("Read a clip", text, body), found


def figure(picture: Image.Image, caption: str) -> str:
    """A picture inside the page, at most 256 pixels wide."""
    picture = picture.convert("RGB")
    if picture.width > 512:
        picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def bar(label: str, score: float, *, strong: bool = False) -> str:
    name = f"<b>{html.escape(label)}</b>" if strong else html.escape(label)
    return f'<div class="bar"><i style="width:{100 * score:.1f}%"></i><span>{name} {score:.0%}</span></div>'


def grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def render(sections: list[Section], seconds: float) -> str:
    body = "".join(f"<h2>{html.escape(t)}</h2><p>{html.escape(text)}</p>{content}" for t, text, content in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>perception demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} img {{ width: 100%; border-radius: 6px; background: #fff; border: 1px solid #eee }}
figcaption, .bar {{ font-size: .85rem }}
.bar {{ position: relative; background: #f2f2f2; margin: 3px 0; border-radius: 3px }}
.bar i {{ position: absolute; inset: 0 auto 0 0; background: #b9d7ff; border-radius: 3px }}
.bar span {{ position: relative; padding: 0 .4rem }} footer {{ margin-top: 3rem; color: #666; font-size: .85rem }}
</style></head><body><h1>perception demo</h1>
<p>Everything here ran on this machine in {seconds:.1f} s, without a network. {html.escape(HONEST)}</p>
{body}
<footer>perception-vision {html.escape(__version__)}. Media: perception_encoder/samples/ASSETS.md names sources,
authors and licences.</footer></body></html>
"""
