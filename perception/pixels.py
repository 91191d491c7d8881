"""Pictures to pixels, as the weights expect to be shown them.

`PixelSpec` is that expectation as data: it travels with the weights, and its fingerprint with all that they make.

B batch  N frames  H W pixels  S the side of the square shown to the model
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from perception.borrowing import borrow
from perception.errors import ConfigError, LimitError, MediaError
from perception.media import MAX_PIXELS, describe, read_image, to_rgb
from perception.settings import is_number, read_settings

log = logging.getLogger(__name__)
VERSION = 1  # of the rules in this file: another number means other pixels
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CHUNK = 2**25  # values of frames made float at once: 128 MB


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """How a picture becomes the square of pixels a model was trained on.

    size           S
    resize         "squash": to S x S, the aspect ratio ignored; "crop": the short side to S, then the middle
    interpolation  always antialiased
    mean, std      of each channel, after the codes 0..255 became 0..1

    The order is the published one: resize in the mode the file has, then RGB, then numbers. So a palette or a one-bit
    picture is resized by nearest neighbour, and alpha is dropped after resizing.
    """

    size: int
    resize: Literal["squash", "crop"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= 16384:
            raise ConfigError(f"PixelSpec.size is {self.size!r}; expected a whole number, 1 to 16384")
        if self.resize not in ("squash", "crop"):
            raise ConfigError(f"PixelSpec.resize is {self.resize!r}; expected 'squash' or 'crop'")
        if self.interpolation not in _FILTERS:
            raise ConfigError(f"PixelSpec.interpolation is {self.interpolation!r}; expected 'bilinear' or 'bicubic'")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or len(values) != 3 or not all(map(is_number, values)):
                raise ConfigError(f"PixelSpec.{name} is {values!r}; expected three numbers, one a channel")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) <= 0:
            raise ConfigError(f"PixelSpec.std is {self.std}; expected numbers above 0")

    def __call__(self, image: object, orient: bool = True) -> Tensor:
        """3 S S float32 of whatever `read_image` reads. `orient=False` ignores EXIF, as the reference does.

        Raises MediaError or LimitError, as `read_image` does.
        """
        return self.normalize(self.codes(image, orient))

    def codes(self, image: object, orient: bool = True, max_pixels: int = MAX_PIXELS) -> Tensor:
        """3 S S uint8: the picture resized, before it is normalized."""
        return self._codes(read_image(image, orient=orient, max_pixels=max_pixels))

    def stretch(self, rgb: Image.Image, width: int, height: int) -> Tensor:
        """3 height width uint8: an RGB picture at another size, its aspect ratio ignored. Tiles are cut from it."""
        resized = rgb.resize((width, height), _FILTERS[self.interpolation])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def fast(self, decode: Literal["whole", "scaled"] = "whole") -> "FastPixels":
        """The same rule, obeyed faster: `clip.preprocess = clip.preprocess.fast()`. See `FastPixels`."""
        return FastPixels(**{**_values(self), "decode": decode})

    def normalize(self, codes: Tensor) -> Tensor:
        """... 3 H W uint8 to float32: (codes / 255 - mean) / std."""
        return normalize(codes, self.mean, self.std)

    def batch(self, images: Iterable[object], *, orient: bool = True, workers: int | None = None) -> Tensor:
        """B 3 S S float32. Raises MediaError naming the position of the first picture that cannot be read."""
        return load_batch(images, self, orient=orient, workers=workers).pixels

    def frames(self, frames: Tensor) -> Tensor:
        """N 3 S S float32 of video frames, on the device they are on.

        frames   N 3 H W uint8

        The tensor path of the published models: float arithmetic between two roundings to codes. It differs from the
        path of a picture by a code here and there, because Pillow rounds once more in between.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape[2:]:
            given = f"{tuple(frames.shape)} {str(frames.dtype).removeprefix('torch.')}"
            raise MediaError(f"{given} are no frames; expected N 3 H W uint8")
        if not len(frames):
            return torch.empty(0, 3, self.size, self.size, device=frames.device)
        at_once = max(1, _CHUNK // frames[0].numel())
        return self.normalize(torch.cat([self._resized_frames(part) for part in frames.split(at_once)]))

    def to_dict(self) -> dict[str, Any]:
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in _values(self).items()}
        return {"version": VERSION, **data}

    @classmethod
    def from_dict(cls, data: object) -> "PixelSpec":
        """Raises ConfigError for another version, an unknown key, a missing key or a wrong type: nothing is assumed."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a pixel specification is {type(data).__name__}; expected a table")
        if data.get("version") != VERSION:
            raise ConfigError(f"the pixel specification has version {data.get('version')!r}; expected {VERSION}")
        if cls is PixelSpec and "decode" in data:
            return FastPixels.from_dict(data)
        if missing := [field.name for field in fields(cls) if field.name not in data]:
            raise ConfigError(f"the pixel specification lacks the keys {missing}")
        return read_settings(cls, {key: data[key] for key in data if key != "version"}, "pixel specification")

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits; equal exactly when the pixels are."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def _codes(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(to_rgb(self._resized(image)))).permute(2, 0, 1).contiguous()

    def _resized(self, image: Image.Image) -> Image.Image:
        S, method = self.size, _FILTERS[self.interpolation]
        if self.resize == "squash":
            return image.resize((S, S), method)
        width, height, left, top = _crop_window(image.width, image.height, S)
        if width * height > MAX_PIXELS:
            # Of a strip of 1 x 20000, made S wide, only what the crop keeps is resized. The filters see beyond the box.
            x, y = image.width / width, image.height / height
            return image.resize((S, S), method, box=(left * x, top * y, (left + S) * x, (top + S) * y))
        return image.resize((width, height), method).crop((left, top, left + S, top + S))

    def _resized_frames(self, frames: Tensor) -> Tensor:
        S, crop = self.size, None
        width, height = S, S
        if self.resize == "crop":
            width, height, left, top = _crop_window(frames.shape[3], frames.shape[2], S)
            if width * height > MAX_PIXELS:
                raise LimitError(f"frames of {frames.shape[3]}x{frames.shape[2]} are too long a strip to crop to {S}")
            crop = (..., slice(top, top + S), slice(left, left + S))
        mode = self.interpolation
        resized = F.interpolate(frames.float(), size=(height, width), mode=mode, align_corners=False, antialias=True)
        codes = resized.round_().clamp_(0, 255).to(torch.uint8)
        return codes if crop is None else codes[crop]


@dataclass(frozen=True, kw_only=True)
class FastPixels(PixelSpec):
    """A `PixelSpec` obeyed by PyTorch's resize of bytes instead of Pillow's: the same filters, in vectors.

    decode  "whole": bilinear, codes are within 1 of the `PixelSpec`'s and few differ at all (18 of 75 million were off
            by 2, where 1000 pixels became 800). Bicubic, within 2 where both take the width first. From version 13 on
            Pillow takes the height first when that is less work; at hard edges the two orders overshoot differently, by
            up to 31 codes in black-and-white noise
            "scaled": besides, a JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves at least 1.5 S on each side. On
            the bundled photographs, S from 64 to 448: 1.4 codes in the mean of the worst, 51 at its hardest edge

    Pictures that are neither RGB nor grey (palettes, alpha, CMYK) go through Pillow, code for code. What it makes has
    another fingerprint than the plain rule's, so vectors of the two are not mixed up without being told.
    """

    decode: Literal["whole", "scaled"] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode not in ("whole", "scaled"):
            raise ConfigError(f"FastPixels.decode is {self.decode!r}; expected 'whole' or 'scaled'")

    @property
    def plain(self) -> PixelSpec:
        """The rule itself: Pillow's pixels."""
        return PixelSpec(**{name: value for name, value in _values(self).items() if name != "decode"})

    def codes(self, image: object, orient: bool = True, max_pixels: int = MAX_PIXELS) -> Tensor:
        at_least = math.ceil(1.5 * self.size) if self.decode == "scaled" else None
        return self._codes(read_image(image, orient=orient, max_pixels=max_pixels, at_least=at_least))

    def stretch(self, rgb: Image.Image, width: int, height: int) -> Tensor:
        return self._bytes(_planes(rgb, width * height), width, height)[0, :3]

    def _codes(self, image: Image.Image) -> Tensor:
        S = self.size
        width, height, left, top = S, S, 0, 0
        if self.resize == "crop":
            width, height, left, top = _crop_window(image.width, image.height, S)
        if image.mode not in ("RGB", "L") or width * height > MAX_PIXELS:
            return super()._codes(image)
        codes = self._bytes(_planes(image, width * height), width, height)[0, :3, top : top + S, left : left + S]
        return codes.expand(3, S, S).contiguous()

    def _resized_frames(self, frames: Tensor) -> Tensor:
        if frames.device.type != "cpu" or self.resize == "crop":  # only the CPU's kernel takes bytes
            return super()._resized_frames(frames)
        return self._bytes(frames, self.size, self.size)

    def _bytes(self, codes: Tensor, width: int, height: int) -> Tensor:
        """B C H W uint8 -> B C height width uint8; fastest with the channels last in memory, as decoders leave them."""
        mode = self.interpolation
        return F.interpolate(codes, size=(height, width), mode=mode, align_corners=False, antialias=True)


def _planes(image: Image.Image, wanted: int) -> Tensor:
    """1 C H W uint8 of a picture, the channels last in memory; C is 4, the last of no meaning, where it is borrowed.

    wanted  pixels that it will become: for fewer than it has, looking at a fourth byte costs less than a copy without

    The batch's axis is there before the channels move: put on afterwards, it gets a stride by which PyTorch takes the
    picture for one with the channels first, and its resize copies it twice.
    """
    codes = borrow(image) if wanted < image.width * image.height else None
    if codes is None:
        codes = torch.from_numpy(np.array(image))
    return (codes[..., None] if codes.ndim == 2 else codes)[None].permute(0, 3, 1, 2)


def _values(spec: PixelSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(spec)}


def normalize(codes: Tensor, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)) -> Tensor:
    """... 3 H W uint8 to float32: (codes / 255 - mean) / std, in this order, as the published numbers were made."""
    return normalize_into(torch.empty(codes.shape, device=codes.device), codes, mean, std)


def normalize_into(pixels: Tensor, codes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`normalize` into memory that is there already: ... 3 H W float32. Returns it."""
    shift, scale = (torch.tensor(values, device=codes.device)[:, None, None] for values in (mean, std))
    if all(math.frexp(value)[0] == 0.5 for value in std):
        # Dividing by a power of two rounds nothing, so it may come first: a pass less, and the same to the bit.
        return pixels.copy_(codes).div_(255 * scale).sub_(shift / scale)
    return pixels.copy_(codes).div_(255).sub_(shift).div_(scale)


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip", "log"):
        raise ConfigError(f"on_error={on_error!r}; choose from raise, skip, log")


class LoadedBatch(NamedTuple):
    """Pictures read together.

    pixels   B 3 S S float32, those that could be read, in the order given
    indices  B positions in what was given
    errors   (position, error) of the others
    """

    pixels: Tensor
    indices: tuple[int, ...]
    errors: tuple[tuple[int, MediaError | LimitError], ...]


def load_batch(
    sources: Iterable[object],
    spec: Callable[..., Tensor],
    *,
    on_error: str = "raise",
    orient: bool = True,
    workers: int | None = None,
    first: int = 0,
) -> LoadedBatch:
    """Read pictures with a few threads, in order.

    spec      a PixelSpec, or another preprocessing called as `spec(image, orient=orient)`
    on_error  "raise": the first bad picture raises, its position named; "skip": it is left out and listed in `errors`;
              "log": that, and a warning in the log
    workers   threads; a few by default, 1 for none
    first     position of the first of them in a longer list, for messages

    Raises ConfigError for an unknown `on_error`, and with "raise" MediaError or LimitError.
    """
    check_on_error(on_error)
    listed = list(sources)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers={workers}; expected 1 or more")

    def load(source: object) -> Tensor | MediaError | LimitError:
        try:
            return spec(source, orient=orient)
        except (MediaError, LimitError) as error:
            return error

    read: list[Tensor] = []
    kept: list[int] = []
    errors: list[tuple[int, MediaError | LimitError]] = []
    for index, result in enumerate(_map(load, listed, min(workers, len(listed)))):
        if isinstance(result, Tensor):
            read.append(result)
            kept.append(index)
        elif on_error == "raise":
            raise type(result)(f"picture {first + index}: {result}") from result
        else:
            errors.append((index, result))
            if on_error == "log":
                log.warning("left out picture %d, %s: %s", first + index, describe(listed[index]), result)
    side = getattr(spec, "size", 0)
    pixels = torch.stack(read) if read else torch.empty(0, 3, side, side)
    return LoadedBatch(pixels, tuple(kept), tuple(errors))


def _map(work: Callable[[object], Any], items: Sequence[object], workers: int) -> Iterable[Any]:
    if workers < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="perception-pixels") as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _crop_window(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Width and height once the short side is `size`, and the left and top of the middle square."""
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    return width, height, round((width - size) / 2), round((height - size) / 2)
