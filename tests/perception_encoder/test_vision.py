"""The tower as a module: sizes, layers, gradients, compile, export, dtypes, copies."""

import copy
import dataclasses
import warnings

import pytest
import torch
from golden_models import relative

import perception_encoder as pe
from perception.errors import ConfigError
from perception_encoder.config import ClipConfig

TINY = pe.VisionConfig(
    image_size=32, patch_size=8, width=32, depth=3, heads=2, mlp_width=48, layer_scale=0.1, output_width=12
)


def perturbed(config: pe.VisionConfig = TINY, seed: int = 0) -> pe.VisionTransformer:
    torch.manual_seed(seed)
    tower = pe.VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tower


class SaysCuda(torch.Tensor):
    """A tensor on the CPU that takes the ways of one on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@torch.no_grad()
def test_patches_as_a_product() -> None:
    """On a GPU the convolution is a matrix product, which is never rounded to TF32 unasked; the same numbers."""
    embed, pixels = perturbed().patch_embed, torch.randn(2, 3, 24, 40)
    got = embed(pixels.as_subclass(SaysCuda)).as_subclass(torch.Tensor)
    torch.testing.assert_close(got, torch.nn.functional.conv2d(pixels, embed.weight, stride=8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (24, 56)])
@torch.inference_mode()
def test_any_multiple_of_the_patch(size: tuple[int, int]) -> None:
    tower = perturbed()
    features = tower(torch.randn(2, 3, *size))
    assert features.patches.shape == (2, size[0] // 8, size[1] // 8, 32)
    assert features.prefix.shape == (2, 1, 32)
    assert tower.pooled(torch.randn(2, 3, *size)).shape == (2, 12)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 30, 37), "30 x 37 pixels do not divide into patches of 8; the nearest good size is 32 x 40"),
        (torch.zeros(1, 3, 3, 8), "the nearest good size is 8 x 8"),
        (torch.zeros(1, 1, 32, 32), r"pixels are B 3 H W; given \(1, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), "pixels are B 3 H W"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "normalised floats; given torch.uint8"),
    ],
)
def test_f51_pixels_that_do_not_fit(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        perturbed()(pixels)


@torch.inference_mode()
def test_intermediates_in_one_pass() -> None:
    tower, pixels = perturbed(), torch.randn(1, 3, 16, 24)
    runs: list[int] = []
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    last, first, again = tower.intermediates(pixels, [-2, 0, 0])
    assert runs == [0, 1]  # one pass that stops at the last layer asked for
    assert torch.equal(first.patches, again.patches)
    short = copy.deepcopy(tower)
    short.blocks = short.blocks[:2]
    torch.testing.assert_close(last.tokens(), short(pixels).tokens())
    normed = tower.intermediates(pixels, [0], norm=True)[0]
    torch.testing.assert_close(normed.tokens(), tower.norm_post(first.tokens()))
    assert tower.intermediates(pixels, []) == []
    for bad in (3, -4):
        with pytest.raises(ConfigError, match=rf"no layers \[{bad}\] in a tower of 3 blocks"):
            tower.intermediates(pixels, [0, bad])


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        tower = perturbed().train()
        tower.set_grad_checkpointing(enable)
        calls: list[int] = []
        tower.blocks[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tower.pooled(pixels).square().sum().backward()
        assert len(calls) == 1 + enable  # run again in the backward pass
        gradients.append([p.grad for p in tower.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("class_token", [True, False])
@torch.inference_mode()
def test_compiles_whole(class_token: bool) -> None:
    tower = perturbed(dataclasses.replace(TINY, class_token=class_token))
    torch.compiler.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    for size in ((32, 32), (16, 24)):
        pixels = torch.randn(2, 3, *size)
        got, wanted = compiled(pixels), tower(pixels)
        assert relative(got.tokens(), wanted.tokens()) < 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_compiles_whole_with_inductor() -> None:
    tower, pixels = perturbed(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(tower, fullgraph=True)(pixels)
    assert relative(got.tokens(), tower(pixels).tokens()) < 1e-5


def test_exports_with_any_batch() -> None:
    tower = perturbed()
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while it traces
        program = torch.export.export(tower, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    pixels = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        got = program.module()(pixels)
        assert relative(got.patches, tower(pixels).patches) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_keeps_rotary_angles_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a 60 x 60 grid an angle of 60 in bfloat16 is off by up to 0.13 radians."""
    import perception_encoder.vision as vision

    seen = []
    real = vision.rope_2d
    monkeypatch.setattr(vision, "rope_2d", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    plain = perturbed()
    half, pixels = copy.deepcopy(plain).to(dtype), torch.randn(1, 3, 480, 480)
    got, wanted = half(pixels), plain(pixels)  # float32 pixels are taken as they are
    assert got.patches.dtype == dtype
    assert {table.dtype for rope in seen for table in rope} == {torch.float32}
    assert relative(got.patches.flatten(1, 2).mean(1), wanted.patches.flatten(1, 2).mean(1)) < 3e-2


@torch.inference_mode()
def test_sizes_in_turn_copies_and_meta_construction() -> None:
    """No state is kept between calls, so nothing can go stale."""
    tower = perturbed()
    small, large = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 40, 32)
    first = tower(small).tokens()
    tower(large)
    assert torch.equal(first, tower(small).tokens())
    assert torch.equal(copy.deepcopy(tower)(small).tokens(), first)
    with torch.device("meta"):
        shell = pe.VisionTransformer(TINY)
    shell.load_state_dict(tower.state_dict(), strict=True, assign=True)
    assert torch.equal(shell.eval()(small).tokens(), first)


def test_towers_without_a_pool_say_so() -> None:
    tower = perturbed(dataclasses.replace(TINY, pool=None, output_width=None))
    with pytest.raises(ConfigError, match="no pooling head"):
        tower.pooled(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="needs a pooled output"):
        ClipConfig(vision=tower.config, text=pe.TextConfig(context=8, width=8, depth=1, heads=2, output_width=32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 32 does not divide into 5 heads"),
        ({"image_size": 33}, "image_size 33 is not a multiple of patch_size 8"),
        ({"patch_size": 0}, "vision patch_size is 0; expected 1 to"),
        ({"depth": 10**9}, "vision depth is 1000000000"),
        ({"width": 48, "heads": 8}, r"head_dim 6 .* must be a multiple of 4"),
        ({"pool": None}, "output_width projects the pooled vector"),
        ({"pool_heads": 7}, "width 32 does not divide into 7 pool_heads"),
    ],
)
def test_f25_sizes_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("size", ["28", 28.0, None, True, [28]])
def test_sizes_are_whole_numbers(size: object) -> None:
    with pytest.raises(ConfigError, match=r"vision image_size is .*; expected a whole number"):
        dataclasses.replace(TINY, image_size=size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"text width is .*; expected a whole number"):
        pe.TextConfig(context=8, width=size, depth=1, heads=2, output_width=12)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="vision layer_scale is 'x'; expected a number"):
        dataclasses.replace(TINY, layer_scale="x")  # type: ignore[arg-type]


def test_what_is_no_tensor_is_named() -> None:
    """The natural mistakes: a file for its pixels, a text for its tokens."""
    clip = pe.CLIP(
        perturbed(), pe.TextTransformer(pe.TextConfig(context=8, width=16, depth=1, heads=2, output_width=12))
    )
    for call in (clip.encode_image, clip.vision, clip.vision.pooled, clip):
        with pytest.raises(
            TypeError, match="pixels are a tensor, B 3 H W; given str; run pictures through `preprocess`"
        ):
            call("cat.jpg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frames are a tensor, B N 3 S S; given list"):
        clip.encode_video(["a.jpg", "b.jpg"])  # type: ignore[arg-type]
    for call in (clip.encode_text, clip.text):
        with pytest.raises(TypeError, match="tokens are a tensor, B n; given str; run texts through `tokenize` first"):
            call("a cat")  # type: ignore[arg-type]


def test_f25_config_from_a_hostile_dict() -> None:
    good = TINY.to_dict()
    assert pe.VisionConfig.from_dict(good) == TINY
    with pytest.raises(ConfigError, match=r"unknown keys \['layers'\]"):
        pe.VisionConfig.from_dict({**good, "layers": 3})
    with pytest.raises(ConfigError, match="depth is '3'; expected int"):
        pe.VisionConfig.from_dict({**good, "depth": "3"})


def test_text_tokens_that_do_not_fit() -> None:
    text = pe.TextTransformer(pe.TextConfig(context=8, width=16, depth=1, heads=2, output_width=12, vocab=20))
    for bad in (torch.zeros(1, 9, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="tokens are B n with n from 1 to 8"):
            text(bad)


@torch.inference_mode()
def test_text_ends_at_its_end() -> None:
    """What follows the end cannot matter; what stands before it must."""
    torch.manual_seed(0)
    text = pe.TextTransformer(pe.TextConfig(context=8, width=16, depth=2, heads=2, output_width=12, vocab=20)).eval()
    tokens = torch.tensor([[17, 3, 5, 19, 0, 0, 0, 0]])
    wanted = text(tokens)
    assert relative(text(torch.tensor([[17, 3, 5, 19, 7, 7, 19, 2]])), wanted) < 1e-6
    assert relative(text(tokens[:, :4]), wanted) < 1e-5
    assert relative(text(torch.tensor([[17, 4, 5, 19, 0, 0, 0, 0]])), wanted) > 1e-2


def test_text_gradient_checkpointing() -> None:
    tokens = torch.tensor([[17, 3, 5, 19]])
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        text = pe.TextTransformer(pe.TextConfig(context=8, width=16, depth=2, heads=2, output_width=12, vocab=20))
        text.set_grad_checkpointing(enable)
        text(tokens).sum().backward()
        gradients.append(text.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)
