"""One large picture as a small one and a grid of tiles, so that a model of one size sees the details.

M tiles, the small picture among them  T side of a tile  cols x rows the grid

    +---+   +---+---+---+
    | 0 |   | 1 | 2 | 3 |    chunk 0 is all of the picture, small; then the tiles, row by row
    +---+   +---+---+---+
            | 4 | 5 | 6 |
            +---+---+---+

The choice of grid is the published one of Perception LM, ties and floors included: its models know no other.
"""

import math
import mmap
import warnings
from contextlib import suppress
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from perception.errors import ConfigError, LimitError
from perception.media import read_image, to_rgb
from perception.pixels import PixelSpec, normalize_into

MAX_TILES = 1024  # a setting above this is a mistake: 36 tiles are 9472 tokens
LARGE = 2**25  # bytes from which malloc maps memory anew each time
STRETCH = 16  # warn when a side is enlarged more than this


def choose_grid(width: int, height: int, tile: int = 448, max_tiles: int = 36) -> tuple[int, int]:
    """(cols, rows) for a picture of `width` x `height`: at most `max_tiles` tiles in all.

    If the picture fits on some grid without shrinking, the grid on which it could be enlarged most; otherwise the
    largest grid of the nearest aspect ratio. So small pictures get many tiles, and a picture too large for every grid
    may get fewer than a smaller one: 800 x 600 gives 7 x 5, 4000 x 3000 gives 4 x 3.

    Raises ConfigError for sizes below 1, LimitError for more than MAX_TILES.
    """
    for name, value in (("width", width), ("height", height), ("tile", tile), ("max_tiles", max_tiles)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}; expected a whole number, 1 or more")
    if max_tiles > MAX_TILES:
        raise LimitError(f"max_tiles={max_tiles}; the limit is MAX_TILES={MAX_TILES}")
    return _grid(width, height, tile, max_tiles)


@lru_cache(4096)  # pictures of one camera have one size
def _grid(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    fitting = _most_enlarging(width, height, tile, max_tiles)
    return fitting if fitting is not None else _nearest_shape(width, height, max_tiles)


def tile_image(
    image: object,
    tile: int = 448,
    max_tiles: int = 36,
    *,
    spec: PixelSpec | None = None,
    thumbnail: bool = True,
    orient: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """M 3 T T: the picture small, then its tiles row by row; `choose_grid` says how many.

    image      whatever `perception.media.read_image` reads
    spec       mean, std and interpolation; its size must be `tile`. Bicubic, 0.5 and 0.5 by default. A fast one
               (`spec.fast()`) resizes faster, bicubic within two codes where Pillow takes the width first
               (`FastPixels` has the exceptions); JPEGs are decoded whole in any case
    thumbnail  False: the tiles alone. With max_tiles=1 that is the picture in one square
    dtype      a floating dtype; computed in float32 and rounded once. `tile_codes` gives uint8

    The picture becomes RGB first, and then is stretched to the grid: its aspect ratio is not kept.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"normalised tiles of {dtype}; expected a floating dtype, or use tile_codes for uint8")
    spec = _spec(tile, spec)
    rows = _rows(image, tile, max_tiles, spec, thumbnail, orient)
    # Row by row of tiles, so that the passes of the arithmetic find what they need in the cache, straight to its place.
    tiles = allocate((sum(map(len, rows)), 3, tile, tile), dtype)
    scratch = None if dtype == torch.float32 else torch.empty(max(map(len, rows)), 3, tile, tile)
    for place, codes in zip(tiles.split([len(row) for row in rows]), rows, strict=True):
        numbers = normalize_into(place if scratch is None else scratch[: len(codes)], codes, spec.mean, spec.std)
        if scratch is not None:
            place.copy_(numbers)
    return tiles


def tile_codes(
    image: object,
    tile: int = 448,
    max_tiles: int = 36,
    *,
    spec: PixelSpec | None = None,
    thumbnail: bool = True,
    orient: bool = True,
) -> Tensor:
    """M 3 T T uint8: `tile_image` before it is normalized."""
    rows = _rows(image, tile, max_tiles, _spec(tile, spec), thumbnail, orient)
    tiles = allocate((sum(map(len, rows)), 3, tile, tile), torch.uint8)
    for place, codes in zip(tiles.split([len(row) for row in rows]), rows, strict=True):
        place.copy_(codes)
    return tiles


def _rows(image: object, tile: int, max_tiles: int, spec: PixelSpec, thumbnail: bool, orient: bool) -> list[Tensor]:
    """The thumbnail, then each row of tiles, as views n 3 T T of what was stretched; nothing is copied."""
    rgb = to_rgb(read_image(image, orient=orient))
    cols, rows = choose_grid(rgb.width, rgb.height, tile, max_tiles)
    if max(cols * tile / rgb.width, rows * tile / rgb.height) > STRETCH:
        warnings.warn(
            f"a picture of {rgb.width}x{rgb.height} is stretched to {cols}x{rows} tiles of {tile}, "
            f"{cols * rows + thumbnail} in all; a lower max_tiles than {max_tiles} would do",
            stacklevel=3,
        )
    small = [spec.stretch(rgb, tile, tile)[None]] if thumbnail else []
    large = spec.stretch(rgb, cols * tile, rows * tile)
    return small + [row.unflatten(2, (cols, tile)).permute(2, 0, 1, 3) for row in large.split(tile, dim=1)]


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, in huge pages where the system grants them.

    36 tiles are 87 MB: memory that malloc takes from the system and gives back each time, and the first touch of that
    many small pages takes five times as long as filling them does.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)  # keeps the mapping alive, and ends it


def cut(pixels: Tensor, cols: int, rows: int) -> Tensor:
    """C H W to (rows * cols) C H/rows W/cols, row by row."""
    return rearrange(pixels, "c (rows h) (cols w) -> (rows cols) c h w", rows=rows, cols=cols)


def untile(tiles: Tensor, cols: int, rows: int, thumbnail: bool = True) -> Tensor:
    """Tiles back to C H W: M C T T, the first of them left out when it is the thumbnail."""
    if len(tiles) != cols * rows + thumbnail:
        small = " and a thumbnail" if thumbnail else ""
        raise ConfigError(f"{len(tiles)} tiles are not {cols} x {rows}{small}")
    return rearrange(tiles[int(thumbnail) :], "(rows cols) c h w -> c (rows h) (cols w)", rows=rows, cols=cols)


@lru_cache
def arrangements(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (cols, rows) of at most `max_tiles` tiles in the order in which they are tried.

    From many tiles to few, grids of one aspect ratio together where the first of them stands: ties depend on it.
    """
    groups: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for cols in range(1, count + 1):
            if count % cols == 0:
                groups.setdefault(cols / (count // cols), []).append((cols, count // cols))
    return tuple(grid for group in groups.values() for grid in group)


def _most_enlarging(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int] | None:
    shape = width / height
    best, best_size = None, -1.0
    for cols, rows in arrangements(max_tiles):
        if cols * tile < width or rows * tile < height:
            continue
        # Floats and floors as published: whole-number arithmetic would break other ties.
        enlarge = min(cols * tile / width, rows * tile / height)
        size: float
        if shape > 1:
            size = math.floor(enlarge * width / shape)  # the height of the fitted picture
        elif shape == 1:
            size = enlarge * height
        else:
            size = math.floor(enlarge * height * shape)  # its width
        if size >= best_size:
            best, best_size = (cols, rows), size
    return best


def _nearest_shape(width: int, height: int, max_tiles: int) -> tuple[int, int]:
    shape = width / height
    shapes = dict.fromkeys(cols / rows for cols, rows in arrangements(max_tiles))
    if shape >= 1:  # among the shapes no wider than the picture
        nearest = min((known for known in shapes if known <= shape), key=lambda known: abs(known - shape))
        return max((grid for grid in arrangements(max_tiles) if grid[0] / grid[1] == nearest), key=lambda grid: grid[0])
    taller = (known for known in shapes if known > shape)
    nearest = min(taller, key=lambda known: abs(1 / known - 1 / shape))
    return max((grid for grid in arrangements(max_tiles) if grid[0] / grid[1] == nearest), key=lambda grid: grid[1])


def _spec(tile: int, spec: PixelSpec | None) -> PixelSpec:
    if spec is None:
        return PixelSpec(size=tile, interpolation="bicubic")
    if spec.size != tile:
        raise ConfigError(f"tiles of {tile} for a model that sees {spec.size}; they must be the same")
    return spec
