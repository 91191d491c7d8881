"""One HTML page of results with the pictures in it: it needs no server and no other file."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from perception.errors import LimitError, MediaError
from perception_encoder.retrieval.index import Hit, Index

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.3rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; overflow: hidden; background: #fafafa }
figure img, .none { display: block; width: 100%; height: 12rem; object-fit: contain; background: #fff }
.none { color: #888; text-align: center; line-height: 12rem } figcaption { padding: .5rem .6rem; font-size: .82rem }
figcaption b { float: right } figcaption span { display: block; overflow-wrap: anywhere; color: #555 }
"""


def contact_sheet(index: Index, hits: Sequence[Hit], title: str, *, size: int = 256) -> str:
    """The results as a page: a small picture, the cosine, where it is, and what is known of it."""
    cards = "".join(_card(index, hit, size) for hit in hits)
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<p>{len(hits)} of {len(index)} pictures</p><div class="grid">{cards}</div></body></html>\n'
    )


def _card(index: Index, hit: Hit, size: int) -> str:
    lines = [hit.id]
    if hit.text and hit.text != hit.id:
        lines.append(hit.text)
    if hit.span:
        lines.append(f"{hit.span[0]:.2f} to {hit.span[1]:.2f} s")
    lines += [f"{name}: {value}" for name, value in hit.metadata.items() if value is not None]
    shown = "".join(f"<span>{html.escape(_printable(line))}</span>" for line in lines)
    return f"<figure>{_picture(index, hit, size)}<figcaption><b>{hit.score:.3f}</b>{shown}</figcaption></figure>"


def _picture(index: Index, hit: Hit, size: int) -> str:
    try:
        buffer = io.BytesIO()
        index.thumbnail(hit, size).save(buffer, "JPEG", quality=85)
    except (MediaError, LimitError, OSError):
        return '<div class="none">no picture</div>'
    name = html.escape(_printable(hit.text or hit.id))
    return f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode("ascii")}">'


def _printable(text: Any) -> str:
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")[:300]
