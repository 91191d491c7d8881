"""The classifier's maths against the reference's matrix, and what it refuses."""

import io
import json
from pathlib import Path

import pytest
import torch
from golden_models import clip_config
from PIL import Image
from safetensors.torch import load_file

import perception_encoder as pe
from perception.errors import ConfigError, MediaError
from perception_encoder.zero_shot import classifier_weights


@pytest.fixture(scope="module")
def clip(golden: Path) -> pe.CLIP:
    return pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu")


def test_golden_classifier(golden: Path, clip: pe.CLIP) -> None:
    names = json.loads((golden / "metrics" / "zeroshot.json").read_text())
    tensors = load_file(golden / "metrics" / "zeroshot.safetensors")
    templates = [t.replace("{c}", "{}") for t in names["templates"]]
    for batch_size in (3, 256):  # batching over classes changes nothing
        weights = classifier_weights(clip, names["classnames"], templates, batch_size=batch_size)
        torch.testing.assert_close(weights.T, tensors["classifier"], rtol=1e-5, atol=1e-6)
    classifier = pe.ZeroShotClassifier(clip, names["classnames"], templates)
    logits = classifier.logits(tensors["image_features"]) / clip.logit_scale.exp() * 100
    torch.testing.assert_close(logits, tensors["logits"], rtol=1e-4, atol=1e-4)


def test_predict(clip: pe.CLIP, tmp_path: Path) -> None:
    files = []
    for name, colour in {"red": (250, 10, 10), "blue": (10, 10, 250)}.items():
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (40, 30), colour).save(files[-1])
    classifier = pe.ZeroShotClassifier(clip, ["a", "b", "c"], "{}")
    rows = classifier.predict(files, top=2)
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][0].score >= rows[0][1].score
    everything = classifier.predict(files[0], top=99)[0]
    assert {p.label for p in everything} == {"a", "b", "c"}
    assert sum(p.score for p in everything) == pytest.approx(1, abs=1e-5)
    prepared = torch.stack([clip.preprocess(file) for file in files])
    for row, other in zip(rows, classifier.predict(prepared, top=2), strict=True):
        assert [p.label for p in row] == [p.label for p in other]
        assert row[0].score == pytest.approx(other[0].score, rel=1e-5)


def test_one_picture_in_any_form(clip: pe.CLIP, tmp_path: Path) -> None:
    Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / "one.png")
    data = (tmp_path / "one.png").read_bytes()
    classifier = pe.ZeroShotClassifier(clip, ["a", "b"], "{}")
    wanted = classifier.predict(tmp_path / "one.png")
    with (tmp_path / "one.png").open("rb") as file:
        for form in (data, bytearray(data), memoryview(data), io.BytesIO(data), file):
            assert classifier.predict(form) == wanted


def test_labels_from_a_file(clip: pe.CLIP, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffcat\n\n  dog \n", "utf-8")
    assert pe.ZeroShotClassifier(clip, tmp_path / "labels.txt").labels == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.txt'"):
        pe.ZeroShotClassifier(clip, "nowhere.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(MediaError, match="not UTF-8"):
        pe.ZeroShotClassifier(clip, tmp_path / "bytes.txt")


def test_f83_nothing_to_choose_from(clip: pe.CLIP) -> None:
    with pytest.raises(ValueError, match="no labels given"):
        pe.ZeroShotClassifier(clip, [])
    with pytest.raises(ValueError, match="no templates given"):
        pe.ZeroShotClassifier(clip, ["a"], [])
    with pytest.raises(TypeError, match="given VisionTransformer, which has no encode_text, no"):
        pe.ZeroShotClassifier(clip.vision, ["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="given str"):
        pe.ZeroShotClassifier("PE-Core-nano", ["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels are texts; given 3"):
        pe.ZeroShotClassifier(clip, ["a", 3])
    with pytest.raises(ValueError, match="top=0"):
        pe.ZeroShotClassifier(clip, ["a"], "{}").predict(torch.zeros(1, 3, 32, 32), top=0)


def test_f84_odd_labels_and_templates(clip: pe.CLIP) -> None:
    with pytest.warns(UserWarning, match=r"more than once share their probability: \['cat'\]"):
        pe.ZeroShotClassifier(clip, ["cat", "dog", "cat"], "{}")
    with pytest.warns(UserWarning, match=r"probability: \['cat', 'dog'\]"):
        pe.ZeroShotClassifier(clip, ["dog", "cat", "a", "cat", "dog", "dog"], "{}")
    with pytest.raises(ValueError, match=r"template 'a photo' has no '\{\}'"):
        pe.ZeroShotClassifier(clip, ["cat"], ["{}", "a photo"])
    seen = []
    tokenize, clip.tokenize = clip.tokenize, lambda texts: seen.extend(texts) or tokenize(texts)
    try:
        pe.ZeroShotClassifier(clip, ["set {} of {0}"], ["a {}!"])
    finally:
        clip.tokenize = tokenize
    assert seen == ["a set {} of {0}!"]


def test_f52_one_bad_picture_of_many(clip: pe.CLIP, tmp_path: Path) -> None:
    good = Image.new("RGB", (20, 20), "green")
    (tmp_path / "bad.png").write_bytes(b"<html>no picture</html>")
    images = [good] * 40 + [tmp_path / "bad.png"] + [good] * 23
    classifier = pe.ZeroShotClassifier(clip, ["a", "b"], "{}")
    with pytest.raises(MediaError, match=r"picture 40: .*bad\.png"):
        classifier.predict(images)
    rows = classifier.predict(images, on_error="skip", batch_size=16)
    assert len(rows) == 64
    assert [i for i, row in enumerate(rows) if not row] == [40]
    failures: list = []
    vectors = pe.embed(clip, images, on_error="skip", batch_size=16, failures=failures)
    assert vectors.shape == (63, 12)
    assert [f.row for f in failures] == [40]
    assert "bad.png" in failures[0].source
    assert "an HTML page" in failures[0].reason
    with pytest.raises(ConfigError, match="on_error='ignore'; choose from raise, skip, log"):
        pe.embed(clip, images, on_error="ignore")
