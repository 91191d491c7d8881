"""Zero-shot and retrieval metrics, as PE's published numbers count them (clip_benchmark's definitions).

B pictures  K classes  T texts  M media
"""

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def top_k_accuracy(logits: Tensor, target: Tensor, k: int = 1) -> float:
    """Share of rows whose class is among the k highest. NaN when there are fewer than k classes.

    logits  B K
    target  B, class indices
    """
    _check_rows(logits, target)
    if logits.shape[1] < k:
        return math.nan
    return (logits.topk(k, dim=1).indices == target[:, None]).any(1).double().mean().item()


def mean_per_class_recall(logits: Tensor, target: Tensor) -> float:
    """Accuracy of each class that occurs, averaged: every class counts alike however many pictures it has.

    logits  B K
    target  B, class indices
    """
    _check_rows(logits, target)
    right = (logits.argmax(1) == target).double()
    return torch.stack([right[target == k].mean() for k in target.unique()]).mean().item()


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Area under the precision-recall steps of one class; equal scores enter together. NaN without a positive.

    scores    B
    positive  B, true or 1 where the picture has the class
    """
    order = scores.argsort(descending=True, stable=True)
    scores, found = scores[order], positive[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool, device=scores.device)])
    found, seen = found[last], torch.arange(1, len(scores) + 1, device=scores.device)[last]
    if found[-1] == 0:
        return math.nan
    gained = found.diff(prepend=found.new_zeros(1))
    return (gained * found / seen).sum().item() / found[-1].item()


def mean_average_precision(scores: Tensor, positive: Tensor) -> float:
    """`average_precision` of each class with a positive, averaged; for pictures of several classes.

    scores    B K
    positive  B K, true or 1 where the picture has the class
    """
    if scores.shape != positive.shape:
        raise ValueError(f"scores are {tuple(scores.shape)} and positives {tuple(positive.shape)}; both are B K")
    values = [average_precision(s, p) for s, p in zip(scores.T, positive.T, strict=True)]
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def positives_of(texts: Sequence[Hashable], media: Sequence[int], count: int | None = None) -> Tensor:
    """Which media belong to which texts: T M bool. Equal texts share what belongs to any of them.

    texts  T captions
    media  T, the medium each caption is of
    count  M; the highest index and one by default
    """
    if len(texts) != len(media):
        raise ValueError(f"{len(texts)} texts and {len(media)} media indices; give one index a text")
    groups: dict[Hashable, set[int]] = {}
    for text, medium in zip(texts, media, strict=True):
        groups.setdefault(text, set()).add(int(medium))
    positive = torch.zeros(len(texts), max(map(int, media)) + 1 if count is None else count, dtype=torch.bool)
    for row, text in enumerate(texts):
        positive[row, list(groups[text])] = True
    return positive


def reweight(scores: Tensor, scale: float = 1.0) -> Tensor:
    """Scores times their softmax over the queries: a candidate that every query likes counts for less.

    scores  queries x candidates
    scale   multiplies the scores first

    This looks at all queries at once, so it is no measure of a search for one; published PE retrieval uses it.
    """
    scores = scale * scores
    return scores * scores.softmax(0)


def retrieval_recall(
    scores: Tensor, positive: Tensor, ks: Sequence[int] = (1, 5, 10), *, reweight_scale: float | None = None
) -> dict[str, float]:
    """Recall both ways: "text_to_media@k" and "media_to_text@k", the share of queries with a positive in the first k.

    scores          T M, the higher the nearer
    positive        T M bool; every text and every medium has at least one
    reweight_scale  None: the scores as they are; a number: `reweight` them first, each way over its own queries
    """
    if scores.shape != positive.shape:
        raise ValueError(
            f"scores are {tuple(scores.shape)} and positives {tuple(positive.shape)}; both are texts x media"
        )
    found = {}
    for name, s, p in (("text_to_media", scores, positive), ("media_to_text", scores.T, positive.T)):
        s = s if reweight_scale is None else reweight(s, reweight_scale)
        for k in ks:
            hits = p.gather(1, s.topk(min(k, s.shape[1]), dim=1).indices).any(1)
            found[f"{name}@{k}"] = hits.double().mean().item()
    return found


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """A confidence interval of a share of n tries; 95 % by default (Wilson 1927)."""
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"a share from 0 to 1 of at least one try; given {share} of {n}")
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _check_rows(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"logits are B K and targets B; given {tuple(logits.shape)} and {tuple(target.shape)}")
