"""How many operations a pass takes, the tower's too: what speed is measured against."""

from typing import Any, cast

from torch import nn

from perception_encoder.vision import VisionTransformer
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM
from perception_lm.training.examples import Pack


class Flops:
    """Multiplications and additions of a pass, forward and backward; nothing counts that is only done again.

    A matrix of P numbers takes 2 P operations a token forward, 2 P backward for what is before it, and 2 P for its own
    gradient if it learns. Attention of n queries over n keys takes 4 n^2 of the width, half of it where it is causal,
    and twice that backward. Padding counts: it is computed. Foreign parts count their matrices alone.
    """

    def __init__(self, model: PerceptionLM):
        encoder, decoder, projector = (cast(Any, part) for part in (model.encoder, model.decoder, model.projector))
        tower, bridge, text = map(learns, (encoder, projector, decoder))
        self.patch = encoder.patch_size
        self.item = (1 + 2 * tower) * 2 * _matrices(encoder) + (1 + tower + bridge) * 2 * _matrices(projector)
        self.item_squared = 0
        if isinstance(encoder, VisionTransformer):
            self.item_squared = (1 + 2 * tower) * 4 * encoder.width * len(encoder.blocks)
        back = tower or bridge or text
        self.token = (1 + back + text) * 2 * _matrices(decoder)
        self.squared = self.answer = 0
        if isinstance(decoder, Decoder):
            c = decoder.config
            self.squared = (1 + 2 * back) * 2 * c.heads * c.head_dim * c.depth
            self.answer = (1 + back + text) * 2 * c.vocab * c.width

    def __call__(self, pack: Pack) -> float:
        tokens = pack.tokens.numel()
        squares = sum(n * n for n in pack.lengths) if pack.packed else tokens * pack.tokens.shape[1]
        total = float(self.token * tokens + self.squared * squares + self.answer * pack.learned)
        if pack.pixels is not None:
            patches = (pack.pixels.shape[-1] // self.patch) ** 2
            total += len(pack.pixels) * (self.item * patches + self.item_squared * patches**2)
        return total


def learns(part: nn.Module) -> bool:
    """Whether anything of a part learns."""
    return any(p.requires_grad for p in part.parameters())


def _matrices(part: nn.Module) -> int:
    """Numbers in the matrices that every token meets: not the embedding, and not the head, which few meet."""
    skip = ("token_embed.", "head.", "pos_embed")
    return sum(p.numel() for name, p in part.named_parameters() if p.ndim >= 2 and not name.startswith(skip))
