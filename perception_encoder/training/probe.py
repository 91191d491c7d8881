"""What frozen features know of a task: a linear map on top, its regularisation chosen on held-out rows.

N rows  D features  K classes
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError

STRENGTHS = tuple(10.0**e for e in range(-6, 3))


class Probe(NamedTuple):
    """A linear classifier of standardised features: `logits(features)`.

    strength  the regularisation that was best on the validation rows
    accuracy  theirs
    sweep     accuracy of every strength tried
    """

    weight: Tensor  # K D
    bias: Tensor  # K
    mean: Tensor  # D
    scale: Tensor  # D
    strength: float
    accuracy: float
    sweep: dict[float, float]

    def logits(self, features: Tensor) -> Tensor:  # N D -> N K
        return F.linear((features.float() - self.mean) / self.scale, self.weight, self.bias)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    *,
    kind: str = "ridge",
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Fit one classifier a strength and keep the one that names most of the validation rows; the weaker of equals.

    kind       "ridge": least squares of one-hot labels, in closed form, one decomposition for all strengths
               "logistic": cross-entropy by L-BFGS, each strength from the one before
    strengths  of the squared weights, as parts of the rows' mean loss

    Raises ConfigError for rows that do not fit together.
    """
    if features.ndim != 2 or len(features) != len(labels) or features.shape[1] != validation.shape[-1] or not strengths:
        raise ConfigError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)} and validation features "
            f"{tuple(validation.shape)}; expected N D, N and M D"
        )
    if kind not in ("ridge", "logistic"):
        raise ConfigError(f"kind={kind!r}; expected 'ridge' or 'logistic'")
    features = features.float()
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    x, K = (features - mean) / scale, int(max(labels.max(), validation_labels.max())) + 1
    fitted = (_ridge if kind == "ridge" else _logistic)(x, labels, K, sorted(strengths))
    best: Probe | None = None
    sweep: dict[float, float] = {}
    for strength, (weight, bias) in fitted.items():
        probe = Probe(weight, bias, mean, scale, strength, 0.0, sweep)
        right = (probe.logits(validation).argmax(1) == validation_labels).float().mean().item()
        sweep[strength] = right
        if best is None or right > best.accuracy:
            best = probe._replace(accuracy=right)
    assert best is not None
    return best


def _ridge(x: Tensor, labels: Tensor, K: int, strengths: Sequence[float]) -> dict[float, tuple[Tensor, Tensor]]:
    y = F.one_hot(labels, K).to(x.dtype)
    bias = y.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    turned = vectors.T @ (x.T @ (y - bias)) / len(x)  # D K
    return {s: ((vectors @ (turned / (values.clamp(min=0)[:, None] + s))).T, bias) for s in strengths}


def _logistic(x: Tensor, labels: Tensor, K: int, strengths: Sequence[float]) -> dict[float, tuple[Tensor, Tensor]]:
    weight = torch.zeros(K, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(K, dtype=x.dtype, device=x.device, requires_grad=True)
    found = {}
    for strength in sorted(strengths, reverse=True):  # strong ones are near 0, where this begins
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss(strength: float = strength, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), labels) + strength * weight.square().sum() / 2
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        found[strength] = (weight.detach().clone(), bias.detach().clone())
    return dict(sorted(found.items()))
