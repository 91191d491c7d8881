"""The public names. Changing this list is a visible act."""

import inspect

import perception_encoder as pe

NAMES = [
    "CLIP", "ClipConfig", "Features", "Index", "Prediction", "TextConfig", "TextTransformer", "VisionConfig",
    "VisionEncoder", "VisionTransformer", "ZeroShotClassifier", "correspond", "embed", "features", "list_models", "load_clip",
    "load_encoder", "pca_image", "save",
]  # fmt: skip


def test_names() -> None:
    assert sorted(pe.__all__) == sorted(NAMES)
    assert all(hasattr(pe, name) for name in NAMES)


def test_every_public_name_explains_itself() -> None:
    undocumented = [name for name in NAMES if not inspect.getdoc(getattr(pe, name))]
    assert not undocumented


def test_loaders_share_their_settings() -> None:
    clip, tower = (inspect.signature(load).parameters for load in (pe.load_clip, pe.load_encoder))
    assert list(clip) == list(tower)
