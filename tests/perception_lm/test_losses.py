"""The loss of the answers, against the whole logits matrix."""

import pytest
import torch
import torch.nn.functional as F

from perception_lm.losses import IGNORE, answer_loss


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_to_the_plain_loss(chunk: int, reduction: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 20, 8, generator=g, dtype=torch.float64).float().requires_grad_()
    head = torch.randn(50, 8, generator=g).requires_grad_()
    labels = torch.randint(0, 50, (3, 20), generator=g)
    labels[torch.rand(3, 20, generator=g) < 0.6] = IGNORE
    logits = F.linear(hidden, head)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction=reduction)
    ours = answer_loss(hidden, labels, head, chunk=chunk, reduction=reduction)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(plain, (hidden, head))
    for found, gradient in zip(torch.autograd.grad(ours, (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def test_no_row_of_logits_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none for what is not learned; the backward pass makes none again."""
    rows: list[int] = []
    original = F.linear

    def counted(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return original(hidden, weight)

    monkeypatch.setattr(F, "linear", counted)
    hidden, head = torch.randn(1, 100, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.full((1, 100), IGNORE)
    labels[0, 5:28] = 3
    answer_loss(hidden, labels, head, chunk=10).backward()
    assert rows == [10, 10, 3]  # each once: gradients are made while the logits exist


def test_no_gradients_where_none_are_asked_for() -> None:
    """A validation pass over a head that learns costs its logits alone."""
    from torch.utils.flop_counter import FlopCounterMode

    hidden, head = (torch.randn(n, 4, dtype=torch.bfloat16, requires_grad=True) for n in (12, 9))
    labels = torch.arange(12) % 9
    costs = []
    for asked in (True, False):
        with torch.set_grad_enabled(asked), FlopCounterMode(display=False) as counter:
            found = answer_loss(hidden, labels, head, chunk=5)
        costs.append(counter.get_total_flops())
        assert found.requires_grad == asked
    assert costs[0] > costs[1] == 2 * 12 * 4 * 9


def test_nothing_learned_is_zero_and_not_nan() -> None:
    """F-125. The gradient is zero, and there."""
    hidden, head = torch.randn(2, 5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = answer_loss(hidden, torch.full((2, 5), IGNORE), head)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_half_precision_is_summed_in_single() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 400, 8, generator=g).bfloat16()
    head = torch.randn(30, 8, generator=g).bfloat16()
    labels = torch.randint(0, 30, (1, 400), generator=g)
    loss = answer_loss(hidden, labels, head, reduction="sum")
    wanted = F.cross_entropy(F.linear(hidden, head)[0].float(), labels[0], reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)


def test_what_does_not_fit() -> None:
    hidden, labels, head = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long), torch.randn(9, 4)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        answer_loss(hidden, labels, head, reduction="max")
    for wrong in ((hidden, labels[:, 1:], head), (hidden[..., 1:], labels, head)):
        with pytest.raises(ValueError, match="expected"):
            answer_loss(*wrong)


def test_a_second_backward_pass_is_refused() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    loss = answer_loss(hidden, torch.tensor([0, 1, 2, IGNORE]), torch.randn(5, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
