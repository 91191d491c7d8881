"""Encoders of timm and open_clip behind our protocol, each with its own preprocessing.

Both packages are imported when asked for and never before.

B batch  h w patch grid  P prefix tokens  D width  C embedding width
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from perception.device import pick_device, pick_dtype
from perception.errors import CheckpointError, ConfigError, missing_extra
from perception.media import read_image
from perception_encoder.protocol import Features


class ForeignPreprocess:
    """Another library's evaluation transform, fed by our reader: any path, bytes or picture -> 3 H W.

    size  the side of the squares it makes, None where its steps do not say
    """

    def __init__(self, transform: Callable[[Any], Tensor]):
        self.transform = transform
        sizes = [step.size for step in getattr(transform, "transforms", ()) if hasattr(step, "size")]
        last = sizes[-1] if sizes else None
        self.size: int | None = max(last) if isinstance(last, tuple | list) else last

    def __call__(self, image: Any, *, orient: bool = True) -> Tensor:
        return self.transform(read_image(image, orient=orient).convert("RGB"))

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.transform).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"ForeignPreprocess({self.transform!r})"


class ForeignEncoder(nn.Module):
    """What the two adapters share: the calls of `VisionTransformer`."""

    width: int
    patch_size: int
    preprocess: Callable[..., Tensor]
    depth: int

    def forward(self, pixels: Tensor) -> Features:
        """The last block's output, before the final norm."""
        return self.intermediates(pixels, [-1])[0]

    def intermediates(self, pixels: Tensor, layers: Sequence[int], *, norm: bool = False) -> list[Features]:
        """Features after the blocks asked for, in the order asked; `norm` applies the tower's final norm to each."""
        if bad := [layer for layer in layers if not -self.depth <= layer < self.depth]:
            raise ConfigError(
                f"no layers {bad} in a tower of {self.depth} blocks; give {-self.depth} to {self.depth - 1}"
            )
        wanted = [layer % self.depth for layer in layers]
        order = sorted(set(wanted))
        found = dict(zip(order, self._intermediates(pixels, order, norm), strict=True))
        return [found[index] for index in wanted]

    def _intermediates(self, pixels: Tensor, layers: list[int], norm: bool) -> list[Features]:
        raise NotImplementedError


class TimmEncoder(ForeignEncoder):
    """A vision transformer of timm. `pooled` is timm's own embedding: pooled and normed, before its classifier."""

    def __init__(self, model: nn.Module, preprocess: Callable[..., Tensor] | None = None):
        super().__init__()
        if (
            not hasattr(model, "forward_intermediates")
            or not hasattr(model, "patch_embed")
            or not hasattr(model, "blocks")
        ):
            raise ConfigError(f"{type(model).__name__} is not a vision transformer; a patch grid is needed")
        self.model = model
        self.width, self.depth = int(model.embed_dim), len(model.blocks)
        size = model.patch_embed.patch_size
        self.patch_size = int(size[0] if isinstance(size, tuple | list) else size)
        self.preprocess = preprocess or timm_preprocess(model)

    def _intermediates(self, pixels: Tensor, layers: list[int], norm: bool) -> list[Features]:
        got = self.model.forward_intermediates(
            pixels, indices=layers, return_prefix_tokens=True, norm=norm, stop_early=True, intermediates_only=True
        )
        return [_features(item) for item in got]

    def pooled(self, pixels: Tensor) -> Tensor:
        """B C"""
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)


class OpenClipEncoder(ForeignEncoder):
    """The image tower of an open_clip model. `pooled` is its image embedding, not normalised."""

    def __init__(self, visual: nn.Module, preprocess: Callable[..., Tensor]):
        super().__init__()
        trunk = getattr(visual, "trunk", None)
        inner = TimmEncoder(trunk, preprocess) if trunk is not None else None
        if inner is None and not (hasattr(visual, "transformer") and hasattr(visual, "forward_intermediates")):
            raise ConfigError(f"{type(visual).__name__} is not a vision transformer; a patch grid is needed")
        self.visual, self.preprocess = visual, preprocess
        self.inner = [inner]  # in a list: its parameters are already registered under `visual`
        if inner is not None:
            self.width, self.depth, self.patch_size = inner.width, inner.depth, inner.patch_size
        else:
            self.width, self.depth = int(visual.transformer.width), len(visual.transformer.resblocks)
            self.patch_size = int(visual.patch_size[0])

    def _intermediates(self, pixels: Tensor, layers: list[int], norm: bool) -> list[Features]:
        if self.inner[0] is not None:
            return self.inner[0]._intermediates(pixels, layers, norm)
        got = self.visual.forward_intermediates(
            pixels,
            indices=layers,
            stop_early=True,
            normalize_intermediates=norm,
            intermediates_only=True,
            output_extra_tokens=True,
        )
        grids, prefix = got["image_intermediates"], got.get("image_intermediates_prefix") or []
        pairs = zip(grids, prefix, strict=True) if prefix else ((g, None) for g in grids)
        return [_features(pair if pair[1] is not None else pair[0]) for pair in pairs]

    def pooled(self, pixels: Tensor) -> Tensor:
        """B C"""
        return self.visual(pixels)


class OpenClip(nn.Module):
    """An open_clip model with the calls of our `CLIP`, so that classifiers and indexes take it as they take ours."""

    def __init__(self, model: nn.Module, preprocess: Callable[..., Tensor], tokenize: Callable[[Any], Tensor]):
        super().__init__()
        self.model, self.preprocess, self.tokenize = model, preprocess, tokenize

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        return self.model.encode_image(pixels.to(self.device, self.dtype), normalize=normalize)

    def encode_text(self, tokens: Tensor, *, normalize: bool = False) -> Tensor:
        return self.model.encode_text(tokens.to(self.device), normalize=normalize)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.encode_image(pixels, normalize=True), self.encode_text(tokens, normalize=True)
        return image, text, self.logit_scale.exp()


def load_timm(
    name: str, *, pretrained: bool = True, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> TimmEncoder:
    """`timm.create_model(name)` as an encoder, in evaluation mode. pretrained=False: random weights, no download."""
    timm = _import("timm")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0 if not pretrained else None)
    except RuntimeError as error:
        raise ConfigError(f"timm knows no model {name!r}: {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(_download_failed("timm", name, error)) from error
    return _placed(TimmEncoder(model), device, dtype)


def load_open_clip(
    name: str,
    *,
    pretrained: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> OpenClipEncoder:
    """The image tower of an open_clip model, in evaluation mode.

    name        "NAME:TAG", "local-dir:FOLDER" or "hf-hub:OWNER/NAME", as open_clip has them
    pretrained  False: "NAME" with random weights, nothing is downloaded
    """
    model, preprocess, _ = _open_clip(name, pretrained)
    return _placed(OpenClipEncoder(model.visual, preprocess), device, dtype)


def load_open_clip_pair(
    name: str,
    *,
    pretrained: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> OpenClip:
    """Both towers of an open_clip model, its preprocessing and its tokenizer; named as in `load_open_clip`."""
    return _placed(OpenClip(*_open_clip(name, pretrained)), device, dtype)


def timm_preprocess(model: nn.Module) -> ForeignPreprocess:
    """The evaluation transform that timm's own configuration of this model asks for."""
    data = importlib.import_module("timm.data")
    return ForeignPreprocess(data.create_transform(**data.resolve_model_data_config(model), is_training=False))


def _open_clip(text: str, pretrained: bool) -> tuple[nn.Module, ForeignPreprocess, Callable[[Any], Tensor]]:
    open_clip = _import("open_clip")
    if text.startswith(("local-dir:", "hf-hub:")):  # these carry their weights with them
        name, tag, known = text, None, []
    else:
        name, _, tag = text.partition(":")
        known = open_clip.list_pretrained_tags_by_model(name)
        if pretrained and not tag:
            raise ConfigError(f"open_clip/{name} needs a tag: write open_clip/{name}:TAG, with TAG one of {known}")
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag if pretrained else None)
        tokenizer = open_clip.get_tokenizer(name)
    except RuntimeError as error:
        raise ConfigError(f"open_clip has no {name!r} with tag {tag!r} (tags: {known}): {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(_download_failed("open_clip", text, error)) from error
    return model, ForeignPreprocess(transform), tokenizer


def _placed(model: Any, device: str | torch.device, dtype: str | torch.dtype) -> Any:
    where = pick_device(device)
    stored = next(model.parameters()).dtype
    return model.to(where, pick_dtype(dtype, where, stored)).eval()


def _features(item: Tensor | tuple[Tensor, Tensor]) -> Features:
    """timm's and open_clip's B D h w grid, with or without prefix tokens, as ours."""
    grid, prefix = item if isinstance(item, tuple | list) else (item, None)
    patches = grid.permute(0, 2, 3, 1)  # B h w D
    return Features(
        patches=patches, prefix=patches.new_zeros(patches.shape[0], 0, patches.shape[-1]) if prefix is None else prefix
    )


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing_extra(package, "interop", str(error)) from error
    except RuntimeError as error:  # torchvision built for another torch: "operator torchvision::nms does not exist"
        raise missing_extra(
            package,
            "interop",
            f"{error}; torch {torch.__version__} and the torchvision here do not belong together: "
            "install the torchvision release that matches torch",
        ) from error


def _download_failed(library: str, name: str, error: Exception) -> str:
    return f"{library} could not get the weights of {name!r}: {error}; pretrained=False builds it with random weights"
