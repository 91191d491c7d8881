"""The public names. Changing this list is a visible act."""

import inspect
from types import ModuleType

import pytest

import perception_encoder as pe
import perception_lm as plm

ENCODER = """CLIP ClipConfig Features Index Prediction TextConfig TextTransformer VisionConfig VisionEncoder
VisionTransformer ZeroShotClassifier correspond embed features list_models load_clip load_encoder pca_image save"""
LANGUAGE = """Assistant Batch Box Decoder DecoderConfig LlamaTokenizer MediaConfig PerceptionLM PixelShuffleProjector
PlmConfig PoolingProjector Processor ProjectorConfig compose list_models load"""
NAMES = {pe: ENCODER, plm: LANGUAGE}


@pytest.mark.parametrize("package", NAMES, ids=lambda package: package.__name__)
def test_names(package: ModuleType) -> None:
    assert sorted(package.__all__) == sorted(NAMES[package].split())
    undocumented = [name for name in package.__all__ if not inspect.getdoc(getattr(package, name))]
    assert not undocumented


def test_loaders_share_their_settings() -> None:
    clip, tower = (inspect.signature(load).parameters for load in (pe.load_clip, pe.load_encoder))
    assert list(clip) == list(tower)
