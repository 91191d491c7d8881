"""Optimizers and the learning rate over time."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose step is an orthogonal matrix (Jordan et al. 2024): every direction of a matrix learns alike.

    For the matrices inside transformer blocks; give embeddings, vectors and the first and last layer to AdamW. A packed
    query-key-value matrix is three matrices. Plain float32 (PyTorch's own computes in bfloat16, slow on many CPUs).

    lr            the step's RMS is 0.2 * lr whatever the shape, so AdamW's rates fit (Liu et al. 2025, section 2.2)
    weight_decay  as in AdamW
    workers       threads that share the matrices, one core each; the result does not depend on it
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        workers: int = 1,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.workers = workers

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.workers == 1:
            for p, group in work:
                self._update(p, group)
        else:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(lambda one: self._update(*one), work))
        return loss

    @torch.no_grad()
    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(state["momentum"], group["momentum"])
        parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
        step = torch.cat([orthogonal(part) * max(part.shape) ** 0.5 for part in ahead.chunk(parts)])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=0.2 * group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of a matrix, by a fifth-order Newton-Schulz iteration (Jordan et al. 2024)."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    if x.shape[1] >= 2 * x.shape[0]:  # all factors are polynomials of x x^T, so they can be multiplied without x
        gram, one = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
        factor = one
        for _ in range(steps):
            p = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
            factor, gram = p @ factor, p @ gram @ p
        x = factor @ x
        return x if matrix.shape[0] <= matrix.shape[1] else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def make_optimizers(
    module: nn.Module, lr: float, weight_decay: float = 0.05, *, matrix_lr: float | None = None, workers: int = 1
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of `blocks` (at `matrix_lr`, or `lr`), AdamW for all else; vectors are not decayed."""
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        else:
            (matrices if "blocks." in name and parameter.ndim == 2 else tables).append(parameter)
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=lr if matrix_lr is None else matrix_lr, weight_decay=weight_decay, workers=workers),
        torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98), fused=True),
    ]


def warmup_stable_decay(step: int, steps: int, warmup: int = 0, decay: int = 0) -> float:
    """A factor on the learning rate: up over `warmup` steps, one, down to zero over the last `decay`.

    The middle does not depend on the end, so a run can be made longer without beginning again (Hu et al. 2024).
    """
    up = (step + 1) / (warmup + 1)
    down = (steps - step) / (decay + 1)
    return max(0.0, min(1.0, up, down))


def warmup_cosine(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """A factor on the learning rate: up over `warmup` steps, then half a cosine down to `floor` at the last."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def layer_groups(
    module: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW in which a block learns the slower the lower it is (Bao et al. 2021).

    Block i of a tower of L has lr * layer_decay ** (L - i), what is below the blocks (patches or tokens, positions)
    lr * layer_decay ** (L + 1), and what is above them lr. Vectors, positions and tokens' embeddings are not decayed.
    Works on one tower and on any module that holds some; what learns in none of them has the full rate.
    """
    depths = {
        f"{name}." if name else "": len(part.blocks)
        for name, part in module.named_modules()
        if isinstance(getattr(part, "blocks", None), nn.ModuleList)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = max((prefix for prefix in depths if name.startswith(prefix)), key=len, default=None)
        height = 0 if tower is None else _below_top(name.removeprefix(tower), depths[tower])
        plain = parameter.ndim < 2 or any(word in name for word in ("pos_embed", "token_embed", "class_token", "probe"))
        key = (lr * layer_decay**height, 0.0 if plain else weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _below_top(name: str, depth: int) -> int:
    """How many layers are above a parameter: 0 over the blocks, depth + 1 under them."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        return depth - int(rest.partition(".")[0])
    return depth + 1 if part in ("patch_embed", "token_embed", "class_token", "pos_embed", "norm_pre") else 0
