"""The published schedule, value by value."""

import pytest
import torch
from torch import nn

from perception.errors import ConfigError
from perception_lm.training.run import OptimizerConfig, make_optimizer
from perception_lm.training.schedule import cosine_factor


def test_published_factors() -> None:
    """Trap 34: the first update has factor 0, not 1/warmup."""
    published = {0: 0.0, 1: 0.00833, 119: 0.99167, 120: 1.0, 10560: 0.505, 20999: 0.01}
    for step, factor in published.items():
        assert cosine_factor(step, warmup=120, steps=21000) == pytest.approx(factor, abs=1e-5)
    reference = [
        0.0, 0.25, 0.5, 0.75, 1.0, 0.9623203685930869, 0.855017856687341, 0.6944282990207195, 0.505,
        0.3155717009792806, 0.15498214331265903, 0.047679631406913066,
    ]  # fmt: skip
    found = [cosine_factor(step, warmup=4, steps=12) for step in range(12)]
    assert found == pytest.approx(reference, rel=1e-12)
    assert cosine_factor(12, warmup=4, steps=12) == cosine_factor(99, warmup=4, steps=12) == pytest.approx(0.01)
    for wrong in ({"warmup": 12, "steps": 12}, {"warmup": -1, "steps": 5}, {"warmup": 0, "steps": 5, "floor": 2.0}):
        with pytest.raises(ConfigError, match="expected 0 <= warmup < steps"):
            cosine_factor(0, **wrong)


def test_everything_that_learns_decays() -> None:
    """Trap 34: no group without weight decay for norms and biases; what is frozen is not the optimiser's."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.9, 0.95))
    assert len(group["params"]) == 4
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.step()
    for old, new in zip(before[:4], list(model.parameters())[:4], strict=True):
        torch.testing.assert_close(new, 0.95 * old)
    assert torch.equal(model[2].weight, before[4])
