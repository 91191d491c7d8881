"""Many tokens to one vector."""

import torch
from torch import Tensor, nn

from perception.attention import attend
from perception.layers import Mlp


class AttentionPool(nn.Module):
    """A learned query looks at every token (Lee et al. 2019, PMA), then an MLP with a residual.

    The query itself has no residual. The MLP is 4 x width whatever the tower's own ratio is.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, tokens: Tensor) -> Tensor:  # B N D -> B D
        D = tokens.shape[-1]
        q_weight, kv_weight = self.qkv.weight.split([D, 2 * D])
        q_bias, kv_bias = self.qkv.bias.split([D, 2 * D])
        q = nn.functional.linear(self.probe, q_weight, q_bias).expand(tokens.shape[0], -1, -1)  # B 1 D
        k, v = nn.functional.linear(tokens, kv_weight, kv_bias).unflatten(-1, (2, self.heads, -1)).unbind(2)
        x = self.proj(attend(q.unflatten(-1, (self.heads, -1)), k, v).flatten(2))[:, 0]  # B D
        return x + self.mlp(self.norm(x))
