"""PCA colours and correspondence on features whose answer is known."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import perception_encoder as pe
from perception.errors import ConfigError
from perception_encoder.visualize import Matches, draw_matches, pca_colours

TINY = pe.VisionConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=48, output_width=12)


@pytest.fixture(scope="module")
def tower() -> pe.VisionTransformer:
    torch.manual_seed(0)
    return pe.VisionTransformer(TINY).eval()


def test_main_axes_become_colours() -> None:
    """Three independent signals of falling variance in a random basis come back as red, green and blue."""
    g = torch.Generator().manual_seed(3)
    signals = torch.randn(2 * 12 * 10, 3, generator=g) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(16, 3, generator=g)).Q
    patches = (signals @ basis.T + 5).view(2, 12, 10, 16)
    colours = pca_colours(patches)
    assert colours.shape == (2, 12, 10, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    for channel in range(3):
        pair = torch.stack([colours.reshape(-1, 3)[:, channel], signals[:, channel]])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.9
    assert torch.equal(colours, pca_colours(patches))
    with pytest.raises(ConfigError, match="3 patches of 16 channels have no three main axes"):
        pca_colours(patches[:1, :1, :3])


def test_pca_image_shapes_and_shared_axes(tower: pe.VisionTransformer, tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    noise.save(tmp_path / "a.png")
    one = pe.pca_image(tower, tmp_path / "a.png")
    assert one.size == (32, 32)
    one.save(tmp_path / "pca.png")
    both = pe.pca_image(tower, [noise, noise.rotate(180)], size=64, scale=4)
    assert [picture.size for picture in both] == [(32, 32)] * 2
    same = pe.pca_image(tower, [noise, noise])
    assert same[0].tobytes() == same[1].tobytes()
    other = Image.new("RGB", (64, 48), "red")
    assert pe.pca_image(tower, [noise, other])[0].tobytes() != same[0].tobytes()  # the axes are shared, so they moved


class Colour(torch.nn.Module):
    """An encoder whose feature of a patch is its mean colour: which patches match is plain to see."""

    width, patch_size = 3, 8

    def __init__(self) -> None:
        super().__init__()
        from perception.pixels import PixelSpec

        self.preprocess = PixelSpec(size=32)

    def intermediates(self, pixels: torch.Tensor, layers: list[int], *, norm: bool = False) -> list[pe.Features]:
        grid = torch.nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
        return [pe.Features(grid, grid.new_zeros(len(grid), 0, 3)) for _ in layers]


def test_correspondence_finds_the_moved_square() -> None:
    first, second = Image.new("RGB", (64, 64), "blue"), Image.new("RGB", (128, 64), "blue")
    first.paste("red", (0, 0, 16, 16))  # the first patch of a 4 x 4 grid
    second.paste("red", (96, 32, 128, 48))  # column 3, row 2
    found = pe.correspond(Colour(), first, second, points=[(3, 5)])
    assert found.second.tolist() == [[112.0, 40.0]]  # in pixels of the second picture
    assert found.score.tolist() == pytest.approx([1.0], abs=1e-3)  # resizing blurs the edge a little
    assert found.mutual.tolist() == [True]
    every = pe.correspond(Colour(), first, second)
    assert len(every.first) == 16
    assert every.second[0].tolist() == [112.0, 40.0]
    with pytest.raises(ConfigError, match=r"points \[\(64, 1\)\] are not all inside the first picture of 64 x 64"):
        pe.correspond(Colour(), first, second, points=[(64, 1)])
    sheet = draw_matches(first, second, Matches(*every))
    assert sheet.size == (192, 64)
    assert sheet.tobytes() != draw_matches(first, second, Matches(*(t[:0] for t in every))).tobytes()


def test_features_take_any_size(tower: pe.VisionTransformer) -> None:
    noise = Image.effect_noise((50, 70), 90)
    first, last = pe.features(tower, noise, [0, -1], size=64)
    assert first.patches.shape == last.patches.shape == (1, 8, 8, 32)
    pixels = tower.preprocess(noise)
    torch.testing.assert_close(pe.features(tower, noise)[0].patches, tower(pixels[None]).patches)
