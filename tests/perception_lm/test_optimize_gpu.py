"""optimize() of whole models that lie on a GPU."""

from pathlib import Path

import golden_models
import plm_tiny
import pytest
import torch
import triton_here  # noqa: F401  before anything that imports Triton

from perception.optimize import optimize
from perception_encoder.fast_cuda import CudaVision
from perception_lm.fast_cuda import CudaDecoder
from perception_lm.generation import generate
from perception_lm.processor import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_tower(golden: Path) -> None:
    tower = golden_models.load_tower(golden, "core_cls").cuda()
    fast = optimize(tower)
    assert isinstance(fast, CudaVision)
    assert fast.plain is tower
    for batch in (1, 3, 9, 1):
        pixels = torch.randn(batch, 3, 2 * tower.patch_size, 3 * tower.patch_size, device="cuda")
        with torch.no_grad():
            assert golden_models.relative(fast.pooled(pixels), tower.pooled(pixels)) < 1e-4


def test_a_language_model() -> None:
    """Pictures and text, ragged; through graphs, twice."""
    plain = plm_tiny.tiny_model().cuda()
    fast = optimize(plain)
    assert isinstance(fast.decoder, CudaDecoder)
    tokens = torch.randint(400, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens[0, 2:6] = plain.media_token
    pixels = torch.randn(1, 3, 24, 24)
    batch = Batch(tokens=tokens, lengths=(9, 5), pixels=pixels, media_counts=(1, 0))
    for settings in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {}):
        wanted = generate(plain, batch, str, max_new_tokens=40, **settings)
        got = generate(fast, batch, str, max_new_tokens=40, **settings)
        assert [reply.tokens for reply in got] == [reply.tokens for reply in wanted]
