"""Passes of a Perception Language Model to their loss.

B rows  T tokens  M media items  n tokens of an item  E decoder width
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perception.errors import ConfigError
from perception.training.trainer import Loss
from perception_encoder.vision import VisionTransformer
from perception_lm.decoder import Decoder
from perception_lm.losses import IGNORE, answer_loss
from perception_lm.model import PerceptionLM, splice
from perception_lm.training.examples import Pack
from perception_lm.training.flops import Flops, learns
from perception_lm.training.packing import past_of


class AnswerTask(nn.Module):
    """A pass to the summed cross-entropy of its answers.

    checkpointing  recompute each block in the backward pass
    together       several processes share the parameters: each pass goes through every part, with media or without
    chunk          positions whose logits exist at a time
    tile           side of a picture; the tower's own when not given, for towers that say it in their config

    Raises ConfigError for packed passes through a decoder that is not ours.
    """

    def __init__(
        self,
        model: PerceptionLM,
        *,
        checkpointing: bool = False,
        together: bool = False,
        chunk: int = 2048,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.checkpointing, self.together, self.chunk, self.tile = checkpointing, together, chunk, tile
        self.flops = Flops(model)
        if checkpointing and isinstance(model.encoder, VisionTransformer):
            model.encoder.set_grad_checkpointing()

    def forward(self, pack: Pack) -> Loss:
        decoder = cast(Any, self.model.decoder)
        device = next(self.parameters()).device
        pack = pack.to(device)
        text = decoder.embed(pack.tokens)  # B T E
        x = self._with_media(text, pack)
        if isinstance(decoder, Decoder):
            hidden = self._hidden(decoder, x, pack)
            head = decoder.token_embed.weight if decoder.head is None else decoder.head.weight
            total = answer_loss(hidden, pack.labels, head, chunk=self.chunk, reduction="sum")
        elif pack.packed and len(pack.lengths) > 1:
            raise ConfigError(f"a {type(decoder).__name__} takes one document a row; use layout='padded'")
        else:
            logits = decoder(x).flatten(0, 1).float()
            total = nn.functional.cross_entropy(logits, pack.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return Loss(total, float(pack.learned), self.flops(pack))

    def _with_media(self, text: Tensor, pack: Pack) -> Tensor:
        """B T E: the text with the media laid into its slots."""
        pixels = pack.pixels
        slots = pack.tokens == self.model.media_token
        if pixels is None or not len(pixels):
            if not self.together and not self._only_media_learns():
                return text
            # Every process goes through the tower, or one would wait for the others for ever; and where nothing else
            # learns, text alone would leave the backward pass without a graph.
            tile = self.tile or cast(Any, self.model.encoder).config.image_size
            media = self._encode(torch.zeros(1, 3, tile, tile), text)
            return text + 0 * media.sum()
        return splice(text, self._encode(pixels, text), slots)

    def _only_media_learns(self) -> bool:
        """Whether gradients are wanted, and by nothing behind the slots."""
        before = any(learns(cast(nn.Module, part)) for part in (self.model.encoder, self.model.projector))
        return torch.is_grad_enabled() and before and not learns(cast(nn.Module, self.model.decoder))

    def _encode(self, pixels: Tensor, like: Tensor) -> Tensor:
        """M 3 S S -> M n E. A tower that does not learn keeps nothing for the backward pass."""
        tower, projector = self.model.encoder, cast(Any, self.model.projector)
        moves = learns(cast(nn.Module, tower))
        # Processes that share parameters meet at every call of a block: all make one, however many media each has.
        chunk = 0 if self.together else self.model.media_chunk
        parts = []
        for part in pixels.split(chunk or len(pixels)):
            with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
                patches = tower(part.to(like.device, like.dtype)).patches
            parts.append(projector(patches))
        return torch.cat(parts)

    def _hidden(self, decoder: Decoder, x: Tensor, pack: Pack) -> Tensor:
        """B T E after the final norm."""
        past = past_of(pack)
        rope = decoder.rope(past.positions)
        for layer, block in enumerate(decoder.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, past, layer, use_reentrant=False)
            else:
                x = block(x, rope, past, layer)
        return decoder.norm(x)


def units(model: PerceptionLM) -> list[nn.Module]:
    """The parts that are sharded, recomputed and compiled one by one: every block of the tower and of the decoder."""
    return [*getattr(model.encoder, "blocks", ()), *getattr(model.decoder, "blocks", ())]
