"""Patch grids to decoder tokens: the order, the mean, the GELU, and the count that the processor relies on."""

import math

import pytest
import torch
from torch import Tensor

from perception.errors import ConfigError
from perception_lm.config import ProjectorConfig
from perception_lm.projector import PixelShuffleProjector, PoolingProjector, build_projector


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(("h", "w", "pool"), [(4, 4, 2), (4, 6, 2), (6, 3, 3), (3, 2, 1)])
@torch.inference_mode()
def test_pooling_equals_the_formula(h: int, w: int, pool: int) -> None:
    """Traps 4 and 5: the exact GELU, the MLP before the mean, tokens row by row. In float64, patch by patch."""
    torch.manual_seed(0)
    projector = PoolingProjector(5, 7, pool).double()
    patches = torch.randn(2, h, w, 5, dtype=torch.float64)
    found = projector(patches)
    assert found.shape == (2, projector.tokens(h, w), 7)
    each = gelu(patches @ projector.fc1.weight.T + projector.fc1.bias) @ projector.fc2.weight.T + projector.fc2.bias
    wanted = [
        each[:, r * pool : (r + 1) * pool, c * pool : (c + 1) * pool].mean((1, 2))
        for r in range(h // pool)
        for c in range(w // pool)
    ]
    torch.testing.assert_close(found, torch.stack(wanted, dim=1), rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_pixel_shuffle_equals_the_formula() -> None:
    torch.manual_seed(0)
    projector = PixelShuffleProjector(3, 7).double()
    patches = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    found = projector(patches)
    assert found.shape == (2, projector.tokens(4, 6), 7) == (2, 6, 7)
    square = torch.cat([patches[:, 2, 4], patches[:, 2, 5], patches[:, 3, 4], patches[:, 3, 5]], dim=-1)  # row 1, col 2
    torch.testing.assert_close(found[:, 5], square @ projector.fc.weight.T + projector.fc.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [PoolingProjector, PixelShuffleProjector])
@pytest.mark.parametrize(("h", "w"), [(5, 4), (4, 5), (0, 4)])
def test_grids_that_do_not_pool(kind: type, h: int, w: int) -> None:
    projector = kind(5, 7)
    with pytest.raises(ConfigError, match=f"a {h} x {w} patch grid does not pool by 2"):
        projector.tokens(h, w)
    with pytest.raises(ConfigError, match="does not pool"):
        projector(torch.zeros(1, h, w, 5))


def test_built_from_a_config() -> None:
    for name, kind in (("pooling", PoolingProjector), ("pixel_shuffle", PixelShuffleProjector)):
        projector = build_projector(ProjectorConfig(kind=name, in_width=5, width=7, pool=3))
        assert type(projector) is kind
        assert (projector.in_width, projector.width, projector.pool) == (5, 7, 3)
    with pytest.raises(ConfigError, match="pooling"):
        ProjectorConfig.from_dict({"kind": "resampler", "in_width": 5, "width": 7})
    with pytest.raises(ConfigError, match="pool is 0"):
        ProjectorConfig(in_width=5, width=7, pool=0)
