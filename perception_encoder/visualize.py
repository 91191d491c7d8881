"""Features made visible: principal components as colours, and which patch matches which.

B pictures  h w patch grid  D width  M matches
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from perception.errors import ConfigError
from perception.media import read_image
from perception_encoder.features import features
from perception_encoder.images import as_list, is_one


def pca_image(
    tower: Any, images: Any, *, layer: int = -1, norm: bool = False, size: int | None = None, scale: int | None = None
) -> Any:
    """The three main directions of the patch features as red, green and blue.

    images  one picture gives one image; a list gives a list whose colours share their axes, so that the same colour
            means the same kind of patch in all of them
    size    side in pixels fed to the tower (a multiple of its patch); more pixels, finer grid
    scale   pixels a patch in the result; by default as many as the tower's patch has

    Raises ConfigError when there are fewer than 4 patches in all.
    """
    one = is_one(images)
    grids = [features(tower, item, [layer], norm=norm, size=size)[0].patches[0] for item in as_list(images)]
    colours = pca_colours(torch.stack([grid.float().cpu() for grid in grids]))
    side = scale or tower.patch_size
    pictures = [
        Image.fromarray((c * 255).round().byte().numpy()).resize(
            (c.shape[1] * side, c.shape[0] * side), Image.Resampling.NEAREST
        )
        for c in colours
    ]
    return pictures[0] if one else pictures


def pca_colours(patches: Tensor) -> Tensor:
    """B h w D -> B h w 3 in [0, 1]: the projection on the three main axes of all patches together.

    Each axis is stretched from its 2nd to its 98th percentile; its sign makes the largest loading positive, so that the
    same features always get the same colours. Exact (eigenvectors of the covariance), hence deterministic.
    """
    flat = rearrange(patches, "b h w d -> (b h w) d").double()
    if len(flat) < 4 or flat.shape[1] < 3:
        raise ConfigError(
            f"{len(flat)} patches of {flat.shape[1]} channels have no three main axes; give a larger picture"
        )
    flat = flat - flat.mean(dim=0)
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)  # D 3, most variance first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    shown = flat @ axes
    low, high = shown.quantile(torch.tensor([0.02, 0.98], dtype=shown.dtype), dim=0)
    shown = ((shown - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    b, h, w, _ = patches.shape
    return rearrange(shown.float(), "(b h w) c -> b h w c", b=b, h=h, w=w)


class Matches(NamedTuple):
    """Which place of the second picture looks most like each place of the first.

    first   M 2   x, y in pixels of the first picture: centres of patches
    second  M 2   x, y in pixels of the second
    score   M     cosine of the two patches
    mutual  M     bool: each is the other's best
    """

    first: Tensor
    second: Tensor
    score: Tensor
    mutual: Tensor


@torch.inference_mode()
def correspond(
    tower: Any,
    first: Any,
    second: Any,
    points: Sequence[tuple[float, float]] | None = None,
    *,
    layer: int = -1,
    norm: bool = False,
    size: int | None = None,
) -> Matches:
    """Nearest patches between two pictures, by cosine.

    points  x, y in pixels of the first picture; by default the centre of each of its patches

    Raises ConfigError for a point outside the first picture.
    """
    if getattr(getattr(tower, "preprocess", None), "resize", "squash") != "squash":
        raise ConfigError("correspondence maps patches to pixels, which needs a preprocessing that squashes, not crops")
    pictures = [read_image(image).convert("RGB") for image in (first, second)]
    a, b = (features(tower, picture, [layer], norm=norm, size=size)[0].patches[0].float().cpu() for picture in pictures)
    (ah, aw, _), (bh, bw, _) = a.shape, b.shape
    similar = F.normalize(a.flatten(0, 1), dim=-1) @ F.normalize(b.flatten(0, 1), dim=-1).T  # ah*aw bh*bw
    if points is None:
        chosen, where = torch.arange(ah * aw), centres(ah, aw, pictures[0].size)
    else:
        where = torch.tensor(points, dtype=torch.float32).reshape(-1, 2)
        width, height = pictures[0].size
        if bool(((where < 0) | (where >= torch.tensor([width, height]))).any()):
            raise ConfigError(f"points {list(points)} are not all inside the first picture of {width} x {height}")
        column = (where[:, 0] * aw / width).long()
        chosen = (where[:, 1] * ah / height).long() * aw + column
    score, match = similar[chosen].max(dim=-1)
    mutual = similar[:, match].argmax(dim=0) == chosen
    return Matches(where, centres(bh, bw, pictures[1].size)[match], score, mutual)


def centres(h: int, w: int, size: tuple[int, int]) -> Tensor:
    """h*w 2: x, y of each patch's centre in a picture of `size` (width, height)."""
    x = (torch.arange(w) + 0.5) * size[0] / w
    y = (torch.arange(h) + 0.5) * size[1] / h
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1)


def draw_matches(first: Any, second: Any, matches: Matches, *, most: int = 24) -> Image.Image:
    """The two pictures side by side, their best mutual matches joined by lines."""
    left, right = (read_image(image).convert("RGB") for image in (first, second))
    canvas = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width, 0))
    draw = ImageDraw.Draw(canvas)
    ranked = (matches.score * matches.mutual).argsort(descending=True)[:most].tolist()
    for rank, i in enumerate(ranked):
        x1, y1 = matches.first[i].tolist()
        x2, y2 = (matches.second[i] + torch.tensor([left.width, 0])).tolist()
        hue = int(255 * rank / max(1, len(ranked)))
        colour = Image.fromarray(np.array([[[hue, 220, 230]]], dtype=np.uint8), "HSV").convert("RGB").getpixel((0, 0))
        draw.line([(x1, y1), (x2, y2)], fill=colour, width=2)
        for x, y in ((x1, y1), (x2, y2)):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    return canvas
