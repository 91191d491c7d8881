"""Grids and tiles are the published ones, and tiles put together are the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from perception.errors import ConfigError, LimitError
from perception.pixels import PixelSpec
from perception.tiling import arrangements, choose_grid, cut, tile_codes, tile_image, untile

TABLE = [  # width, height, and the grid for at most 4, 9, 16 and 36 tiles
    (640, 427, (2, 2), (3, 2), (5, 3), (7, 5)),
    (427, 640, (2, 2), (2, 3), (3, 5), (5, 7)),
    (1920, 1080, (2, 2), (3, 2), (5, 3), (8, 4)),
    (1280, 720, (2, 2), (4, 2), (5, 3), (8, 4)),
    (800, 600, (2, 2), (3, 3), (4, 3), (7, 5)),
    (1280, 427, (3, 1), (4, 2), (6, 2), (9, 4)),
    (2480, 3508, (2, 2), (3, 3), (3, 4), (5, 7)),
    (448, 448, (2, 2), (3, 3), (4, 4), (6, 6)),
    (4000, 3000, (2, 2), (3, 3), (4, 3), (4, 3)),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}x{row[1]}")
def test_known_grids(row: tuple) -> None:
    width, height, *grids = row
    assert [choose_grid(width, height, max_tiles=limit) for limit in (4, 9, 16, 36)] == grids


@pytest.mark.parametrize("limit", [1, 4, 9, 16, 36])
def test_published_grids(golden: Path, limit: int) -> None:
    table = json.loads((golden / "tiling" / "grids.json").read_text())
    got = [list(choose_grid(w, h, table["tile_size"], limit)) for w, h in table["sizes_wh"]]
    assert got == table["grids_cols_rows"][str(limit)]
    assert len(got) == 200


@pytest.mark.parametrize("limit", [4, 9, 36])
def test_published_order_of_trial(golden: Path, limit: int) -> None:
    table = json.loads((golden / "tiling" / "grids.json").read_text())
    assert [list(grid) for grid in arrangements(limit)] == table["candidate_arrangements_in_scan_order"][str(limit)]


@pytest.mark.parametrize("name", ["img0", "img1", "img2", "img3"])
def test_published_tiles(golden: Path, name: str) -> None:
    folder = golden / "tiling"
    about = json.loads((folder / "tiles.json").read_text())["images"][name]
    wanted = load_file(folder / "tiles.safetensors")
    file, limit = folder / about["file"], about["max_num_tiles"]
    codes = tile_codes(file, 28, limit)
    assert torch.equal(codes, wanted[f"{name}.thumb_tile"])
    assert torch.equal(tile_image(file, 28, limit), (codes.float() / 255 - 0.5) / 0.5)
    assert torch.equal(tile_codes(file, 28, limit, thumbnail=False), wanted[f"{name}.thumb_tile"][1:])
    assert torch.equal(tile_codes(file, 28, max_tiles=1, thumbnail=False), wanted[f"{name}.vanilla"])


def test_tiles_lie_row_by_row_after_the_thumbnail() -> None:
    codes = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(8, 0).repeat(8, 1) * 40  # 3 x 2 flat tiles of 8
    tiles = tile_codes(np.stack([codes] * 3, -1), tile=8, max_tiles=6, spec=PixelSpec(size=8))
    assert [int(tile.float().median()) for tile in tiles[1:]] == [0, 40, 80, 120, 160, 200]
    assert tiles[0].unique().numel() > 6  # all of the picture, small


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 60))
def test_never_more_tiles_than_allowed(width: int, height: int, limit: int) -> None:
    cols, rows = choose_grid(width, height, max_tiles=limit)
    assert cols >= 1
    assert rows >= 1
    assert cols * rows <= limit
    assert isinstance(cols, int)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 36))
def test_a_picture_that_fits_somewhere_is_never_shrunk(width: int, height: int, limit: int) -> None:
    fits = [grid for grid in arrangements(limit) if grid[0] * 448 >= width and grid[1] * 448 >= height]
    cols, rows = choose_grid(width, height, max_tiles=limit)
    if fits:
        assert cols * 448 >= width
        assert rows * 448 >= height


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_tiles_put_together_give_the_picture_back(cols: int, rows: int, tile: int, thumbnail: bool) -> None:
    pixels = torch.randint(0, 256, (3, rows * tile, cols * tile), dtype=torch.uint8)
    tiles = cut(pixels, cols, rows)
    if thumbnail:
        tiles = torch.cat([torch.zeros_like(tiles[:1]), tiles])
    assert tiles.shape == (cols * rows + thumbnail, 3, tile, tile)
    assert torch.equal(untile(tiles, cols, rows, thumbnail), pixels)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 9))
def test_tiles_give_the_resized_picture_back(width: int, height: int, limit: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    cols, rows = choose_grid(width, height, 16, limit)
    stretched = np.array(image.resize((cols * 16, rows * 16), Image.Resampling.BICUBIC))
    tiles = tile_codes(image, tile=16, max_tiles=limit)
    assert torch.equal(untile(tiles, cols, rows), torch.from_numpy(stretched).permute(2, 0, 1))


@pytest.mark.parametrize(("size", "grid"), [((1, 1), (6, 6)), ((1, 20000), (1, 36)), ((20000, 1), (36, 1))])
def test_extreme_sizes_are_tiled_as_published_and_said(size: tuple[int, int], grid: tuple[int, int]) -> None:  # F-49
    assert choose_grid(*size) == grid
    image = Image.new("RGB", size, (200, 100, 50))
    with pytest.warns(UserWarning, match="lower max_tiles"):
        tiles = tile_codes(image, tile=448, max_tiles=4)
    cols, rows = choose_grid(*size, max_tiles=4)
    assert len(tiles) == cols * rows + 1 <= 5
    assert tiles[:, :, 5, 5].unique(dim=0).tolist() == [[200, 100, 50]]


def test_a_palette_becomes_rgb_before_it_is_resized() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).quantize(16)
    assert torch.equal(tile_codes(image, 16, 1), tile_codes(image.convert("RGB"), 16, 1))


def test_the_rule_of_the_model_is_obeyed() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    bilinear = PixelSpec(size=16, mean=(0, 0, 0), std=(1, 1, 1))
    assert not torch.equal(tile_codes(image, 16, 4, spec=bilinear), tile_codes(image, 16, 4))
    codes = tile_codes(image, 16, 4, spec=bilinear)
    assert torch.equal(tile_image(image, 16, 4, spec=bilinear), codes.float() / 255)
    with pytest.raises(ConfigError, match="tiles of 16 for a model that sees 32"):
        tile_image(image, 16, spec=PixelSpec(size=32))


def test_exif_orientation_reaches_the_grid(golden: Path) -> None:
    file = golden / "preprocess" / "exif_rotated.jpg"
    upright, as_is = (tile_codes(file, 16, 6, orient=orient) for orient in (True, False))
    assert not torch.equal(upright[0], as_is[0])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, 5), ConfigError),
        ((5, -1), ConfigError),
        ((5, 5, 0), ConfigError),
        ((5, 5, 448, 0), ConfigError),
        ((5.0, 5), ConfigError),
        ((5, 5, 448, 10**9), LimitError),
    ],
)
def test_sizes_that_cannot_be(arguments: tuple, error: type[Exception]) -> None:
    with pytest.raises(error):
        choose_grid(*arguments)


def test_a_wrong_number_of_tiles() -> None:
    with pytest.raises(ConfigError, match="5 tiles are not 2 x 2"):
        untile(torch.zeros(5, 3, 4, 4), 2, 2, thumbnail=False)
