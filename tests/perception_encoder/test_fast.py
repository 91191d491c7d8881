"""The fast twins give the plain models' numbers: with compiled operators, with torch's, in half precision, in int8."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import SIZES, TOWERS, clip_config, load_tower, relative, tower_io
from torch import Tensor

import perception_encoder as pe
from perception.errors import ConfigError
from perception.kernels import cpp, fused, linear
from perception.optimize import optimize
from perception_encoder import fast as fast_module
from perception_encoder.fast import tree_of, trimmed
from perception_encoder.retrieval.embed import fingerprint


@pytest.fixture(scope="module", params=["compiled", "torch"])
def way(request: pytest.FixtureRequest):
    """With the compiled operators, and as on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(fused, "kernels", lambda build=True: None)
            patch.setattr(linear, "kernels", lambda build=True: None)
        elif cpp.kernels() is None:
            pytest.skip("no C++ compiler here")
        yield request.param


@pytest.fixture(scope="module")
def clip(golden: Path) -> pe.CLIP:
    return pe.load_clip(str(golden / "clip" / "clip.pt"), config=clip_config(golden), device="cpu")


@pytest.fixture(scope="module")
def nano() -> pe.CLIP:
    return pe.load_clip("PE-Core-nano", device="cpu")


def fitting(tower: pe.VisionTransformer, golden: Path, name: str) -> list[Tensor]:
    """The golden pictures whose sides divide into patches."""
    io, p = tower_io(golden, name), tower.patch_size
    pixels = [io[f"{size}.input"] for size in SIZES]
    return [x for x in pixels if x.shape[2] % p == 0 and x.shape[3] % p == 0]


def prompts(context: int, vocab: int, count: int = 40) -> Tensor:
    """Ids of texts of every length; some share a beginning, some are the same text twice."""
    tokens = torch.randint(1, vocab - 1, (count, context), generator=torch.Generator().manual_seed(0))
    for row in range(count):
        if row % 3:
            shared = row % context
            tokens[row, :shared] = tokens[row - 1, :shared]
        end = 1 + row % (context - 1)
        tokens[row, end], tokens[row, end + 1 :] = vocab - 1, 0
    tokens[5] = tokens[7]
    return tokens


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", TOWERS)
@torch.inference_mode()
def test_towers(golden: Path, way: str, name: str) -> None:
    tower = load_tower(golden, name)
    fast, depth = optimize(tower), tower.config.depth
    assert len(fitting(tower, golden, name)) == len(SIZES)
    for x in fitting(tower, golden, name):
        for norm in (False, True):
            layers = [0, -1, depth // 2]
            pairs = zip(
                fast.intermediates(x, layers, norm=norm), tower.intermediates(x, layers, norm=norm), strict=True
            )
            for got, wanted in pairs:
                assert got.patches.shape == wanted.patches.shape
                assert got.prefix.shape == wanted.prefix.shape
                assert relative(got.tokens(), wanted.tokens()) < 1e-5
        assert relative(fast(x).tokens(), tower(x).tokens()) < 1e-5
        if tower.pool is not None:
            assert relative(fast.pooled(x), tower.pooled(x)) < 1e-5


@torch.inference_mode()
def test_clip(clip: pe.CLIP, way: str) -> None:
    fast, tokens = optimize(clip), prompts(clip.config.text.context, clip.config.text.vocab)
    side = clip.config.vision.image_size
    pixels = torch.randn(3, 3, side, side)
    assert relative(fast.encode_text(tokens), clip.encode_text(tokens)) < 1e-5
    assert relative(fast.encode_text(tokens[:1]), clip.encode_text(tokens[:1])) < 1e-5
    assert relative(fast.encode_text(tokens[:4, :3]), clip.encode_text(tokens[:4, :3])) < 1e-5
    for got, wanted in zip(fast(pixels, tokens), clip(pixels, tokens), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    frames = torch.randn(2, 3, 3, side, side)
    assert relative(fast.encode_video(frames), clip.encode_video(frames)) < 1e-5
    assert fast.encode_text(tokens[:0]).shape == (0, clip.config.text.output_width)
    assert fast.encode_image(pixels[:0]).shape == (0, clip.config.text.output_width)
    assert (fast.device, fast.dtype, fast.config) == (clip.device, clip.dtype, clip.config)
    assert fast.vision.width == clip.vision.width


@pytest.mark.parametrize("form", ["plain", "transposed", "onednn"])
@torch.inference_mode()
def test_every_form_of_product(clip: pe.CLIP, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is fastest is the machine's affair. Some leave their bias to what comes next, and no bias here is zero."""
    if form == "onednn" and linear._try(form, torch.ones(8, 8), None, torch.float32) is None:
        pytest.skip("this form does not exist on this processor")
    monkeypatch.setattr(linear, "choose", lambda *a, **b: form)
    strange = copy.deepcopy(clip)
    g = torch.Generator().manual_seed(0)
    for parameter in strange.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=g))
    fast, side = optimize(strange), clip.config.vision.image_size
    assert {fast.vision.blocks[0].qkv.form, fast.text.blocks[-1].q.form} == {form}
    pixels, tokens = torch.randn(2, 3, side, side), prompts(clip.config.text.context, clip.config.text.vocab, 12)
    for got, wanted in zip(fast(pixels, tokens), strange(pixels, tokens), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


@torch.inference_mode()
def test_half_precision(golden: Path, nano: pe.CLIP) -> None:
    for name in ("core_cls", "lang_cls_ls"):
        tower = load_tower(golden, name).bfloat16()
        for x in fitting(tower, golden, name):
            got, wanted = optimize(tower)(x), tower(x)
            assert got.patches.dtype == torch.bfloat16
            exact = load_tower(golden, name)(x).tokens()
            assert F.cosine_similarity(got.tokens().float(), exact, dim=-1).min() > 0.9999
            assert relative(got.tokens(), exact) <= 1.1 * relative(wanted.tokens(), exact)  # no worse than plain
    half = pe.load_clip("PE-Core-nano", device="cpu", dtype="bfloat16")
    fast, side = optimize(half), half.preprocess.size
    pixels, tokens = torch.randn(2, 3, side, side).clamp(-1, 1), half.tokenize(["a cat", "a drawing of a dog"])
    for got, wanted in (
        (fast.encode_image(pixels), half.encode_image(pixels)),
        (fast.encode_text(tokens), half.encode_text(tokens)),
    ):
        assert got.dtype == torch.bfloat16
        assert F.cosine_similarity(got.float(), wanted.float()).min() > 0.9999


@pytest.fixture
def int8_form(monkeypatch: pytest.MonkeyPatch) -> str:
    """The int8 form that is right here is used, whether it is faster or not."""
    form, choose = "int8" if linear._exact() else "int8-narrow", linear.choose
    monkeypatch.setattr(linear, "choose", lambda dtype, q=None, *a, **b: form if q else choose(dtype, q, *a, **b))
    return form


@torch.inference_mode()
def test_int8(nano: pe.CLIP, way: str, int8_form: str) -> None:
    fast, side = optimize(nano, "int8"), nano.preprocess.size
    forms = [[p.form for p in (b.qkv, b.proj, b.mlp.fc1, b.mlp.fc2)] for b in fast.vision.blocks]
    assert int8_form not in forms[0]  # the first block is not rounded
    assert all(form == int8_form for block in forms[1:] for form in block)
    pixels = F.interpolate(torch.randn(4, 3, 8, 8), (side, side), mode="bilinear").clamp(-1, 1)
    cosine = F.cosine_similarity(fast.encode_image(pixels), nano.encode_image(pixels))
    assert cosine.min() > 0.999
    assert cosine.max() < 1 - 1e-7  # it did round
    tokens = nano.tokenize(["a cat", "a drawing of a dog"])
    assert relative(fast.encode_text(tokens), nano.encode_text(tokens)) < 1e-5  # texts are not rounded


@torch.inference_mode()
def test_int8_of_every_token(golden: Path, nano: pe.CLIP, int8_form: str) -> None:
    """Not of the pooled picture alone, where errors of single tokens cancel out."""
    towers = {name: load_tower(golden, name) for name in TOWERS}
    cases = [(tower, x) for name, tower in towers.items() for x in fitting(tower, golden, name)[:2]]
    photos = (Path(pe.__file__).parent / "samples" / "photos").iterdir()
    cases.append((nano.vision, nano.preprocess.batch(sorted(photos), workers=1)))
    for tower, x in cases:
        got, wanted = optimize(tower, "int8")(x).tokens(), tower(x).tokens()
        cosine = F.cosine_similarity(got, wanted, dim=-1).flatten()
        assert cosine.quantile(0.01) > 0.999
        assert cosine.min() > 0.998


@torch.inference_mode()
def test_small_portions_add_up(golden: Path, monkeypatch: pytest.MonkeyPatch, clip: pe.CLIP) -> None:
    tower = load_tower(golden, "core_cls")
    fast, x = optimize(tower), torch.randn(5, 3, 32, 32)
    whole = fast.pooled(x)
    monkeypatch.setattr(fast_module, "ROWS", 40)
    monkeypatch.setattr(fast_module, "ROWS_PER_THREAD", 1)
    assert [len(some) for some in fast._split(x, 4, 4)] == [2, 2, 1]
    assert relative(fast.pooled(x), whole) < 1e-6
    assert relative(fast.intermediates(x, [0])[0].tokens(), tower.intermediates(x, [0])[0].tokens()) < 1e-5
    tokens = prompts(clip.config.text.context, clip.config.text.vocab)
    wanted = optimize(clip).encode_text(tokens)
    monkeypatch.setattr(fast_module, "TEXTS", 7)
    assert relative(optimize(clip).encode_text(tokens), wanted) < 1e-6


@torch.inference_mode()
def test_many_sizes_do_not_pile_up(golden: Path) -> None:
    tower = load_tower(golden, "core_cls")
    fast, p = optimize(tower), tower.patch_size
    for n in (*range(1, 12), 1):
        x = torch.randn(1, 3, p, n * p)
        assert relative(fast(x).tokens(), tower(x).tokens()) < 1e-5
    assert len(fast._tables) <= 8


# ---------------------------------------------------------------- the tree of texts


def test_every_node_spells_the_beginning_of_its_texts() -> None:
    tokens = prompts(9, 50, 60)
    texts, lengths = trimmed(tokens)
    assert (lengths == tokens.argmax(1).numpy() + 1).all()
    order = np.lexsort(texts.T[::-1])
    texts, lengths = texts[order], lengths[order]
    tree = tree_of(texts, lengths, torch.device("cpu"))
    whole = [row[:length] for row, length in zip(texts.tolist(), lengths, strict=True)]
    beginnings = {tuple(text[: n + 1]) for text in whole for n in range(len(text))}
    assert len(tree.tokens) == len(beginnings) < lengths.sum()  # each beginning once, and some are shared
    for node in range(len(tree.tokens)):
        way = tree.path[node, : tree.lengths[node]].tolist()
        assert way[-1] == node
        assert tuple(tree.tokens[way].tolist()) in beginnings
        assert tree.depths[way].tolist() == list(range(len(way)))
    for text, end in zip(whole, tree.ends.tolist(), strict=True):
        assert tree.tokens[tree.path[end, : tree.lengths[end]].long()].tolist() == text


def test_a_classifier_asks_for_each_prompt_once_and_in_order(nano: pe.CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, templates = ["dog", "cat", "a car"], ["a photo of a {}.", "{}", "a {} at night"]
    seen: list[str] = []
    tokenize = nano.tokenize
    monkeypatch.setattr(nano, "tokenize", lambda texts: (seen.extend(texts), tokenize(texts))[1])
    weights = pe.ZeroShotClassifier(nano, labels, templates, batch_size=4).weights
    assert seen == sorted(t.replace("{}", label) for label in labels for t in templates)
    for label, row in zip(labels, weights, strict=True):
        with torch.inference_mode():
            texts = nano.encode_text(tokenize([t.replace("{}", label) for t in templates]), normalize=True)
        torch.testing.assert_close(row, F.normalize(texts.mean(0), dim=0), rtol=1e-5, atol=1e-6)
    fast = pe.ZeroShotClassifier(optimize(nano), labels, templates).weights
    torch.testing.assert_close(fast, weights, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the same calls


def test_the_same_errors(clip: pe.CLIP, golden: Path) -> None:
    fast = optimize(clip)
    p, context = clip.vision.patch_size, clip.config.text.context
    lang = load_tower(golden, "lang_cls_ls")
    pairs = [
        (lambda m: m.vision(torch.zeros(1, 3, p + 1, p)), ConfigError),
        (lambda m: m.vision(torch.zeros(1, 1, p, p)), ConfigError),
        (lambda m: m.vision(torch.zeros(1, 3, p, p, dtype=torch.uint8)), ConfigError),
        (lambda m: m.vision.intermediates(torch.zeros(1, 3, p, p), [99]), ConfigError),
        (lambda m: m.text(torch.zeros(1, context + 1, dtype=torch.int64)), ConfigError),
        (lambda m: m.text(torch.zeros(3, dtype=torch.int64)), ConfigError),
        (lambda m: m.text(torch.full((1, 2), 10**6)), IndexError),
        (lambda m: m.pooled(torch.zeros(1, 3, 32, 32)), ConfigError),
    ]
    for call, kind in pairs:
        models = (lang, optimize(lang)) if call is pairs[-1][0] else (clip, fast)
        messages = []
        for model in models:
            with pytest.raises(kind) as error:
                call(model)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert fast.vision.grid_of(torch.zeros(1, 3, 2 * p, p)) == (2, 1)


@torch.inference_mode()
def test_what_reads_models_reads_their_twins(nano: pe.CLIP, tmp_path: Path) -> None:
    fast = optimize(nano)
    pixels = torch.rand(3, 40, 60, 3).mul(255).byte().numpy()
    pictures = list(pixels)
    assert relative(pe.embed(fast, pictures), pe.embed(nano, pictures)) < 1e-5
    assert relative(pe.embed(fast.vision, pictures), pe.embed(nano.vision, pictures)) < 1e-5
    for layer in (0, -1):
        (got,), (wanted,) = (pe.features(model.vision, pictures, [layer]) for model in (fast, nano))
        assert relative(got.patches, wanted.patches) < 1e-5
    assert pe.pca_image(fast.vision, pictures[0]).size == pe.pca_image(nano.vision, pictures[0]).size
    plain = pe.ZeroShotClassifier(nano, ["cat", "dog"]).predict(pictures)
    for got, wanted in zip(pe.ZeroShotClassifier(fast, ["cat", "dog"]).predict(pictures), plain, strict=True):
        assert [p.label for p in got] == [p.label for p in wanted]
        assert [p.score for p in got] == pytest.approx([p.score for p in wanted], rel=1e-3)


def test_fingerprints(nano: pe.CLIP) -> None:
    assert fingerprint(optimize(nano)) == fingerprint(nano)
    assert fingerprint(optimize(nano).vision) == fingerprint(nano.vision)
    assert fingerprint(optimize(nano, "int8")) == fingerprint(nano) + "-int8"
    again = pe.load_clip("PE-Core-nano", device="cpu")
    assert fingerprint(optimize(again, keep=False)) == fingerprint(nano)


def test_a_fingerprint_sees_preprocessing_given_later(nano: pe.CLIP) -> None:
    for plain in (nano, nano.vision):
        fast, rounded = optimize(plain), optimize(plain, "int8")
        before = fingerprint(fast)
        for twin in (fast, rounded):
            twin.preprocess = twin.preprocess.fast(decode="scaled")
        assert fingerprint(fast) not in (before, fingerprint(rounded))
        assert fingerprint(rounded).endswith("-int8")
        assert not fingerprint(rounded).startswith(before)
        fast.preprocess = plain.preprocess
        assert fingerprint(fast) == before


def test_keep_false_frees_each_weight(golden: Path) -> None:
    tower = load_tower(golden, "core_nocls_hd24")
    x = fitting(tower, golden, "core_nocls_hd24")[0]
    with torch.inference_mode():
        wanted = tower.pooled(x)
        fast = optimize(tower, keep=False)
        assert relative(fast.pooled(x), wanted) < 1e-5
    assert all(parameter.numel() == 0 for parameter in tower.parameters())


def test_a_clip_around_another_librarys_tower_is_refused(clip: pe.CLIP) -> None:
    class Foreign(torch.nn.Module):
        config, preprocess = clip.vision.config, clip.vision.preprocess

    strange = pe.CLIP(Foreign(), clip.text)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Foreign, which has no fast twin"):
        optimize(strange)


# ---------------------------------------------------------------- the plain models, compiled


def same_embeddings(compiled: Callable[..., Any], clip: pe.CLIP, pictures: int = 2) -> None:
    side, config = clip.config.vision.image_size, clip.config.text
    pixels, tokens = torch.randn(pictures, 3, side, side), prompts(config.context, config.vocab, pictures + 6)
    for got, wanted in zip(compiled(pixels, tokens), clip(pixels, tokens), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_clip_compiles_whole(clip: pe.CLIP) -> None:
    """Without a break in the graph, for other batches too; eagerly, so that no compiler is needed."""
    torch.compiler.reset()
    compiled = torch.compile(clip, fullgraph=True, backend="eager")
    for pictures in (2, 3, 5):
        same_embeddings(compiled, clip, pictures)
    encode = torch.compile(clip.encode_image, fullgraph=True, backend="eager")
    pixels = torch.randn(1, 3, 32, 32)
    assert relative(encode(pixels), clip.encode_image(pixels)) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1500)  # half a minute of a processor, if this has one to itself
@pytest.mark.filterwarnings("ignore")  # inductor's own
@torch.inference_mode()
def test_a_clip_compiled_by_inductor(golden: Path) -> None:
    torch.compiler.reset()
    config = clip_config(golden)
    torch.manual_seed(0)
    clip = pe.CLIP(
        pe.VisionTransformer(replace(config.vision, depth=1)), pe.TextTransformer(replace(config.text, depth=1))
    ).eval()
    compiled = copy.deepcopy(clip)
    compiled.compile()
    same_embeddings(compiled, clip)
