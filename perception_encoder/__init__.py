"""Perception Encoder: features, zero-shot classification and retrieval with any vision encoder."""

import perception

if getattr(perception, "__distribution__", None) != "perception-vision":
    raise ImportError(
        f"the package `perception` at {getattr(perception, '__file__', None)} belongs to another distribution (on "
        "PyPI, `Perception` is an image-hashing library), not to `perception-vision`, which perception_encoder is of; "
        "use two environments, or: pip uninstall Perception && "
        "pip install --force-reinstall --no-deps perception-vision"
    )

from perception_encoder.clip import CLIP
from perception_encoder.config import ClipConfig, TextConfig, VisionConfig
from perception_encoder.features import features
from perception_encoder.protocol import Features, VisionEncoder
from perception_encoder.retrieval.embed import embed
from perception_encoder.retrieval.index import Index
from perception_encoder.text import TextTransformer
from perception_encoder.vision import VisionTransformer
from perception_encoder.visualize import correspond, pca_image
from perception_encoder.zero_shot import Prediction, ZeroShotClassifier
from perception_encoder.zoo import list_models, load_clip, load_encoder, save

__all__ = [
    "CLIP",
    "ClipConfig",
    "Features",
    "Index",
    "Prediction",
    "TextConfig",
    "TextTransformer",
    "VisionConfig",
    "VisionEncoder",
    "VisionTransformer",
    "ZeroShotClassifier",
    "correspond",
    "embed",
    "features",
    "list_models",
    "load_clip",
    "load_encoder",
    "pca_image",
    "save",
]
