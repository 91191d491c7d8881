"""Pictures and text in, next-token logits out.

B batch  T text tokens  M media items (images, tiles, frames)  n tokens an item  D encoder  E decoder  V vocabulary
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import ConfigError, RequestError
from perception.kernels.upload import parts_on
from perception_encoder.protocol import VisionEncoder
from perception_encoder.vision import VisionTransformer
from perception_lm.config import PlmConfig, check_widths
from perception_lm.decoder import Decoder as Llama
from perception_lm.projector import build_projector

IGNORE = -100  # a label that asks for nothing


class Projector(Protocol):
    """The encoder's patch grid to the decoder's tokens."""

    in_width: int
    width: int

    def tokens(self, h: int, w: int) -> int: ...  # n for an h x w grid
    def __call__(self, patches: Tensor) -> Tensor: ...  # M h w D -> M n E


class Decoder(Protocol):
    """Any causal language model that can start from embeddings.

    Two things are optional. `new_cache(batch, capacity)` gives a `perception_lm.cache.Cache`; without it, generation
    runs the whole text again at each step. `last=` (B k indices into T) asks for few logits; a decoder that takes a
    cache takes it as well.
    """

    width: int

    def embed(self, tokens: Tensor) -> Tensor: ...  # B T -> B T E
    def __call__(self, x: Tensor, cache: Any = None) -> Tensor: ...  # B T E -> B T V


class Output(NamedTuple):
    """What the model returns when it is given labels."""

    loss: Tensor  # []
    logits: Tensor  # B T V


class PerceptionLM(nn.Module):
    """An encoder, a projector and a decoder that were built outside.

    tokens  B T int64     media_token wherever a media token goes; rows of different length are padded on the right
    pixels  M 3 S S       all media items of the batch, the first row's first; None for text alone
    labels  B T int64     the tokens themselves where they are to be learned, -100 elsewhere; shifted here
    return  logits B T V, or Output(loss, logits) with labels

    `media_chunk` items go through the encoder at a time; None sends all at once. Raises ConfigError when the widths do
    not fit, RequestError when slots and media tokens do not.
    """

    fast = "perception_lm.fast:fast_plm"

    def __init__(
        self,
        encoder: VisionEncoder,
        projector: Projector,
        decoder: Decoder,
        media_token: int,
        *,
        media_chunk: int | None = 8,
    ):
        super().__init__()
        check_widths(projector, encoder.width, decoder.width)
        self.encoder, self.projector, self.decoder = encoder, projector, decoder
        self.media_token, self.media_chunk = media_token, media_chunk

    def forward(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cache: Any = None,
        **options: Any,
    ) -> Any:
        """`options` (positions=, mask=, last=) go to the decoder."""
        logits = self.decoder(self.embed(tokens, pixels), cache, **options)  # B T V
        return logits if labels is None else Output(next_token_loss(logits, labels), logits)

    def embed(self, tokens: Tensor, pixels: Tensor | None = None, *, media: Tensor | None = None) -> Tensor:
        """B T E: the text with the media laid into its slots.  `media` M n E, when `encode_media` has run already."""
        text = self.decoder.embed(tokens)
        if media is None:
            if pixels is None or not len(pixels):
                media = text.new_zeros(0, 0, text.shape[-1])
            else:
                media = self.encode_media(pixels)
        return splice(text, media, slots=tokens == self.media_token)

    def encode_media(self, pixels: Tensor) -> Tensor:
        """M 3 S S -> M n E, `media_chunk` items at a time; the pixels may wait on another device."""
        like = next((p for p in self.parameters() if p.is_floating_point()), pixels)
        parts = parts_on(pixels, self.media_chunk, like)
        return torch.cat([self.projector(self.encoder(part).patches) for part in parts])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of encoder and decoder in the backward pass instead of keeping their activations.

        Raises ConfigError when neither can; one that cannot stays as it is.
        """
        parts = [part for part in (self.encoder, self.decoder) if hasattr(part, "set_grad_checkpointing")]
        if not parts:
            names = f"{type(self.encoder).__name__} and {type(self.decoder).__name__}"
            raise ConfigError(f"{names} cannot recompute activations: they have no set_grad_checkpointing()")
        for part in parts:
            part.set_grad_checkpointing(enable)

    @property
    def device(self) -> torch.device:
        first = next(self.parameters(), None)  # a decoder of somebody's may have none
        return torch.device("cpu") if first is None else first.device


def splice(text: Tensor, media: Tensor, slots: Tensor) -> Tensor:
    """Lay the media tokens into their slots, in reading order.

    text    B T E
    media   M n E   all items of the batch, first sample's first
    slots   B T     bool; as many True as there are media tokens

    Raises RequestError when the counts differ. The count costs one synchronisation a prefill, none a decoded token.
    """
    asked, given = int(slots.sum()), media.shape[0] * media.shape[1]
    if asked != given:
        raise RequestError(
            f"the prompt keeps {asked} slots for media, but {media.shape[0]} items of {media.shape[1]} tokens "
            f"came out of the encoder ({given}); the processor and the projector disagree on the grid"
        )
    return text.masked_scatter(slots[..., None], media.to(text.dtype))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in float32, of labels[t + 1] under logits[t]; 0, not NaN, when nothing is labelled.

    logits  B T V
    labels  B T int64, -100 where nothing is asked
    """
    wanted = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=IGNORE, reduction="sum")
    return total / (wanted != IGNORE).sum().clamp(min=1)


def build(config: PlmConfig, media_token: int) -> PerceptionLM:
    """A fresh model of our own parts; under `torch.device("meta")` it takes no memory."""
    encoder, projector = VisionTransformer(config.vision), build_projector(config.projector)
    return PerceptionLM(encoder, projector, Llama(config.decoder), media_token)
