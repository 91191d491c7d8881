"""The twins for a GPU: the golden towers' numbers, through the kernels (interpreted on a CPU) and through graphs."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden_models as golden_files
import pytest
import torch
from triton_here import DEVICE

from perception.errors import ConfigError
from perception.kernels.triton import language, quantized
from perception.optimize import Plan, Quantize
from perception_encoder import fast_cuda
from perception_encoder.clip import CLIP
from perception_encoder.fast import fingerprint_of
from perception_encoder.fast_cuda import CudaVision, fast_text, fast_vision
from perception_encoder.text import TextTransformer
from perception_encoder.vision import VisionTransformer


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' plain twins, where the kernels would be interpreted."""
    monkeypatch.setattr(language, "INTERPRETED", False)


def tower_of(golden: Path, name: str) -> VisionTransformer:
    return golden_files.load_tower(golden, name).to(DEVICE)


def wide_tower(golden: Path) -> VisionTransformer:
    """Wide enough for maps in eight bits."""
    config = tower_of(golden, "core_cls").config
    torch.manual_seed(0)
    return (
        VisionTransformer(dataclasses.replace(config, width=64, heads=2, mlp_width=128, output_width=None))
        .eval()
        .to(DEVICE)
    )


def pixels_for(tower: VisionTransformer, batch: int, h: int = 2, w: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, h * tower.patch_size, w * tower.patch_size, generator=g).to(DEVICE)


@pytest.mark.parametrize("name", ["core_nocls_hd24", "lang_cls_ls"])
def test_the_kernels_make_a_tower(golden: Path, name: str) -> None:
    tower = tower_of(golden, name)
    fast = fast_vision(tower, Plan())
    pixels = pixels_for(tower, 1)
    layers = [0, len(tower.blocks) - 1]
    for mine, theirs in zip(
        fast.layers(pixels, layers, norm=True), tower.intermediates(pixels, layers, norm=True), strict=True
    ):
        assert golden_files.relative(mine, theirs.tokens()) < 1e-5


@pytest.mark.parametrize("name", golden_files.TOWERS)
def test_the_same_numbers(golden: Path, name: str, twins: None) -> None:
    tower = tower_of(golden, name)
    fast = fast_vision(tower, Plan())
    pixels = pixels_for(tower, 2)
    for norm in (False, True):
        wanted = tower.intermediates(pixels, [-1, 0, 0], norm=norm)
        for mine, theirs in zip(fast.intermediates(pixels, [-1, 0, 0], norm=norm), wanted, strict=True):
            assert golden_files.relative(mine.tokens(), theirs.tokens()) < 1e-5
            assert mine.patches.shape == theirs.patches.shape
    assert golden_files.relative(fast(pixels).tokens(), tower(pixels).tokens()) < 1e-5
    if tower.pool is not None:
        assert golden_files.relative(fast.pooled(pixels), tower.pooled(pixels)) < 1e-5


def test_graphs_are_told_apart(golden: Path, twins: None) -> None:
    """By size, by batch and by what is asked; each call's result outlives the next; large batches need none."""
    tower = tower_of(golden, "core_cls")
    fast = fast_vision(tower, Plan())
    calls = [pixels_for(tower, 1), pixels_for(tower, 2), pixels_for(tower, 1, 3, 2), pixels_for(tower, 1) + 1]
    found = [(fast(x), fast.pooled(x)) for x in calls + calls]
    for x, (features, pooled) in zip(calls + calls, found, strict=True):
        assert golden_files.relative(features.tokens(), tower(x).tokens()) < 1e-5
        assert golden_files.relative(pooled, tower.pooled(x)) < 1e-5
    assert len(fast.graphs.kept) == 6
    large = pixels_for(tower, fast_cuda.GRAPH_BATCH + 1)
    assert golden_files.relative(fast(large).tokens(), tower(large).tokens()) < 1e-5
    assert len(fast.graphs.kept) == 6
    assert fast(pixels_for(tower, 0)).patches.shape == (0, 2, 3, tower.width)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_large_batches_compiled(golden: Path, quantize: Quantize | None) -> None:
    """Without a break in the graph, from the kernels' twins; eagerly here. Small batches go on as before."""
    torch.compiler.reset()
    tower = tower_of(golden, "core_cls")
    fast = fast_vision(tower, Plan(quantize))
    large, small = pixels_for(tower, fast_cuda.GRAPH_BATCH + 1), pixels_for(tower, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "INTERPRETED", False)
        wanted = [fast.pooled(large), fast(large).tokens(), fast.pooled(small)]
    fast.compile(backend="eager", fullgraph=True, mode=None)
    for _ in range(2):
        got = [fast.pooled(large), fast(large).tokens(), fast.pooled(small)]
        for mine, theirs in zip(got, wanted, strict=True):
            assert golden_files.relative(mine, theirs) < 1e-5
    assert isinstance(fast.large, fast_cuda.Compiled)
    assert len(fast.large.kept) == 2
    fast.compile()
    assert fast.large.options == {"mode": "max-autotune-no-cudagraphs"}


def test_sizes_are_forgotten_with_their_graphs(golden: Path, twins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cuda, "TABLES", 2)
    tower = tower_of(golden, "core_cls")
    fast = fast_vision(tower, Plan())
    for h, w in [(1, 1), (2, 1), (1, 2), (1, 1)]:
        x = pixels_for(tower, 1, h, w)
        assert golden_files.relative(fast(x).tokens(), tower(x).tokens()) < 1e-5
    assert len(fast._tables) == len(fast.graphs.kept) == 2


def test_threads_share_a_tower(golden: Path, twins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More sizes than are remembered, so that tables and graphs come and go meanwhile."""
    monkeypatch.setattr(fast_cuda, "TABLES", 2)
    tower = tower_of(golden, "core_cls")
    fast = fast_vision(tower, Plan())
    embedding = fast.embedding

    def slowly(pixels: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(0.002)  # long enough for others to come in between
        return embedding(pixels)

    monkeypatch.setattr(fast, "embedding", slowly)
    calls = [pixels_for(tower, 1, *size) + seed for size in [(1, 1), (2, 1), (1, 2)] for seed in range(5)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(fast.pooled, calls))  # each thread has a grad mode of its own
    for x, pooled in zip(calls, found, strict=True):
        assert golden_files.relative(pooled, tower.pooled(x)) < 1e-5


def test_half_precision_stays_close(golden: Path, twins: None) -> None:
    tower = tower_of(golden, "lang_cls_ls")
    pixels = pixels_for(tower, 2)
    wanted = tower(pixels).tokens()
    half = fast_vision(tower.bfloat16(), Plan())(pixels.bfloat16()).tokens()
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), wanted, dim=-1).min() > 0.9999


def test_text(golden: Path) -> None:
    config = golden_files.clip_config(golden).text
    torch.manual_seed(0)
    text = TextTransformer(config).eval().to(DEVICE)
    top = config.vocab - 1
    tokens = torch.zeros(3, config.context, dtype=torch.int64)
    for row, ids in enumerate([[5, 6, top], [7, top], [1, 2, 3, 4, top]]):
        tokens[row, : len(ids)] = torch.tensor(ids)
    fast = fast_text(text, Plan())
    assert golden_files.relative(fast(tokens.to(DEVICE)), text(tokens.to(DEVICE))) < 1e-5
    assert fast(tokens[:0].to(DEVICE)).shape == (0, config.output_width)
    with pytest.raises(ConfigError, match="tokens are B n"):
        fast(tokens[0].to(DEVICE))


def test_a_clip_of_fast_towers(golden: Path, twins: None) -> None:
    config = golden_files.clip_config(golden)
    torch.manual_seed(1)
    clip = CLIP(VisionTransformer(config.vision), TextTransformer(config.text)).eval().to(DEVICE)
    fast = CLIP(fast_vision(clip.vision, Plan()), fast_text(clip.text, Plan()), clip.preprocess, clip.tokenize)  # type: ignore[arg-type]
    fast.logit_scale = clip.logit_scale
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size)
    tokens = torch.tensor([[3, config.text.vocab - 1, 0]])
    for mine, theirs in zip(fast(pixels, tokens), clip(pixels, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (fast.dtype, fast.device) == (clip.dtype, clip.device)


def test_eight_bits_only_where_they_do_no_harm(golden: Path, twins: None) -> None:
    """A map with an input that eight bits cannot hold stays as it is; the others change, and little."""
    tower = wide_tower(golden)
    tower.blocks[0].norm2.weight.data[0] = 1e4
    tower.blocks[0].mlp.fc1.weight.data[:, 0] = 0
    fast = fast_vision(tower, Plan(quantize="int8"))
    assert fast.blocks[0].fc1.code is None
    assert fast.blocks[1].fc1.code == fast.blocks[0].qkv.code == "int8"
    pixels = pixels_for(tower, 1)
    mine, theirs = fast(pixels).tokens(), tower(pixels).tokens()
    cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=-1)
    assert cosine.min() > 0.999
    assert not torch.equal(mine, theirs)


def test_eight_bit_floats(golden: Path, twins: None) -> None:
    """As integers: maps that it suits, and a whole that stays near. What it is called is in the fingerprint."""
    tower = wide_tower(golden)
    fast = fast_vision(tower, Plan("fp8"))
    assert fingerprint_of(tower, Plan("fp8")) == fingerprint_of(tower, Plan()) + "-fp8"
    assert all(product.code == "fp8" for block in fast.blocks for product in block.products)
    pixels = pixels_for(tower, 2)
    mine, theirs = fast(pixels).tokens(), tower(pixels).tokens()
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).min() > 0.998
    assert not torch.equal(mine, theirs)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_the_whole_tower_has_a_gate(
    golden: Path, twins: None, monkeypatch: pytest.MonkeyPatch, quantize: Quantize
) -> None:
    """Where nothing is near enough, nothing is rounded."""
    tower = wide_tower(golden)
    pixels = pixels_for(tower, 1)
    monkeypatch.setattr(quantized, "similarity", lambda found, wanted: 0.9991 if found.ndim == 2 else 0.9)
    fast = fast_vision(tower, Plan(quantize))
    assert not any(product.code for block in fast.blocks for product in block.products)
    assert golden_files.relative(fast(pixels).tokens(), tower(pixels).tokens()) < 1e-5


def test_a_tower_given_up(golden: Path, twins: None) -> None:
    tower = tower_of(golden, "core_cls")
    pixels = pixels_for(tower, 1)
    wanted = tower.pooled(pixels)
    fast = fast_vision(tower, Plan(keep=False))
    assert golden_files.relative(fast.pooled(pixels), wanted) < 1e-5
    assert not any(parameter.numel() for parameter in tower.parameters())


def test_refusals(golden: Path) -> None:
    tower = tower_of(golden, "lang_nocls_ls")
    fast = CudaVision(tower)
    with pytest.raises(ConfigError, match="no pooling head"):
        fast.pooled(pixels_for(tower, 1))
    with pytest.raises(ConfigError, match="nearest good size"):
        fast(torch.zeros(1, 3, tower.patch_size + 1, tower.patch_size))
    with pytest.raises(ConfigError, match="no layers"):
        fast.intermediates(pixels_for(tower, 1), [99])
    with torch.enable_grad(), pytest.raises(ConfigError, match="no gradients"):
        fast(pixels_for(tower, 1).requires_grad_())
    with pytest.raises(ConfigError, match="for inference"):
        fast.train()
