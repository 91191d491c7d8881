"""The text transformer of PE-Core: CLIP's, causal, pooled at the end-of-text token (Radford et al. 2021).

B batch  n tokens a text  D width  C output width
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perception.attention import attend
from perception.errors import ConfigError
from perception.layers import Mlp
from perception_encoder.config import TextConfig


class TextTransformer(nn.Module):
    """Token ids to one embedding a text, not normalised.

    tokens  B n, int64, n up to the context
    return  B C

    A text ends at its highest id (end-of-text, first occurrence). What follows cannot change the result: attention is
    causal, so padding needs no mask and may be trimmed. Raises ConfigError for ids or lengths that do not fit.
    """

    fast = "perception_encoder.fast:fast_text"

    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.width
        self.config, self.width = config, D
        self.token_embed = nn.Embedding(config.vocab, D)
        self.pos_embed = nn.Parameter(torch.zeros(config.context, D))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.project = nn.Linear(D, config.output_width, bias=False)
        self.grad_checkpointing = False
        self.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.config.context)
        x = self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]  # B n D
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        end = tokens.argmax(dim=-1)  # B
        x = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]  # B D
        return self.project(self.norm(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (Chen et al. 2016)."""
        self.grad_checkpointing = enable

    def reset_parameters(self) -> None:
        """The start of training, as CLIP's: small embeddings, residual branches scaled down with depth."""
        D, L = self.width, self.config.depth
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=D**-0.5)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.normal_(block.attn.proj.weight, std=D**-0.5 * (2 * L) ** -0.5)
            nn.init.zeros_(block.attn.proj.bias)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=D**-0.5 * (2 * L) ** -0.5)
        nn.init.normal_(self.project.weight, std=D**-0.5)


class TextBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); every token sees itself and those before it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.width
        self.norm1, self.attn = nn.LayerNorm(D), CausalAttention(D, config.heads)
        self.norm2, self.mlp = nn.LayerNorm(D), Mlp(D, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:  # B n D -> B n D
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # B n D -> B n D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each B n heads head_dim
        return self.proj(attend(q, k, v, causal=True).flatten(2))


def check_tokens(tokens: Tensor, context: int) -> None:
    """ConfigError unless tokens are B n, with n from 1 to the context; TypeError for texts."""
    if not isinstance(tokens, Tensor):
        given = type(tokens).__name__
        raise TypeError(f"tokens are a tensor, B n; given {given}; run texts through `tokenize` first")
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= context:
        raise ConfigError(f"tokens are B n with n from 1 to {context}; given {tuple(tokens.shape)}")
