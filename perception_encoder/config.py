"""What the towers are: sizes and facts, checked before anything is allocated."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from perception.errors import ConfigError
from perception.settings import check_range, read_settings


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer of the Perception Encoder family (Bolya et al. 2025, table 21).

    image_size    side in pixels at pretraining; other sizes work
    mlp_width     hidden width of each block's MLP
    layer_scale   start value of LayerScale, None for none
    norm_post     a LayerNorm after the last block
    pool          "attention": a learned query pools all tokens (PE-Core); None: no pooled output
    output_width  width of the projection after the pool, None for none

    Raises ConfigError for sizes that cannot be.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    class_token: bool = True
    layer_scale: float | None = None
    norm_post: bool = True
    pool: Literal["attention"] | None = "attention"
    pool_heads: int = 8
    output_width: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "vision", optional=("output_width",))
        start = self.layer_scale
        if start is not None and (isinstance(start, bool) or not isinstance(start, int | float)):
            raise ConfigError(f"vision layer_scale is {start!r}; expected a number")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        _check_heads(self.width, self.heads, "heads")
        if self.head_dim % 4:
            raise ConfigError(
                f"head_dim {self.head_dim} (width / heads) must be a multiple of 4 for 2-D rotary embedding"
            )
        if self.pool is None and self.output_width is not None:
            raise ConfigError("output_width projects the pooled vector; a tower with pool=None has none")
        if self.pool is not None:
            _check_heads(self.width, self.pool_heads, "pool_heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along one side at `image_size`."""
        return self.image_size // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "vision config")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A causal text transformer pooled at the end-of-text token, as in CLIP (Radford et al. 2021, section 2.4)."""

    context: int
    width: int
    depth: int
    heads: int
    output_width: int
    vocab: int = 49408

    def __post_init__(self) -> None:
        _check_sizes(self, "text")
        _check_heads(self.width, self.heads, "heads")

    @property
    def mlp_width(self) -> int:
        return 4 * self.width

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "text config")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Two towers that meet in one embedding space."""

    vision: VisionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        ours = self.vision.output_width or self.vision.width
        if self.vision.pool is None:
            raise ConfigError("the vision tower of a CLIP model needs a pooled output; given pool=None")
        if ours != self.text.output_width:
            raise ConfigError(
                f"the image embedding has {ours} channels and the text embedding {self.text.output_width}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Raises ConfigError for unknown keys, wrong types and impossible sizes."""
        return read_settings(cls, data, "clip config")


# Far above the largest published model; a file that asks for more is damaged or hostile.
LIMITS = {
    "image_size": 16_384,
    "patch_size": 1_024,
    "width": 32_768,
    "depth": 512,
    "heads": 1_024,
    "mlp_width": 262_144,
    "pool_heads": 1_024,
    "output_width": 32_768,
    "context": 65_536,
    "vocab": 4_000_000,
}


def _check_sizes(config: Any, kind: str, optional: tuple[str, ...] = ()) -> None:
    for name, high in LIMITS.items():
        value = getattr(config, name, 1)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{kind} {name} is {value!r}; expected a whole number")
        check_range(f"{kind} {name}", value, 1, high)


def _check_heads(width: int, heads: int, name: str) -> None:
    if width % heads:
        raise ConfigError(f"width {width} does not divide into {heads} {name}")
