"""The Llama 3 decoder (Meta 2024, arXiv:2407.21783), whole.

B batch  T tokens  S tokens with those before  E width  V vocabulary  heads  kv_heads  head_dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perception.rope import Rope, rope_1d, rotate
from perception_lm.cache import KVCache, Packed, Past
from perception_lm.config import DecoderConfig


class Decoder(nn.Module):
    """Embeddings to the logits of the next token.

    x          B T E
    cache      what came before; the T tokens are added to it. Or `Packed`: documents laid end to end
    positions  B T, or T   where the tokens stand, without a cache; 0, 1, 2, ... by default
    mask       bool, broadcasts to B heads T T; True means "may look". Without a cache; causal by default
    last       which logits: None or 0 all; k the last k; a tensor B k of indices into T
    return     B T V, or B k V

    Neighbouring channels are one rotating plane, the order of Meta's own files.
    """

    fast = "perception_lm.fast:fast_decoder"

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.token_embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.grad_checkpointing = False
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        cache: KVCache | Packed | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last: int | Tensor | None = None,
    ) -> Tensor:
        return self.logits(self.hidden(x, cache, positions=positions, mask=mask, last=last))

    def hidden(
        self,
        x: Tensor,
        cache: KVCache | Packed | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last: int | Tensor | None = None,
    ) -> Tensor:
        """What the head reads, after the final norm: B T E, or B k E.  Arguments as `forward` takes them."""
        past = fresh(x, positions, mask) if cache is None else cache.past(x.shape[1])
        if len(x) != len(past.positions):
            raise ValueError(f"{len(x)} rows of tokens were given with a cache for {len(past.positions)}")
        rope = self.rope(past.positions)
        again = self.grad_checkpointing and torch.is_grad_enabled() and not isinstance(cache, KVCache)
        for layer, block in enumerate(self.blocks):
            inputs = (x, rope, past, layer)
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        return self.norm(take(x, last))

    def embed(self, tokens: Tensor) -> Tensor:
        """B T int64 -> B T E"""
        return self.token_embed(tokens)

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gives to logits: B k E -> B k V"""
        return F.linear(x, self.token_embed.weight) if self.head is None else self.head(x)

    @property
    def head_weight(self) -> Tensor:
        """V E, the embedding's own where the two are tied"""
        return self.token_embed.weight if self.head is None else self.head.weight

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (Chen et al. 2016)."""
        self.grad_checkpointing = enable

    def rope(self, positions: Tensor) -> Rope:
        """cos, sin, each B*T head_dim/2, float32"""
        c = self.config
        return rope_1d(positions.flatten(), c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache beside the weights, in their dtype unless another is given."""
        weight, c = self.token_embed.weight, self.config
        return KVCache(
            batch,
            capacity,
            depth=c.depth,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            device=weight.device,
            dtype=dtype or weight.dtype,
        )

    def reset_parameters(self) -> None:
        """The start of training: N(0, 1/E) cut at three deviations; the maps that end a residual branch scaled down
        with their depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            std = parameter.shape[1] ** -0.5
            if name == "token_embed.weight":
                std = self.width**-0.5
            elif name.endswith(("attn.o.weight", "mlp.down.weight")):
                std *= (2 * self.config.depth) ** -0.5
            nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm1, self.attn = RMSNorm(config.width, config.norm_eps), SelfAttention(config)
        self.norm2, self.mlp = RMSNorm(config.width, config.norm_eps), GatedMlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, rope: Rope, past: Past, layer: int) -> Tensor:  # B T E -> B T E
        x = x + self.attn(self.norm1(x), rope, past, layer)
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Grouped queries (Ainslie et al. 2023): one head of keys and values serves heads / kv_heads heads of queries."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        E, self.head_dim = config.width, config.head_dim
        self.q = nn.Linear(E, config.heads * self.head_dim, bias=False)
        self.k = nn.Linear(E, config.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(E, config.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(config.heads * self.head_dim, E, bias=False)

    def forward(self, x: Tensor, rope: Rope, past: Past, layer: int) -> Tensor:  # B T E -> B T E
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))
        q, k = turn(q, rope), turn(k, rope)  # B T heads head_dim, B T kv_heads head_dim
        return self.o(past.attend(layer, q, k, v).flatten(2))


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), all of it in float32, the weight too, whatever the dtype of x."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def turn(x: Tensor, rope: Rope) -> Tensor:
    """`rotate` with a position of its own for each token of each row: all rows are laid end to end for it."""
    return rotate(x.flatten(0, 1)[None], rope)[0].view_as(x)


def fresh(x: Tensor, positions: Tensor | None, mask: Tensor | None) -> Past:
    """Nothing before: B T E tokens at the positions given, or at 0, 1, 2, ..."""
    B, T = x.shape[:2]
    if positions is None:
        positions = torch.arange(T, device=x.device)
    return Past(positions.expand(B, T), mask)


def take(x: Tensor, last: int | Tensor | None) -> Tensor:
    """B T E -> B k E: all, the last k, or those at the indices B k."""
    if isinstance(last, Tensor):
        return x.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
    return x[:, -last:] if last else x
