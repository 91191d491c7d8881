"""Losses against plain formulas, PE-Core-nano's stages stopped and shared, the split, and the weights that ship."""

import argparse
import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from training_tiny import one_thread  # noqa: F401  every test here runs with it

from perception.errors import MediaError
from perception.files import sha256_of
from perception.training.distributed import World
from perception.training.metrics import read_metrics
from perception.training.trainer import Trainer
from perception_encoder import samples
from perception_encoder.training import (
    Augment,
    Muon,
    clip_loss,
    concept_loss,
    cosine_distillation,
    drawings,
    make_optimizers,
    plain,
    similarity_distillation,
    warmup_stable_decay,
)
from perception_encoder.training import nano as recipe
from perception_encoder.training.captions import write_captions
from perception_encoder.training.drawings import Concept, IconSet, choose_split, read_drawings, read_split
from perception_encoder.training.drawings import Drawings as DrawingSet
from perception_encoder.training.nano import (
    ALL_STYLES,
    VALIDATION_STYLE,
    Drawn,
    ImageStudent,
    Lessons,
    Look,
    NanoConfig,
    Part,
    Parts,
    Task,
    image_stage,
    text_stage,
    whiten,
)
from perception_encoder.training.optim import orthogonal
from perception_encoder.training.teachers import EfficientNetLite0, MiniLM
from perception_encoder.zero_shot import DRAWING_TEMPLATES, ZeroShotClassifier
from perception_encoder.zoo import load_clip


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


# --- losses ----------------------------------------------------------------------------------------------------------


def test_clip_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    image, text, scale = torch.randn(5, 8), 3 * torch.randn(5, 8), 7.0
    cosine = unit(image) @ unit(text).T
    want = 0.0
    for i in range(5):
        want -= math.log(math.exp(scale * cosine[i, i]) / sum(math.exp(scale * cosine[i, j]) for j in range(5)))
        want -= math.log(math.exp(scale * cosine[i, i]) / sum(math.exp(scale * cosine[j, i]) for j in range(5)))
    assert clip_loss(image, text, scale).item() == pytest.approx(want / 10, abs=1e-5)


def test_concept_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    image, concepts, target = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([5, 0, 0, 3])
    log = (9.0 * unit(image) @ unit(concepts).T).log_softmax(-1)
    hard = -log[torch.arange(4), target].mean()
    assert concept_loss(image, concepts, target, 9.0).item() == pytest.approx(hard.item(), abs=1e-5)
    smooth = 0.8 * hard - 0.2 * log.mean()
    assert concept_loss(image, concepts, target, 9.0, smooth=0.2).item() == pytest.approx(smooth.item(), abs=1e-5)


def test_distillation_is_zero_for_the_teacher_itself() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert cosine_distillation(2 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distillation(-x, x).item() == pytest.approx(2, abs=1e-6)
    turned = x @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert similarity_distillation(turned, x).item() == pytest.approx(0, abs=1e-5), "only who is near whom counts"
    assert similarity_distillation(x.flip(0), x).item() > 0.1


def test_losses_of_bf16_embeddings_are_of_float32_precision() -> None:
    """Between 64 and 128 bf16 has steps of 0.5: logits at the largest scale would be rounded to them."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 32, generator=g).bfloat16() for _ in range(2))
    scale, target = torch.tensor(97.3), torch.arange(6)

    def losses(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {
            "clip": clip_loss(x, y, scale),
            "concept": concept_loss(x, y, target, scale),
            "cosine": cosine_distillation(x, y),
            "similarity": similarity_distillation(x, y),
        }

    wanted = losses(x.float(), y.float())
    for name, found in losses(x, y).items():
        assert found.dtype == torch.float32, name
        assert torch.equal(found, wanted[name]), name


def _gathered_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    image, text = (data[k].chunk(2)[rank].clone().requires_grad_() for k in ("image", "text"))
    loss = clip_loss(image, text, 5.0, gather=True)
    # A data-parallel trainer takes the mean over processes of loss and gradients.
    (loss / 2).backward()
    total = loss.detach() / 2
    dist.all_reduce(total)
    torch.save({"loss": total, "image": image.grad, "text": text.grad}, f"{folder}/{rank}.pt")
    dist.barrier()  # a process that leaves while another still talks to it aborts that one
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's that wants the interpreter's lock while that ends aborts (pytorch issue 190489)


def test_gathered_is_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image, text = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    loss = clip_loss(image, text, 5.0)
    loss.backward()
    torch.save({"image": image.detach(), "text": text.detach()}, tmp_path / "data.pt")
    mp.spawn(_gathered_worker, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part["loss"], loss.detach())
    torch.testing.assert_close(torch.cat([part["image"] for part in parts]), image.grad)
    torch.testing.assert_close(torch.cat([part["text"] for part in parts]), text.grad)
    alone = torch.stack([clip_loss(i, t, 5.0) for i, t in zip(image.chunk(2), text.chunk(2), strict=True)]).mean()
    assert abs(alone.item() - loss.item()) > 0.1, "the halves alone would be another loss"


# --- optimizers ------------------------------------------------------------------------------------------------------


def test_orthogonal_keeps_directions_and_levels_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (6, 10))
    x = orthogonal(u @ torch.diag(torch.logspace(0, -1.5, 6)) @ v.T)
    sizes = u.T @ x @ v
    assert torch.linalg.svdvals(x).min() > 0.6
    assert torch.linalg.svdvals(x).max() < 1.3
    torch.testing.assert_close(sizes, torch.diag(sizes.diag()), atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonal(x.T), orthogonal(x).T)


def test_muon_steps_have_the_size_it_says_and_split_qkv() -> None:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(48, 16))
    gradient = torch.randn(48, 16, generator=generator)
    gradient[:16] *= 1000  # queries with large gradients must not take all of the step
    p.grad = gradient
    Muon([p], lr=0.1).step()
    for part in p.detach().chunk(3):
        assert part.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.25)
    assert (p.detach() * gradient).sum() < 0, "downhill"


def test_every_parameter_has_one_optimizer() -> None:
    clip = Micro().build()
    optimizers = make_optimizers(clip, 1e-3)
    given = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(given) == sorted(id(p) for p in clip.parameters())
    matrices = {id(p) for g in optimizers[0].param_groups for p in g["params"]}
    assert id(clip.vision.blocks[0].attn.qkv.weight) in matrices
    assert id(clip.text.token_embed.weight) not in matrices


def test_schedule() -> None:
    factors = [warmup_stable_decay(s, 100, 9, 19) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[100] == 0
    assert factors[90] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(factors[81:]))
    assert [warmup_stable_decay(s, 200, 9, 19) for s in range(80)] == factors[:80], "longer runs begin alike"


# --- pictures and captions -------------------------------------------------------------------------------------------


def test_augment_draws_only_from_its_generator_and_keeps_the_drawing() -> None:
    rgba = torch.zeros(64, 24, 24, 4, dtype=torch.uint8)
    rgba[:, 8:16, 8:16] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    looks = [Augment()(rgba, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert looks[0].shape == (64, 3, 16, 16)
    assert torch.equal(looks[0], looks[1])
    assert not torch.equal(looks[0], looks[2])
    assert looks[0].abs().max() <= 1
    still = Augment(scale=(1, 1), shift=0, turn=0, flip=0, white=1, recolour=0, line_art=0)
    want = plain(rgba).float() / 127.5 - 1
    torch.testing.assert_close(still(rgba, 24, torch.Generator()), want, atol=1e-2, rtol=0)
    pixels, theta = still.look(rgba, 24, torch.Generator())
    torch.testing.assert_close(pixels, still(rgba, 24, torch.Generator()))
    torch.testing.assert_close(theta, torch.eye(2, 3).expand(64, -1, -1))
    faded = replace(still, fade=1)(rgba, 24, torch.Generator().manual_seed(0))[:, :, 12, 12]
    assert faded[:, 0].min() > 0.9, "red stays red"
    assert faded[:, 1].max() > 0.5, "and goes towards white"
    lines = replace(still, line_art=1)(rgba, 24, torch.Generator().manual_seed(0))
    assert (lines.amax(1) < -0.5).flatten(1).any(1).all(), "outlines are dark"


def test_a_look_is_on_the_device_of_its_drawings() -> None:
    """Where tensors are made elsewhere unless somebody says where, which is what a GPU's lessons meet."""
    rgba = torch.randint(0, 255, (8, 24, 24, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    config = Micro()
    lessons, clip = micro_lessons(config), config.build()
    student, names = ImageStudent(clip, config), torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    look = Look(Augment(line_art=0.5, fade=0.5), 16, 3, 4.0, 2.0)

    def seen() -> list[Tensor]:
        found = student.losses(lessons, lessons.concept[:4], names, look, torch.Generator().manual_seed(0))
        return [*Augment(fade=0.5).look(rgba, 16, torch.Generator().manual_seed(0)), *found.values()]

    wanted = seen()
    with torch.device("meta"):
        found = seen()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_plain_is_on_white() -> None:
    rgba = torch.tensor([[[[10, 20, 30, 0], [10, 20, 30, 255]]]], dtype=torch.uint8)
    assert plain(rgba)[0, :, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]


def test_captions_hide_the_unseen_and_are_the_same_again() -> None:
    concepts = [Concept("1", "slice", ("pizza", "food"), "food"), Concept("2", "bare", (), "food")]
    captions = write_captions(concepts, 12, seed=5, hide={"pizza"})
    assert captions == write_captions(concepts, 12, seed=5, hide={"pizza"})
    assert [len(group) for group in captions] == [12, 12]
    assert not any("pizza" in text for text in captions[0])
    assert any("food" in text and "slice" not in text for text in captions[0]), "tags alone"
    assert all("bare" in text for text in captions[1])


def test_whitened_features_have_like_sizes() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 4, 3, 2, 1.5, 1]) + 7
    y = whiten(x, 4)
    assert y.shape == (500, 4)
    torch.testing.assert_close(y.T @ y / 500, torch.eye(4), atol=0.1, rtol=0)


# --- the data --------------------------------------------------------------------------------------------------------


def test_the_split_is_a_split() -> None:
    seen, unseen = read_split("seen"), read_split("unseen")
    assert (len(seen), len(unseen)) == (1494, 150)
    assert len(set(seen)) == 1494
    assert not set(seen) & set(unseen)


def test_unseen_concepts_share_no_word() -> None:
    labels = ["tiger", "tiger face", "violin", "drum", "grinning face", "axe"]
    concepts = tuple(
        Concept(str(i), label, (), "smileys" if "grin" in label else "animals") for i, label in enumerate(labels)
    )
    styles = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji", "openmoji")
    # every concept in every style, but no drum in openmoji
    rows = [(s, c) for s in range(7) for c in range(6) if (styles[s], labels[c]) != ("openmoji", "drum")]
    style, concept = (torch.tensor(column).numpy() for column in zip(*rows, strict=True))
    drawings = DrawingSet(torch.zeros(len(rows), 2, 2, 4).numpy(), style, concept, styles, concepts)
    for seed in range(8):
        seen, unseen = choose_split(drawings, unseen=2, seed=seed)
        assert {c.label for c in unseen} == {"violin", "axe"}
        assert {c.label for c in seen} == {"tiger", "tiger face", "drum", "grinning face"}


def test_icons_are_found_by_code_name_or_spelling(tmp_path: Path) -> None:
    body = {"body": "<path/>"}
    icons = {"icons": {"red-heart": body, "alarmclock": {**body, "left": 2}}, "width": 8, "height": 8}
    icons["aliases"] = {"traeh": {"parent": "red-heart", "hFlip": True}}
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    by_name = IconSet(tmp_path)
    assert by_name.find(Concept("23F0", "alarm clock", (), "travel")) == "alarmclock"
    assert by_name.find(Concept("1", "heart that is red", (), "smileys"), ["red-heart"]) == "red-heart"
    assert by_name.find(Concept("1", "axe", (), "objects")) is None
    assert 'viewBox="2 0 8 8"' in by_name.svg("alarmclock")
    assert "scale(-1 1)" in by_name.svg("traeh")
    (tmp_path / "chars.json").write_text(json.dumps({"2764": "red-heart"}))
    by_code = IconSet(tmp_path)
    assert by_code.find(Concept("2764-FE0F", "any", (), "smileys")) == "red-heart"
    assert by_code.find(Concept("23F0", "alarm clock", (), "travel")) is None
    assert "stroke" not in by_name.svg("red-heart")
    assert 'stroke-width="0.160"' in by_name.svg("red-heart", line=0.02), "two hundredths of a side of 8"


def test_no_drawings_says_what_to_run(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(MediaError, match=r"python -m perception_encoder\.training\.drawings"):
            read_drawings(tmp_path)
        (tmp_path / "drawings.npz").touch()  # without concepts.json


def test_a_client_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert drawings.main(["--out", str(tmp_path / "data")]) == 1
    assert (
        capsys.readouterr().err == "error: npm is not installed; it comes with Node.js (Debian: apt-get install npm)\n"
    )
    assert not list((tmp_path / "data").glob("*.npz"))


def test_what_training_needs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert recipe.main(given) == 1
    assert capsys.readouterr().err.startswith(f"error: no drawings in {tmp_path}; run `python -m ")
    for name in ("drawings.npz", "more.npz", "concepts.json"):
        (tmp_path / name).touch()
    assert recipe.main(given) == 1
    assert capsys.readouterr().err.startswith(f"error: no words.txt in {tmp_path}: its nouns are of Debian's package ")
    with pytest.raises(MediaError, match="wordnet-base"):
        recipe._words(tmp_path, 0)
    for teacher in (EfficientNetLite0, MiniLM):
        with pytest.raises(MediaError, match=r"0 files .* where a teacher is looked for"):
            teacher(tmp_path)
    assert not (tmp_path / "out").exists()


# --- the recipe, tiny ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Micro(NanoConfig):
    """Three steps of each stage; those of the second come in three, three and two parts."""

    image_size: int = 16
    vision_width: int = 64
    vision_depth: int = 1
    text_width: int = 32
    text_depth: int = 1
    output_width: int = 16
    feature_width: int = 8
    place_width: int = 4
    captions: int = 2
    text_steps: int = 3
    text_batch: int = 8
    image_steps: int = 3
    image_decay: int = 1
    looks: tuple[tuple[int, int, int, int], ...] = ((0, 8, 1, 6), (2, 16, 3, 4))
    part: int = 2


def micro_lessons(config: NanoConfig) -> Lessons:
    g = torch.Generator().manual_seed(0)
    captions = [[f"a {i}", f"b {i}"] for i in range(6)]
    tokens = config.build().tokenize([text for group in captions for text in group]).unflatten(0, (6, 2))
    return Lessons(
        torch.randint(0, 255, (12, 20, 20, 4), generator=g).to(torch.uint8),
        torch.arange(12) % 6,
        torch.arange(12) % 6,
        torch.arange(12),
        captions,
        tokens,
        torch.randn(6, 2, 16, generator=g),
        tokens.flatten(0, 1),
        torch.randn(12, 16, generator=g),
        torch.randn(12, 8, generator=g),
        torch.randn(12, 4, 10, 10, generator=g).half(),
        0.05 * torch.randn(49408, 32, generator=g),
    )


def test_every_stage_moves_what_it_should(tmp_path: Path) -> None:
    config = Micro()
    lessons, clip = micro_lessons(config), config.build()

    def state(part: nn.Module) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in part.state_dict().items()}

    def moved(before: dict[str, Tensor], part: nn.Module) -> bool:
        return any(not torch.equal(v, before[k]) for k, v in part.state_dict().items())

    for stage, moves, stays in (
        (text_stage, clip.text, clip.vision),
        (image_stage, clip.vision, clip.text),
    ):
        before, still = state(moves), state(stays)
        assert stage(config, lessons, clip, tmp_path)
        assert moved(before, moves), stage.__name__
        assert not moved(still, stays), stage.__name__
    assert all(torch.isfinite(v).all() for v in clip.state_dict().values())


def learn(config: NanoConfig, out: Path) -> dict[str, Tensor] | None:
    """Both stages, from where they were stopped if they were; the weights, or None when they were stopped again."""
    clip, lessons = config.build(), micro_lessons(config)
    done = text_stage(config, lessons, clip, out) and image_stage(config, lessons, clip, out)
    return clip.state_dict() if done else None


Drawings = list[tuple[list[int], int, int]]


def watch(monkeypatch: pytest.MonkeyPatch) -> Drawings:
    """What the image stage takes from now on, pass by pass: drawings, side, seed."""
    taken: Drawings = []
    inner = ImageStudent.losses

    def losses(
        self: ImageStudent, lessons: Any, rows: Tensor, names: Any, look: Any, generator: torch.Generator
    ) -> Any:
        taken.append((rows.tolist(), look.side, generator.initial_seed()))
        return inner(self, lessons, rows, names, look, generator)

    monkeypatch.setattr(ImageStudent, "losses", losses)
    return taken


def test_a_stopped_training_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to stop in every step: the same drawings in the same order, the same weights to the bit."""
    config, taken, tell = Micro(), watch(monkeypatch), Task.tell
    whole = learn(config, tmp_path / "whole")
    assert whole is not None
    wanted = taken.copy()
    taken.clear()

    def stop(self: Task, trainer: Trainer, line: dict[str, Any]) -> None:
        tell(self, trainer, line)
        torch.manual_seed(99)  # the global generator must not matter
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Task, "tell", stop)
    attempts = [learn(config, tmp_path / "part") for _ in range(5)]
    # The last step of the first stage was done when it was told to stop, so the second began in the same attempt.
    assert [attempt is None for attempt in attempts] == [True, True, True, True, False]
    assert attempts[-1] is not None
    for name, value in whole.items():
        assert torch.equal(attempts[-1][name], value), name
    assert taken == wanted
    for stage in ("text", "image"):
        ends = [read_metrics(tmp_path / folder / stage)[-1] for folder in ("whole", "part")]
        assert ends[0]["step"] == ends[1]["step"] == 3
        assert ends[0]["loss"] == ends[1]["loss"]


def _worker(rank: int, folder: str, port: int) -> None:
    out, inner = Path(folder), recipe.train

    def train(*given: Any) -> Any:
        clip = inner(*given)
        assert clip is not None
        torch.save(clip.state_dict(), out / f"{rank}.pt")
        return clip

    recipe.train = train  # type: ignore[assignment]
    recipe.prepare = lambda config, data, out: micro_lessons(config)  # type: ignore[assignment]
    recipe.NanoConfig = Micro  # type: ignore[misc]
    options = argparse.Namespace(data=out, out=out, device="cpu", processes=2, image_steps=3, stages=["text", "image"])
    assert recipe._work(rank, options, port) == 0


def _effective(name: str, value: Tensor) -> Tensor:
    """Without the keys' biases, which no softmax sees: their gradient is rounding, and AdamW steps in full for it."""
    return value.unflatten(0, (3, -1))[[0, 2]] if name.endswith("qkv.bias") else value


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Three parts for two: one process has a part less, and in the first stage none at all."""
    alone = learn(Micro(), tmp_path / "one")
    assert alone is not None
    (tmp_path / "two").mkdir()
    mp.spawn(_worker, args=(str(tmp_path / "two"), recipe._free_port()), nprocs=2)
    both = [torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert both[0].keys() == alone.keys()
    for name, value in both[0].items():
        assert torch.equal(both[1][name], value), name
        torch.testing.assert_close(_effective(name, value), _effective(name, alone[name]), atol=1e-5, rtol=1e-4)
    for stage in ("text", "image"):
        one, two = (read_metrics(tmp_path / folder / stage) for folder in ("one", "two"))
        assert len(one) == len(two) == 1
        for name in one[0].keys() - {"seconds", "step_s", "data_s", "samples_s", "tokens_s", "tflops", "memory"}:
            assert two[0][name] == pytest.approx(one[0][name], rel=1e-4), name
    again = learn(Micro(), tmp_path / "two")  # what two have written, one can read
    assert again is not None
    assert all(torch.equal(value, both[0][name]) for name, value in again.items())
    saved = load_clip(tmp_path / "two" / "PE-Core-nano", device="cpu", dtype="fp32").state_dict()
    assert all(torch.equal(saved[name], value.half().float()) for name, value in both[0].items())


def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with the tiny lessons, and without data."""
    monkeypatch.setattr(recipe, "check_data", lambda data: None)
    monkeypatch.setattr(recipe, "prepare", lambda config, data, out: micro_lessons(config))
    monkeypatch.setattr(recipe, "NanoConfig", Micro)


def test_a_stopped_command_says_so_by_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes after it, as in `make nano`, must not go on."""
    here(monkeypatch)
    tell = Task.tell

    def stop(self: Task, trainer: Trainer, line: dict[str, Any]) -> None:
        tell(self, trainer, line)
        os.kill(os.getpid(), signal.SIGTERM)

    given = ["--out", str(tmp_path / "out"), "--device", "cpu", "--processes", "1"]
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(Task, "tell", stop)
        assert recipe.main(given) == recipe.STOPPED != 0
    assert "stopped in stage text; the same command continues" in caplog.text
    assert recipe.main(given) == 0
    assert (tmp_path / "out" / "PE-Core-nano" / "model.safetensors").is_file()


def test_several_processes_end_with_the_status_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    given = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for ended in (recipe.STOPPED, 1, 0, -9):

        def spawn(run: Any, arguments: Any, nprocs: int, ended: int = ended) -> None:
            assert nprocs == 2
            monkeypatch.setattr(recipe, "_work", lambda *_: ended)
            with nullcontext() if ended == 0 else pytest.raises(SystemExit, match=str(ended)):
                run(0, *arguments)
            if ended:
                raise mp.ProcessExitedException("-", error_index=0, error_pid=1, exit_code=ended)

        monkeypatch.setattr(recipe.torch.multiprocessing, "spawn", spawn)
        if ended < 0:
            with pytest.raises(mp.ProcessExitedException):
                recipe.main(given)
        else:
            assert recipe.main(given) == ended


def test_a_device_is_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here(monkeypatch)
    chosen: list[tuple[str, int]] = []

    def start(*given: Any) -> int:
        chosen.append((given[-1].device, given[-1].processes))
        return 0

    monkeypatch.setattr(recipe, "_work", start)
    monkeypatch.setattr(recipe, "_start", start)
    monkeypatch.setattr(recipe, "pick_device", torch.device)
    for there, arguments, wanted in (
        (["cpu"], [], ("cpu", 2)),
        (["mps", "cpu"], [], ("cpu", 2)),
        (["cuda:0", "cpu"], [], ("cuda", 1)),
        (["cuda:0", "cpu"], ["--device", "cpu", "--processes", "3"], ("cpu", 3)),
    ):
        monkeypatch.setattr(recipe, "available_devices", lambda there=there: there)
        assert recipe.main(arguments) == 0
        assert chosen[-1] == wanted
    monkeypatch.undo()
    assert recipe.main(["--device", "cuda:77"]) == 1
    assert capsys.readouterr().err.startswith("error: device 'cuda:77' is not available")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_what_a_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    found = []
    for device in ("cpu", "cuda"):
        given = ["--out", str(tmp_path / device), "--device", device, "--processes", "1", "--image-steps", "3"]
        assert recipe.main(given) == 0
        found.append([line["loss"] for stage in ("text", "image") for line in read_metrics(tmp_path / device / stage)])
        assert load_clip(tmp_path / device / "PE-Core-nano", device="cpu")
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_the_command_goes_stage_by_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here(monkeypatch)
    given = ["--out", str(tmp_path / "out"), "--device", "cpu", "--processes", "1", "--image-steps", "2"]
    assert recipe.main([*given, "--stages", "text"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text"]
    done = (tmp_path / "out/text/metrics.jsonl").read_text()
    with caplog.at_level("INFO"):
        assert recipe.main([*given, "--stages", "image"]) == 0
    assert "continuing at step 3 of 3" in caplog.text, "the first stage is read, not left out"
    assert (tmp_path / "out/text/metrics.jsonl").read_text() == done
    assert "image step=2" in caplog.text
    assert "--image-steps 2 ends before pictures of 16 pixels, which come at step 2" in caplog.text
    saved = load_file(tmp_path / "out/PE-Core-nano/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}


def test_a_step_is_a_function_of_its_number() -> None:
    config = Micro()
    lessons = micro_lessons(config)
    drawn = Drawn(config, lessons, torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0)))

    def parts(world: World, first: int, count: int = 4) -> list[list[Part]]:
        return [list(step.packs) for step in islice(Parts(drawn, world).steps(first), count)]

    def plainly(steps: list[list[Part]]) -> list[list[tuple[Any, ...]]]:
        return [[(p.rows.tolist(), p.names.tolist(), p.look.side, p.seed) for p in step] for step in steps]

    whole = parts(World(), 0)
    assert [[len(part) for part in step] for step in whole] == [[2, 2, 2], [2, 2, 2], [2, 2], [2, 2]]
    assert [step[0].look.side for step in whole] == [8, 8, 16, 16]
    assert plainly(parts(World(), 2, 2)) == plainly(whole[2:])
    shares = [plainly(parts(World(rank, 2), 0)) for rank in range(2)]
    laid = [[p for p in chain(*zip_longest(*pair)) if p is not None] for pair in zip(*shares, strict=True)]
    assert laid == plainly(whole)
    flat = list(chain(*whole))
    assert len({part.seed for part in flat}) == len(flat)
    assert not torch.equal(whole[0][0].names, whole[1][0].names)
    held_out = ALL_STYLES.index(VALIDATION_STYLE)
    for step in whole:
        rows = torch.cat([part.rows for part in step]).tolist()
        assert len(set(rows)) == len(rows)
        assert held_out not in lessons.style[rows]
    assert whole[0][0].rows.tolist() != whole[1][0].rows.tolist()


def test_parts_of_a_step_weigh_what_they_hold() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 1), torch.randn(8, 6)

    def losses(part: Tensor) -> dict[str, Tensor]:
        y = layer(part)
        return {"near": y.square().mean(), "far": 3 * (y - 1).abs().mean()}

    whole, parts = Task(layer, losses, ("near", "far")), Task(layer, losses, ("near", "far"))
    (wanted,) = torch.autograd.grad(sum(losses(x).values()), layer.weight)
    for task, given in ((whole, [x]), (parts, [*x.split(3), x[:0]])):
        layer.zero_grad()
        found = [task(part) for part in given]
        for loss in found:
            loss.total.backward()
        weight = sum(loss.weight for loss in found)
        assert weight == 8
        torch.testing.assert_close(layer.weight.grad / weight, wanted)
        for name, loss in losses(x).items():
            assert task.sums[name] / weight == pytest.approx(loss.item(), rel=1e-5)


def test_the_averaged_tower_is_checked_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = Micro(check_every=3), []
    lessons, clip = micro_lessons(config), config.build()
    inner = recipe._Checks.__call__

    def check(self: Any, trainer: Trainer) -> dict[str, float]:
        seen.append(self)
        return inner(self, trainer)

    monkeypatch.setattr(recipe._Checks, "__call__", check)
    assert image_stage(config, lessons, clip, tmp_path)
    (checks,) = seen
    for name, value in clip.vision.state_dict().items():
        assert torch.equal(checks.vision.state_dict()[name], value), name
    clip.eval()
    rows = torch.nonzero(lessons.style == ALL_STYLES.index(VALIDATION_STYLE))[:, 0]
    with torch.no_grad():
        image = clip.vision.pooled(plain(lessons.pixels[rows], 16).float() / 127.5 - 1)
        near = (image @ recipe.embed_captions(clip.text, lessons.tokens).mean(1).T).argmax(1)
    (line,) = read_metrics(tmp_path / "image")
    assert len(rows) == 2
    assert line["top1_held_out"] == 100 * (near == lessons.concept[rows]).float().mean().item()


# --- the weights that ship -------------------------------------------------------------------------------------------


def test_shipped_weights_know_the_bundled_drawings() -> None:
    clip, files = load_clip("PE-Core-nano", device="cpu"), samples.drawings()
    assert 8 <= len(files) <= 12
    rows = ZeroShotClassifier(clip, list(files), DRAWING_TEMPLATES).predict(list(files.values()), top=1)
    right = [row[0].label for row in rows] == list(files)
    assert right, {label: row[0].label for label, row in zip(files, rows, strict=True)}


def test_shipped_weights_are_small_and_credited() -> None:
    folder = Path(samples.__file__).parents[1] / "weights"
    assert sum(f.stat().st_size for f in (folder / "PE-Core-nano").iterdir()) < 24_000_000
    notice = (folder / "NOTICE.md").read_text(encoding="utf-8")
    for name in ("Twemoji", "EmojiOne", "CC BY 4.0", "noto", "WordNet", "MiniLM", "EfficientNet"):
        assert name.lower() in notice.lower(), name
    card = (folder / "PE-Core-nano" / "README.md").read_text(encoding="utf-8")
    results = json.loads((Path(__file__).parents[2] / "benchmarks/results/pe_core_nano.json").read_text())
    for style in ("twemoji", "noto", "openmoji"):
        line = results["results"]["T2"][style]
        assert f"| T2 unseen concepts, {style} | {100 * line['top1']:.1f} (" in card, "the card is the file's"
    assert results["weights_sha256"] == sha256_of(folder / "PE-Core-nano" / "model.safetensors")
