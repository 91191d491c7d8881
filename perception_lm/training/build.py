"""The model a run starts from."""

from dataclasses import replace
from typing import Any, cast

import torch

from perception.errors import ConfigError
from perception_encoder.training.recipes import adapt_tower
from perception_encoder.vision import VisionTransformer
from perception_lm.assistant import Assistant
from perception_lm.config import DecoderConfig, MediaConfig, ProjectorConfig
from perception_lm.projector import PoolingProjector, build_projector
from perception_lm.training.run import ModelConfig, Run, frozen_as_stored


def build_assistant(run: Run, device: torch.device) -> Assistant:
    """The model that a run file describes, as something that answers.

    Raises ConfigError for a description that is none or does not fit together, and what loading its parts raises.
    """
    config = run.model
    if (config.init is None) == (config.encoder is None):
        raise ConfigError("[model] names a whole model, init, or the parts of one, encoder and decoder; one of the two")
    dtype = "stored" if frozen_as_stored(run) else "float32"
    if config.init is not None:
        from perception_lm.zoo import load

        return _changed(load(config.init, tokenizer=config.tokenizer, device=device, dtype=dtype), config)
    return _composed(run, device, dtype)


def _composed(run: Run, device: torch.device, dtype: str) -> Assistant:
    from perception_encoder.zoo import load_encoder
    from perception_lm.zoo import compose, load_decoder

    config = run.model
    if config.decoder is None:
        raise ConfigError("[model] has an encoder and no decoder")
    encoder = load_encoder(cast(str, config.encoder), device=device, dtype=dtype)
    if isinstance(encoder, VisionTransformer):
        encoder = _tower(encoder, config)
    torch.manual_seed(run.seed)  # of a fresh decoder
    decoder, path = load_decoder(config.decoder, device=device, dtype=dtype)
    if config.plain_rope:
        cast(Any, decoder).config = replace(cast(Any, decoder).config, rope_scaling=None)
    width = int(cast(Any, decoder).width)
    projector = ProjectorConfig(
        kind=config.projector, in_width=encoder.width, width=width, pool=2 if config.pool is None else config.pool
    )
    tile = getattr(getattr(encoder, "config", None), "image_size", None)
    context = run.data.seq_len
    if isinstance(config.decoder, DecoderConfig):
        context = min(context, config.decoder.context)
    return compose(
        encoder=encoder,
        decoder=decoder,
        projector=start_projector(projector, run.seed),
        tokenizer=config.tokenizer or path or _tokenizer_of(decoder),
        media=None if tile is None else MediaConfig(tile=tile, context=context),
        device=device,
        dtype=dtype,
    )


def _tokenizer_of(decoder: Any) -> Any:
    """Bytes, for a fresh decoder that is just large enough for them."""
    from perception_lm.tokenizer import LlamaTokenizer

    words = LlamaTokenizer.of_bytes()
    return words if getattr(getattr(decoder, "config", None), "vocab", 0) == words.vocab else None


def start_projector(config: ProjectorConfig, seed: int) -> Any:
    """A fresh projector as the published models began: all of it, biases too, N(0, 1/E) cut at three deviations."""
    projector = build_projector(config)
    generator = torch.Generator().manual_seed(seed)
    std = config.width**-0.5
    for parameter in projector.parameters():
        torch.nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
    return projector


def _changed(assistant: Assistant, config: ModelConfig) -> Assistant:
    """A whole model with what the run says of its tower and its projector."""
    from perception_lm.zoo import assemble

    model, media = assistant.model, assistant.processor.media
    encoder, projector = cast(Any, model.encoder), cast(Any, model.projector)
    pool = projector.pool if config.pool is None else config.pool
    tower_changes = config.image_size is not None or config.depth is not None or config.layer_scale is not None
    if not tower_changes and pool == projector.pool:
        return assistant
    if tower_changes:
        model.encoder = _tower(encoder, config)
        media = replace(media, tile=cast(Any, model.encoder).config.image_size)
    if pool != projector.pool:
        if not isinstance(projector, PoolingProjector):
            raise ConfigError(f"model.pool={pool}: weights of a {type(projector).__name__} are for {projector.pool}")
        projector.pool = pool  # the weights of this one do not know how many of their outputs are averaged
    return assemble(model, assistant.tokenizer, media)


def _tower(tower: Any, config: ModelConfig) -> VisionTransformer:
    if not isinstance(tower, VisionTransformer):
        raise ConfigError(f"[model] image_size, depth and layer_scale are for our towers; given {type(tower).__name__}")
    return adapt_tower(tower, image_size=config.image_size, depth=config.depth, layer_scale=config.layer_scale)
