"""Losses against plain formulas, stopping and continuing, the split, and the weights that ship."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from perception.errors import CheckpointError, MediaError
from perception.files import sha256_of
from perception_encoder import samples
from perception_encoder.training import (
    Augment,
    Loop,
    LoopConfig,
    Muon,
    clip_loss,
    concept_loss,
    cosine_distillation,
    make_optimizers,
    plain,
    similarity_distillation,
    warmup_stable_decay,
)
from perception_encoder.training.captions import write_captions
from perception_encoder.training.drawings import Concept, IconSet, choose_split, read_drawings, read_split
from perception_encoder.training.drawings import Drawings as DrawingSet
from perception_encoder.training.nano import Lessons, NanoConfig, image_stage, text_stage, whiten
from perception_encoder.training.optim import orthogonal
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
    clip = micro_config().build()
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


# --- the loop --------------------------------------------------------------------------------------------------------


def make_loop(folder: Path, **changes: float) -> Loop:
    torch.manual_seed(3)
    module = nn.ModuleDict({"blocks": nn.Linear(6, 6), "out": nn.Linear(6, 2)})

    def losses(generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(8, 6, generator=generator)
        return {"fit": (module["out"](module["blocks"](x).relu()) - x[:, :2]).square().mean()}

    config = replace(LoopConfig(steps=12, warmup=2, decay=4, log_every=1), **changes)
    return Loop(module, make_optimizers(module, 1e-2), losses, config, folder)


def weights(loop: Loop) -> dict[str, Tensor]:
    return {
        f"{n}.{k}": v.clone()
        for n, m in (("now", loop.module), ("mean", loop.average))
        for k, v in m.state_dict().items()
    }


def test_a_stopped_run_continues_exactly(tmp_path: Path) -> None:
    whole = make_loop(tmp_path / "whole")
    assert whole.run()
    part = make_loop(tmp_path / "part")
    for _ in range(5):
        part.advance()
    part.save()
    torch.manual_seed(99)  # the global generator must not matter
    again = make_loop(tmp_path / "part")
    assert again.step == 5
    assert again.run()
    assert weights(again).keys() == weights(whole).keys()
    for key, value in weights(whole).items():
        assert torch.equal(weights(again)[key], value), key
    losses = [json.loads(line)["fit"] for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def test_every_step_draws_anew(tmp_path: Path) -> None:
    loop, drawn = make_loop(tmp_path), []
    inner = loop.losses

    def losses(generator: torch.Generator) -> dict[str, Tensor]:
        drawn.append(generator.initial_seed())
        return inner(generator)

    loop.losses = losses
    loop.run()
    assert len(set(drawn)) == 12


def test_parts_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    whole = make_loop(tmp_path / "whole")

    def parts(loop: Loop):  # type: ignore[no-untyped-def]
        module = loop.module

        def losses(generator: torch.Generator) -> list:  # type: ignore[type-arg]
            x = torch.randn(8, 6, generator=generator)

            def part(some: Tensor) -> dict[str, Tensor]:
                return {"fit": (module["out"](module["blocks"](some).relu()) - some[:, :2]).square().sum() / 16}

            return [partial(part, some) for some in x.split(3)]

        return losses

    one, three = make_loop(tmp_path / "one"), make_loop(tmp_path / "three", workers=3)
    one.losses, three.losses = parts(one), parts(three)
    for step in range(6):
        values = whole.advance(), one.advance(), three.advance()
        assert values[1] == values[2]
        assert values[0]["fit"] == pytest.approx(values[1]["fit"], abs=1e-4), step
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(one)[key], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(weights(one)[key], weights(three)[key]), key


def _shared_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    loop = make_loop(Path(folder) / "two", steps=3)
    loop.losses = _three_parts(loop.module)
    assert loop.run()
    torch.save(weights(loop), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _three_parts(module: nn.Module):  # type: ignore[no-untyped-def]
    def losses(generator: torch.Generator) -> list:  # type: ignore[type-arg]
        x = torch.randn(9, 6, generator=generator)

        def part(some: Tensor) -> dict[str, Tensor]:
            return {"fit": (module["out"](module["blocks"](some).relu()) - some[:, :2]).square().sum() / 18}

        return [partial(part, some) for some in x.split(3)]

    return losses


def test_processes_share_the_parts_of_a_batch(tmp_path: Path) -> None:
    alone = make_loop(tmp_path / "one", steps=3)
    alone.losses = _three_parts(alone.module)
    assert alone.run()
    mp.spawn(_shared_worker, args=(str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in weights(alone).items():
        assert torch.equal(both[0][key], both[1][key]), key
        torch.testing.assert_close(both[0][key], value, atol=1e-5, rtol=1e-4)
    logs = [
        [json.loads(line)["fit"] for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        for folder in ("one", "two")
    ]
    assert logs[0] == pytest.approx(logs[1], abs=2e-4)


def test_sigterm_saves_and_says_so(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, steps=10_000)
    inner = loop.losses

    def losses(generator: torch.Generator) -> dict[str, Tensor]:
        if loop.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(generator)

    loop.losses = losses
    before = signal.getsignal(signal.SIGTERM)
    assert not loop.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert make_loop(tmp_path, steps=10_000).step == 8


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    make_loop(tmp_path).save()
    with pytest.raises(CheckpointError, match="another run"):
        make_loop(tmp_path, seed=1)


def test_a_loss_that_is_not_a_number_stops(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.losses = lambda generator: {"fit": torch.tensor(math.nan, requires_grad=True)}
    with pytest.raises(FloatingPointError, match="step 0"):
        loop.advance()


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
    with pytest.raises(MediaError, match=r"python -m perception_encoder\.training\.drawings"):
        read_drawings(tmp_path)


# --- the recipe, tiny ------------------------------------------------------------------------------------------------


def micro_config() -> NanoConfig:
    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "vision_width": 64,
        "vision_depth": 1,
        "text_width": 32,
        "text_depth": 1,
    }
    steps = {
        "text_steps": 3,
        "image_steps": 3,
        "image_decay": 1,
        "text_batch": 8,
        "part": 3,
    }
    looks = ((0, 8, 1, 6), (2, 16, 3, 4))
    return NanoConfig(**sizes, **steps, looks=looks, output_width=16, feature_width=8, place_width=4, captions=2)


def micro_lessons(config: NanoConfig) -> Lessons:
    g = torch.Generator().manual_seed(0)
    captions = [[f"a {i}", f"b {i}"] for i in range(6)]
    tokens = config.build().tokenize([text for group in captions for text in group]).unflatten(0, (6, 2))
    return Lessons(
        torch.randint(0, 255, (12, 20, 20, 4), generator=g).to(torch.uint8),
        torch.arange(12) % 6,
        torch.arange(12) % 5,
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
    config = micro_config()
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
