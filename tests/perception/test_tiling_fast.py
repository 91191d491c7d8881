"""Tiles are written once, in any floating dtype, and a fast rule's are Pillow's within two codes."""

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perception import tiling
from perception.errors import ConfigError
from perception.pixels import PixelSpec
from perception.tiling import choose_grid, tile_codes, tile_image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize("size", [(90, 40), (41, 90), (200, 199), (9, 7)], ids=str)
def test_a_fast_rule_gives_the_same_tiles_within_two_codes(size: tuple[int, int], thumbnail: bool) -> None:
    rule = PixelSpec(size=28, interpolation="bicubic")
    plain = tile_codes(noise(*size), 28, 9, spec=rule, thumbnail=thumbnail)
    fast = tile_codes(noise(*size), 28, 9, spec=rule.fast(), thumbnail=thumbnail)
    assert fast.shape == plain.shape
    tiles = slice(int(thumbnail), None)
    off = (fast.int() - plain.int()).abs()
    assert off[tiles].max() <= 2
    assert off.float().mean() < 0.3


def test_golden_tiles_by_the_fast_rule(golden: Path) -> None:
    rule = PixelSpec(size=28, interpolation="bicubic")
    for file in sorted((golden / "tiling").glob("*.png")):
        off = (tile_codes(file, 28, spec=rule.fast()).int() - tile_codes(file, 28, spec=rule).int()).abs()
        assert off.max() <= 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.9, 0.48), (0.25, 1, 0.5))],
)
def test_numbers_are_the_codes_normalised_to_the_bit(
    fast: bool, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    rule = PixelSpec(size=16, interpolation="bicubic", mean=mean, std=std)
    rule = rule.fast() if fast else rule
    codes = tile_codes(noise(50, 31), 16, 6, spec=rule)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (rule.mean, rule.std))
    wanted = (codes.float() / 255 - shift) / scale  # in the published order
    every = torch.arange(256, dtype=torch.uint8).expand(3, 2, -1)
    assert torch.equal(rule.normalize(every), (every.float() / 255 - shift) / scale)
    assert torch.equal(tile_image(noise(50, 31), 16, 6, spec=rule), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        tiles = tile_image(noise(50, 31), 16, 6, spec=rule, dtype=dtype)
        assert tiles.dtype == dtype
        assert torch.equal(tiles, wanted.to(dtype))  # rounded once
    with pytest.raises(ConfigError, match="tile_codes for uint8"):
        tile_image(noise(50, 31), 16, 6, spec=rule, dtype=torch.uint8)


@pytest.mark.parametrize("large", [0, 2**25])
def test_tiles_own_their_memory_and_nothing_more(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LARGE", large)  # 0: all of it is mapped
    wanted = tile_codes(noise(50, 31), 16, 6).clone()
    for tiles in (tile_image(noise(50, 31), 16, 6), tile_codes(noise(50, 31), 16, 6)):
        assert tiles.is_contiguous()
        assert tiles.untyped_storage().nbytes() == tiles.nbytes
        tiles[0] = 1  # writable
    kept = tile_codes(noise(50, 31), 16, 6)[1:]  # a view outlives the whole
    gc.collect()
    assert torch.equal(kept, wanted[1:])
    assert torch.equal(pickle.loads(pickle.dumps(kept)), wanted[1:])


def test_the_search_for_a_grid_is_done_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = choose_grid(1633, 1225)

    def again(*_: object) -> None:
        raise AssertionError("searched twice")

    monkeypatch.setattr(tiling, "arrangements", again)
    assert choose_grid(1633, 1225) == wanted == (7, 5)
    with pytest.raises(AssertionError):
        choose_grid(1634, 1225)
