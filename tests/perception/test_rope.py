"""Rotary tables against the reference's angles, and what rotation must keep."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from perception.errors import ConfigError
from perception.rope import RopeScaling, frequencies, rope_1d, rope_2d, rotate


def test_golden_tables(golden: Path) -> None:
    tables = json.loads((golden / "pe" / "rope_tables.json").read_text())
    assert len(tables) >= 2
    for name, wanted in tables.items():
        head_dim, h, w, cls = map(int, re.fullmatch(r"hd(\d+)_grid(\d+)x(\d+)_cls(\d)", name).groups())
        cos, sin = rope_2d(h, w, head_dim, prefix=cls)
        wanted = torch.tensor(wanted)
        torch.testing.assert_close(cos, wanted.cos(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sin, wanted.sin(), rtol=1e-6, atol=1e-6)


def test_neighbouring_channels_are_one_plane() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 1.0])[None, None, None]  # B N heads head_dim: two planes
    angle = torch.tensor([[math.pi / 2, math.pi / 6]])
    got = rotate(x, (angle.cos(), angle.sin()))[0, 0, 0]
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0, -0.5, math.cos(math.pi / 6)]))


def test_only_the_distance_counts() -> None:
    q, k = torch.randn(2, 1, 9, 1, 16)
    near = rope_1d(torch.arange(9), 16)
    far = rope_1d(torch.arange(9) + 100, 16)

    def scores(rope: tuple) -> torch.Tensor:
        return torch.einsum("bnhd,bshd->bns", rotate(q, rope), rotate(k, rope))

    torch.testing.assert_close(scores(near), scores(far), rtol=1e-4, atol=1e-4)


def test_half_precision_input_keeps_float32_angles() -> None:
    """bfloat16 cannot even count to 400: a table in bfloat16 would be off by whole turns."""
    x = torch.randn(1, 600, 1, 16)
    rope = rope_1d(torch.arange(600), 16, theta=10_000.0)
    assert rope[0].dtype == torch.float32
    got = rotate(x.bfloat16(), rope)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rotate(x, rope), rtol=2e-2, atol=2e-2)


def test_llama3_scaling_against_its_definition() -> None:
    scaling = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    plain, scaled = frequencies(128, 500_000.0), frequencies(128, 500_000.0, scaling)
    for f, got in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            wanted = f
        elif wavelength > 8192:
            wanted = f / 32
        else:
            blend = (8192 / wavelength - 1) / (4 - 1)
            wanted = (1 - blend) * f / 32 + blend * f
        assert got == pytest.approx(wanted, rel=1e-5)
    assert (scaled < plain).any()
    assert (scaled == plain).any()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="multiple of 4; given 6"):
        rope_2d(2, 2, 6)
    with pytest.raises(ConfigError, match="even head_dim; given 5"):
        rope_1d(torch.arange(2), 5)
    with pytest.raises(ConfigError, match="factor >= 1"):
        RopeScaling(factor=0.5)
