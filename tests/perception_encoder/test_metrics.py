"""Metrics against golden numbers, and against counting by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perception_encoder.evaluation import (
    average_precision,
    mean_average_precision,
    mean_per_class_recall,
    positives_of,
    retrieval_recall,
    top_k_accuracy,
    wilson_interval,
)


def test_zero_shot_golden(golden: Path) -> None:
    want = json.loads((golden / "metrics/zeroshot.json").read_text())
    data = load_file(golden / "metrics/zeroshot.safetensors")
    logits = 100 * torch.nn.functional.normalize(data["image_features"], dim=-1) @ data["classifier"]
    torch.testing.assert_close(logits, data["logits"], rtol=1e-5, atol=1e-4)
    got = {
        "acc1": top_k_accuracy(logits, data["targets"]),
        "acc5": top_k_accuracy(logits, data["targets"], 5),
        "mean_per_class_recall": mean_per_class_recall(logits, data["targets"]),
    }
    assert got == pytest.approx(want["metrics"], abs=1e-9)
    assert got["acc1"] != pytest.approx(got["mean_per_class_recall"], abs=1e-3)
    mean = mean_average_precision(data["logits"], data["targets_multilabel"])
    assert mean == pytest.approx(want["metrics_multilabel"]["mean_average_precision"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "scale"), [("plain", None), ("reweighted_scale_1", 1.0), ("reweighted_scale_10", 10.0)]
)
def test_retrieval_golden(golden: Path, name: str, scale: float | None) -> None:
    want = json.loads((golden / "metrics/retrieval.json").read_text())
    data = load_file(golden / "metrics/retrieval.safetensors")
    texts = [caption for captions in want["captions"] for caption in captions]
    positive = positives_of(texts, data["text_to_media"].tolist())
    assert positive.sum() > len(texts), "some captions are shared"
    recall = retrieval_recall(data["text_embeddings"] @ data["media_embeddings"].T, positive, reweight_scale=scale)
    for k in (1, 5, 10):
        assert recall[f"text_to_media@{k}"] == pytest.approx(
            want["metrics"][name][f"image_retrieval_recall@{k}"], abs=1e-6
        )
        assert recall[f"media_to_text@{k}"] == pytest.approx(
            want["metrics"][name][f"text_retrieval_recall@{k}"], abs=1e-6
        )


def test_too_few_classes_is_not_a_number() -> None:
    logits, target = torch.eye(3), torch.arange(3)
    assert math.isnan(top_k_accuracy(logits, target, 5))
    assert top_k_accuracy(logits, target, 1) == 1


def test_average_precision_by_hand() -> None:
    # right, wrong, right, wrong: (1/1 + 2/3) / 2
    assert average_precision(torch.tensor([4.0, 3, 2, 1]), torch.tensor([1, 0, 1, 0])) == pytest.approx(5 / 6)
    # three at once, two of them right: precision 2/3 whatever their order
    for positive in ([1, 1, 0, 0], [0, 1, 1, 0]):
        assert average_precision(torch.tensor([2.0, 2, 2, 1]), torch.tensor(positive)) == pytest.approx(2 / 3)
    assert math.isnan(average_precision(torch.rand(3), torch.zeros(3)))


def test_equal_captions_share_what_is_right() -> None:
    positive = positives_of(["cat", "dog", "cat"], [0, 1, 2])
    assert positive.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    with pytest.raises(ValueError, match="3 texts and 2 media"):
        positives_of(["a", "b", "c"], [0, 1])


def test_wilson_interval() -> None:
    low, high = wilson_interval(0.1, 150)
    assert (low, high) == pytest.approx((0.0617, 0.1583), abs=1e-3)
    assert wilson_interval(0.0, 10)[0] == 0
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one try"):
        wilson_interval(0.5, 0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="B K"):
        top_k_accuracy(torch.rand(4, 3), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="texts x media"):
        retrieval_recall(torch.rand(4, 3), torch.ones(3, 4, dtype=torch.bool))
