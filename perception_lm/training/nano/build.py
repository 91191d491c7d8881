"""The model that training starts from: a tower cut from PE-Core-nano, a projector and a decoder that know nothing."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from perception.files import atomic_write
from perception.pixels import PixelSpec
from perception_encoder.training.recipes import adapt_tower
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import load_encoder
from perception_lm.checkpoints import plm_pixels, save
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM
from perception_lm.projector import build_projector
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.training.nano.clips import FRAMES
from perception_lm.training.nano.mixture import make
from perception_lm.training.nano.tokens import corpus, train_ranks
from perception_lm.training.nano.world import SIDE

KEPT = 5  # of PE-Core-nano's six blocks: the published towers of language models lack the last ones too
# Published models take the mean of 2 x 2 patches. Here that would leave 16 tokens of 16 x 16 pixels, each a blur of
# several letters; all 64 cost a third more time.
POOL = 1
DECODER = DecoderConfig(
    width=192, depth=4, heads=3, kv_heads=3, mlp_width=512, vocab=2304, rope_theta=10_000.0, tied=True, context=1024
)
MEDIA = MediaConfig(tile=SIDE, max_tiles=1, frames=FRAMES, tiling="vanilla", context=1024)


def build_start(out: Path, data: Path, tower: str | Path = "PE-Core-nano", seed: int = 0) -> Path:
    """Write `out/start`, a folder that `perception_lm.load` reads; nothing is done twice.

    tower  a PE-Core to cut, or a PE-Lang as it is

    Raises MediaError without the data.
    """
    folder = out / "start"
    if (folder / "config.json").is_file():
        return folder
    words = out / "tokenizer.model"
    if not words.is_file():
        mixture = make(data=str(data))  # first: it says what to do where there are no words
        nouns = (data / "words.txt").read_text(encoding="utf-8").split("\n")
        ranks = train_ranks(corpus(mixture, nouns))
        with atomic_write(words) as temporary:
            temporary.write_bytes(ranks)
    tokenizer = LlamaTokenizer.from_file(words)
    encoder = language_tower(cast(VisionTransformer, load_encoder(tower, device="cpu", dtype="float32")))
    config = PlmConfig(
        vision=encoder.config,
        projector=ProjectorConfig(in_width=encoder.width, width=DECODER.width, pool=POOL),
        decoder=replace(DECODER, vocab=tokenizer.vocab),
        media=MEDIA,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PerceptionLM(encoder, build_projector(config.projector), Decoder(config.decoder), tokenizer.image_token)
    save(model, folder, media=config.media, tokenizer=tokenizer, pixels=plm_pixels(config.media))
    return folder


def language_tower(core: VisionTransformer, kept: int = KEPT) -> VisionTransformer:
    """A PE-Core without its last blocks and its head, with LayerScale that changes nothing yet; a PE-Lang as it is.

    At 0.1, where large towers start, a small one forgets what it knew: its blocks would say a tenth of it. Making the
    features a tenth as well, so that they are the same but for their size, was tried: after 10,000 samples the decoder
    still hardly looked at them, where at their own size it read colours and shapes.
    """
    if core.pool is None and core.config.layer_scale is not None:
        return core
    tower = adapt_tower(core, depth=kept, layer_scale=1.0)
    tower.preprocess = PixelSpec(size=tower.config.image_size, interpolation="bicubic")
    return tower
