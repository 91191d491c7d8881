"""Perception Language Model: any vision encoder and any decoder, put together to answer questions about pictures."""

import perception_encoder  # noqa: F401  refuses another distribution's `perception` before anything else is imported
from perception_lm.assistant import Assistant
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM
from perception_lm.processor import Batch, Processor
from perception_lm.projector import PixelShuffleProjector, PoolingProjector
from perception_lm.regions import Box
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.zoo import compose, list_models, load

__all__ = [
    "Assistant",
    "Batch",
    "Box",
    "Decoder",
    "DecoderConfig",
    "LlamaTokenizer",
    "MediaConfig",
    "PerceptionLM",
    "PixelShuffleProjector",
    "PlmConfig",
    "PoolingProjector",
    "Processor",
    "ProjectorConfig",
    "compose",
    "list_models",
    "load",
]
