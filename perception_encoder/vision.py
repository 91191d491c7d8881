"""The vision transformer of Perception Encoder (Bolya et al. 2025, arXiv:2504.13181).

B batch  H W pixels  h w patch grid  N tokens  P prefix tokens  D width  C output width
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perception.attention import attend
from perception.errors import ConfigError
from perception.layers import LayerScale, Mlp
from perception.pixels import PixelSpec
from perception.rope import Rope, rope_2d, rotate
from perception_encoder.config import VisionConfig
from perception_encoder.pooling import AttentionPool
from perception_encoder.protocol import Features


class VisionTransformer(nn.Module):
    """Normalised pixels to features on their grid.

    pixels  B 3 H W; H and W any multiple of the patch size

    Raises ConfigError for other sizes: it names the nearest good one. `preprocess` makes the pixels these weights
    expect; it is the published one (squash to `image_size`, bilinear, [-1, 1]) unless another is handed in. `source` is
    what `load_encoder` was given.
    """

    fast = "perception_encoder.fast:fast_vision"
    source: str | None = None

    def __init__(self, config: VisionConfig, preprocess: PixelSpec | None = None):
        super().__init__()
        D = config.width
        self.config, self.width, self.patch_size = config, D, config.patch_size
        self.preprocess = preprocess or PixelSpec(size=config.image_size)
        self.patch_embed = PatchEmbed(3, D, config.patch_size, config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(D)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(config.class_token + config.grid**2, D))
        self.norm_pre = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_post = nn.LayerNorm(D) if config.norm_post else nn.Identity()
        self.pool = AttentionPool(D, config.pool_heads) if config.pool else None
        self.project = nn.Linear(D, config.output_width, bias=False) if config.output_width else nn.Identity()
        self.grad_checkpointing = False
        self.reset_parameters()

    def forward(self, pixels: Tensor) -> Features:
        """The last block's output, before the final norm."""
        return self.intermediates(pixels, [-1])[0]

    def intermediates(self, pixels: Tensor, layers: Sequence[int], *, norm: bool = False) -> list[Features]:
        """Features after the blocks asked for, in the order asked, in one pass that stops at the last of them.

        layers  indices of blocks; 0 is the first, -1 the last
        norm    apply the final norm to each

        Raises ConfigError for an index that is not there.
        """
        wanted = check_layers(layers, len(self.blocks))
        h, w = self.grid_of(pixels)
        found = {}
        for index, x in self._run(pixels, h, w, stop=max(wanted, default=-1)):
            if index in wanted:
                found[index] = on_grid(self.norm_post(x) if norm else x, h, w)
        return [found[index] for index in wanted]

    def pooled(self, pixels: Tensor) -> Tensor:
        """B C: the image embedding of PE-Core, not normalised. Raises ConfigError for towers without a pool."""
        if self.pool is None:
            raise ConfigError("this tower has no pooling head (PE-Lang and PE-Spatial have none); use its patches")
        return self.project(self.pool(self.norm_post(self(pixels).tokens())))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (Chen et al. 2016)."""
        self.grad_checkpointing = enable

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """The h, w patch grid of a batch of pixels; ConfigError when they do not fit this tower."""
        return check_pixels(pixels, self.patch_size)

    def _run(self, pixels: Tensor, h: int, w: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """The tokens after each block up to `stop`: (index, B P+h*w D)."""
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)  # B h*w D
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)  # B P+h*w D
        x = self.norm_pre(x + self.positions(h, w))
        rope = rope_2d(h, w, self.config.head_dim, prefix=x.shape[1] - h * w, device=x.device)
        for index, block in enumerate(self.blocks[: stop + 1]):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
            yield index, x

    def positions(self, h: int, w: int) -> Tensor:
        """P+h*w D: the learned positions, the grid stretched bilinearly (not antialiased) to h w."""
        return stretch(self.pos_embed, self.config.grid, h, w)

    def reset_parameters(self) -> None:
        """The start of training: positions, class token and projection N(0, 1/D), query N(0, 1), qkv Xavier."""
        std = self.width**-0.5
        for parameter in (self.class_token, self.pos_embed, getattr(self.project, "weight", None)):
            if parameter is not None:
                nn.init.normal_(parameter, std=std)
        for attention in [block.attn for block in self.blocks] + [self.pool] * bool(self.pool):
            nn.init.xavier_uniform_(attention.qkv.weight)
            nn.init.zeros_(attention.qkv.bias)
            nn.init.zeros_(attention.proj.bias)
        if self.pool:
            nn.init.normal_(self.pool.probe)


class PatchEmbed(nn.Conv2d):
    """B 3 H W -> B D h w

    On a GPU a matrix product, for cuDNN's convolutions take float32 for TF32 unless told otherwise: errors of 1e-3 in
    a tower that is exact everywhere else. PyTorch's products are exact unless asked.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.is_cuda:
            return embed_patches(pixels, self.weight).permute(0, 3, 1, 2)
        return super().forward(pixels)


def embed_patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """B 3 H W -> B h w D: a convolution of D 3 p p whose step is its size, as one matrix product."""
    p = weight.shape[-1]
    patches = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # B h w 3 p p
    return F.linear(patches.flatten(3), weight.flatten(1))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D, start = config.width, config.layer_scale
        self.norm1, self.attn = nn.LayerNorm(D), SelfAttention(D, config.heads)
        self.ls1 = nn.Identity() if start is None else LayerScale(D, start)
        self.norm2, self.mlp = nn.LayerNorm(D), Mlp(D, config.mlp_width)
        self.ls2 = nn.Identity() if start is None else LayerScale(D, start)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:  # B N D -> B N D
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:  # B N D -> B N D
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each B N heads head_dim
        x = attend(rotate(q, rope), rotate(k, rope), v)
        return self.proj(x.flatten(2))


def check_pixels(pixels: Tensor, patch_size: int) -> tuple[int, int]:
    """The h, w patch grid of a batch of pixels; ConfigError when they do not divide into patches, TypeError for what is
    no tensor."""
    P = patch_size
    if not isinstance(pixels, Tensor):
        given = type(pixels).__name__
        raise TypeError(f"pixels are a tensor, B 3 H W; given {given}; run pictures through `preprocess` first")
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ConfigError(f"pixels are B 3 H W; given {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ConfigError(f"pixels are normalised floats; given {pixels.dtype}; run them through `preprocess` first")
    H, W = pixels.shape[2:]
    if H % P or W % P or not H or not W:
        near = " x ".join(str(max(P, round(side / P) * P)) for side in (H, W))
        raise ConfigError(f"{H} x {W} pixels do not divide into patches of {P}; the nearest good size is {near}")
    return H // P, W // P


def check_layers(layers: Sequence[int], depth: int) -> list[int]:
    """The layers counted from the first; ConfigError for one that is not there."""
    if bad := [layer for layer in layers if not -depth <= layer < depth]:
        raise ConfigError(f"no layers {bad} in a tower of {depth} blocks; give {-depth} to {depth - 1}")
    return [layer % depth for layer in layers]


def on_grid(x: Tensor, h: int, w: int) -> Features:
    """B P+h*w D to patches on their grid."""
    prefix, patches = x.split([x.shape[1] - h * w, h * w], dim=1)
    return Features(patches=patches.unflatten(1, (h, w)), prefix=prefix)


def stretch(pos_embed: Tensor, g: int, h: int, w: int) -> Tensor:
    """Learned positions P+g*g D, the grid stretched bilinearly (not antialiased) to h w: P+h*w D."""
    if (h, w) == (g, g):
        return pos_embed
    prefix, grid = pos_embed.split([len(pos_embed) - g * g, g * g])
    grid = grid.unflatten(0, (g, g)).permute(2, 0, 1)[None]  # 1 D g g
    grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)
    return torch.cat([prefix, grid[0].flatten(1).T])
