"""Two towers and the scale between them (Radford et al. 2021; PE-Core: Bolya et al. 2025).

B batch  N frames  S image side  n tokens a text  C embedding width
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.pixels import PixelSpec
from perception_encoder.config import ClipConfig
from perception_encoder.text import TextTransformer
from perception_encoder.tokenizer import ClipTokenizer
from perception_encoder.vision import VisionTransformer

Tokenize = Callable[[str | Sequence[str]], Tensor]
VideoProtocol = Literal["raw-mean", "unit-mean"]


class CLIP(nn.Module):
    """A picture and a text in one space: their cosine says how well they fit.

    preprocess   the pixels these weights expect: `clip.preprocess(image)` -> 3 S S
    tokenize     the ids these weights expect: `clip.tokenize(["a cat"])` -> B n
    source       what `load_clip` was given, None for a model that was built here; an index remembers it
    """

    fast = "perception_encoder.fast:fast_clip"
    source: str | None = None

    def __init__(
        self,
        vision: VisionTransformer,
        text: TextTransformer,
        preprocess: PixelSpec | None = None,
        tokenize: Tokenize | None = None,
    ):
        super().__init__()
        self.config = ClipConfig(vision=vision.config, text=text.config)
        self.vision, self.text = vision, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.preprocess = preprocess or vision.preprocess
        self.tokenize: Tokenize = tokenize or ClipTokenizer(context=text.config.context)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision.pos_embed.dtype

    def forward(
        self, pixels: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Both embeddings normalised, and exp(logit_scale): `scale * image @ text.T` are the logits."""
        image = None if pixels is None else self.encode_image(pixels, normalize=True)
        text = None if tokens is None else self.encode_text(tokens, normalize=True)
        return image, text, self.logit_scale.exp()

    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        """B 3 S S -> B C"""
        x = self.vision.pooled(self._here(pixels))
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, tokens: Tensor, *, normalize: bool = False) -> Tensor:
        """B n -> B C"""
        x = self.text(self._here(tokens))
        return F.normalize(x, dim=-1) if normalize else x

    def encode_video(self, frames: Tensor, *, normalize: bool = False, protocol: VideoProtocol | None = None) -> Tensor:
        """One embedding a clip: the mean over its frames. B N 3 S S -> B C

        protocol    "raw-mean": the mean of the frames' embeddings as they are; published zero-shot video classification
                    is this with normalize=True.
                    "unit-mean": the mean of the normalised embeddings; published video retrieval is this with
                    normalize=False. Its length is below 1 where the frames disagree.
        normalize   the result has length 1. The reference's `normalize=True` is "unit-mean" left at that shorter
                    length, so without a protocol normalize=True means the same direction, at length 1.

        Raises ConfigError for another protocol or shape.
        """
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames are a tensor, B N 3 S S; given {type(frames).__name__}")
        if frames.ndim != 5 or not frames.shape[1]:
            raise ConfigError(f"frames are B N 3 S S with at least one frame; given {tuple(frames.shape)}")
        protocol = protocol or ("unit-mean" if normalize else "raw-mean")
        if protocol not in ("raw-mean", "unit-mean"):
            raise ConfigError(f"no video protocol {protocol!r}; there are: raw-mean, unit-mean")
        x = self.encode_image(frames.flatten(0, 1), normalize=protocol == "unit-mean")  # B*N C
        x = x.unflatten(0, frames.shape[:2]).mean(dim=1)  # B C
        return F.normalize(x, dim=-1) if normalize else x

    def _here(self, given: Tensor) -> Tensor:
        """On the model's device. What is no tensor is left for the tower, which says what it takes."""
        return given.to(self.device) if isinstance(given, Tensor) else given

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.vision.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
