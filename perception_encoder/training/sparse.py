"""A vision tower that looks at some of a picture's patches only: less work for nearly the same lesson.

Dropping patches while training is FLIP's (Li et al. 2023); drawings make it cheap, since much of them is empty ground.

B batch  N patches  n patches kept  P prefix tokens  D width  C output width
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.attention import attend
from perception.rope import rope_2d
from perception_encoder.vision import Block, VisionTransformer

EMPTY = 0.02  # spread of the values in a patch under which it is ground


def choose_patches(pixels: Tensor, patch_size: int, keep: int, generator: torch.Generator) -> Tensor:
    """B keep: indices of patches, drawn at random from those that show something, and from the ground after them."""
    mean, square = F.avg_pool2d(pixels, patch_size), F.avg_pool2d(pixels.square(), patch_size)
    spread = (square - mean.square()).mean(1).flatten(1)  # B N
    chance = torch.rand(spread.shape, generator=generator, device=generator.device)  # the same for every device
    score = (spread > EMPTY**2).float() + chance.to(spread.device)
    return score.topk(keep, dim=1).indices.sort(dim=1).values


def sparse_tokens(vision: VisionTransformer, pixels: Tensor, patches: Tensor) -> Tensor:
    """B P+n D after the last block and the final norm: what the tower makes of these patches, each at its own place.

    patches  B n, as `choose_patches` gives them; all of them is the tower's own forward pass
    """
    h, w = vision.grid_of(pixels)
    x = vision.patch_embed(pixels).flatten(2).transpose(1, 2)  # B N D
    if vision.class_token is not None:
        x = torch.cat([vision.class_token.expand(len(x), 1, -1), x], dim=1)
    prefix = x.shape[1] - h * w
    first = torch.arange(prefix, device=x.device)
    rows = torch.cat([first.expand(len(x), -1), patches + prefix], dim=1)  # B P+n
    x = vision.norm_pre((x + vision.positions(h, w)).gather(1, rows[..., None].expand(-1, -1, x.shape[-1])))
    cos, sin = rope_2d(h, w, vision.config.head_dim, prefix=prefix, device=x.device)
    turn = torch.complex(cos, sin)[rows][:, :, None, None]  # B P+n 1 1 head_dim/2
    for block in vision.blocks:
        assert isinstance(block, Block)
        x = x + block.ls1(_attention(block, block.norm1(x), turn))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vision.norm_post(x)


def pool(vision: VisionTransformer, tokens: Tensor) -> Tensor:
    """B C: the image embedding from normed tokens."""
    assert vision.pool is not None
    return vision.project(vision.pool(tokens))


def _attention(block: Block, x: Tensor, turn: Tensor) -> Tensor:
    qkv = block.attn.qkv(x).unflatten(-1, (3, block.attn.heads, -1))  # B n 3 heads head_dim
    pairs = torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2)))
    q, k = torch.view_as_real(pairs * turn).flatten(-2).unbind(2)
    return block.attn.proj(attend(q, k, qkv[:, :, 2]).flatten(2))
