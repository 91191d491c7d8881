"""What a Perception Language Model is: sizes and facts, checked before anything is allocated."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from perception.errors import ConfigError
from perception.rope import RopeScaling
from perception.settings import check_range, read_settings
from perception_encoder.config import VisionConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama 3 decoder (Meta 2024, arXiv:2407.21783, table 3).

    kv_heads      heads of keys and values; each serves heads / kv_heads query heads
    mlp_width     hidden width of each block's gated MLP
    head_dim      channels of a head; width / heads when not given
    rope_scaling  the stretch to a longer context, None for none
    tied          the output matrix is the embedding matrix
    context       positions the decoder was made for

    Raises ConfigError for sizes that cannot be.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab: int
    head_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    context: int = 131_072

    def __post_init__(self) -> None:
        for name, high in LIMITS.items():
            if hasattr(self, name):
                check_range(f"decoder {name}", getattr(self, name), 1, high)
        check_range("decoder head_dim", self.head_dim, 0, 4096)
        check_range("decoder norm_eps", self.norm_eps, 0, 1)
        check_range("decoder rope_theta", self.rope_theta, 1, 1e12)
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.kv_heads} key heads cannot be shared by {self.heads} query heads")
        if not self.head_dim:
            if self.width % self.heads:
                raise ConfigError(f"width {self.width} does not divide into {self.heads} heads; give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even for rotary embedding")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "decoder config")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The bridge from the encoder's patch grid to the decoder's tokens.

    kind   "pooling": an MLP, then the mean of pool x pool patches (every published PLM);
           "pixel_shuffle": pool x pool patches side by side as one long vector, then one linear map
    pool   patches along one side of the square that becomes one token
    """

    in_width: int
    width: int
    kind: Literal["pooling", "pixel_shuffle"] = "pooling"
    pool: int = 2

    def __post_init__(self) -> None:
        for name in ("in_width", "width"):
            check_range(f"projector {name}", getattr(self, name), 1, LIMITS["width"])
        check_range("projector pool", self.pool, 1, 64)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "projector config")


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How pictures and videos were shown to the model in training.

    tile       side in pixels of a tile and of a frame
    max_tiles  tiles of one picture, the thumbnail not counted
    frames     frames of one video
    tiling     "thumb+tile": a thumbnail, then the tiles; "vanilla": one squashed tile
    context    tokens of prompt and answer together
    """

    tile: int = 448
    max_tiles: int = 36
    frames: int = 32
    tiling: Literal["thumb+tile", "vanilla"] = "thumb+tile"
    context: int = 11_520

    def __post_init__(self) -> None:
        check_range("media tile", self.tile, 1, 16_384)
        check_range("media max_tiles", self.max_tiles, 1, 1024)
        check_range("media frames", self.frames, 1, 65_536)
        check_range("media context", self.context, 1, LIMITS["context"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "media config")


@dataclass(frozen=True, kw_only=True)
class PlmConfig:
    """An encoder, a projector and a decoder that fit each other, and the media they expect."""

    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        check_widths(self.projector, self.vision.width, self.decoder.width)
        if self.media.tile % self.vision.patch_size:
            raise ConfigError(
                f"tiles of {self.media.tile} pixels do not divide into patches of {self.vision.patch_size}"
            )
        if (self.media.tile // self.vision.patch_size) % self.projector.pool:
            raise ConfigError(
                f"a tile of {self.media.tile // self.vision.patch_size} patches does not pool by {self.projector.pool}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "model config")


def check_widths(projector: Any, encoder_width: int, decoder_width: int) -> None:
    """ConfigError unless the projector leads from the encoder to the decoder."""
    if (projector.in_width, projector.width) != (encoder_width, decoder_width):
        raise ConfigError(
            f"the projector maps {projector.in_width} to {projector.width}, "
            f"but the encoder gives {encoder_width} and the decoder takes {decoder_width}"
        )


# Far above the largest published model; a file that asks for more is damaged or hostile.
LIMITS = {
    "width": 65_536,
    "depth": 512,
    "heads": 1_024,
    "kv_heads": 1_024,
    "mlp_width": 524_288,
    "vocab": 4_000_000,
    "context": 16_777_216,
}
