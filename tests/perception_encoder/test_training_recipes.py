"""Run files, pairs, layer-wise rates, probes, and towers made from towers; each small enough to check by hand."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from training_tiny import watched_compiler
from typer.testing import CliRunner

from perception.errors import CheckpointError, ConfigError, MediaError
from perception.media import read_image
from perception.pixels import PixelSpec
from perception.training.distributed import EngineConfig
from perception.training.state import KeepConfig
from perception.training.trainer import Stopped
from perception_encoder.clip import CLIP
from perception_encoder.config import TextConfig, VisionConfig
from perception_encoder.text import TextTransformer
from perception_encoder.training import tasks
from perception_encoder.training.config import (
    FeaturesConfig,
    LabelsConfig,
    LossConfig,
    ModelConfig,
    PairsConfig,
    ProbeRun,
    Run,
    load_run,
    run_names,
)
from perception_encoder.training.flops import tower_flops, vision_flops
from perception_encoder.training.launch import load_checkpoint, make_trainer, rehearse, train
from perception_encoder.training.nano import ImageStudent, NanoConfig
from perception_encoder.training.optim import layer_groups, orthogonal, warmup_cosine
from perception_encoder.training.pairs import FolderPairs, PairStream, RowPairs, TarPairs, class_names, open_pairs
from perception_encoder.training.probe import STRENGTHS, linear_probe
from perception_encoder.training.probing import load_probe, probe
from perception_encoder.training.probing import rehearse as rehearse_probe
from perception_encoder.training.recipes import SelfDistillation, to_lang, to_spatial
from perception_encoder.training.sparse import choose_patches, pool, sparse_tokens
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import load_clip, load_encoder, save

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def tower(depth: int = 3, **changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "heads": 2, "mlp_width": 64, "pool_heads": 4}
    config = VisionConfig(**{**sizes, "depth": depth, "output_width": 24, **changes})
    return VisionTransformer(config, PixelSpec(size=16))


def small_clip() -> CLIP:
    vision = tower(depth=2)
    text = TextTransformer(TextConfig(context=12, width=32, depth=1, heads=2, output_width=24))
    return CLIP(vision, text, vision.preprocess)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of each of four colours, one folder a colour."""
    draw = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            codes = torch.tensor(colour) + torch.randint(-20, 15, (20, 20, 3), generator=draw)
            Image.fromarray(codes.clamp(0, 255).to(torch.uint8).numpy()).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def make_run(pictures: Path, task: str = "contrastive", **changes: Any) -> Run:
    config: dict[str, Any] = {
        "out": str(pictures.parent / "out"),
        "task": task,
        "steps": 6,
        "batch": 8,
        "model": ModelConfig(init="not asked"),
        "data": PairsConfig(source=str(pictures), crop=0.7, flip=0.5, workers=2),
        "keep": KeepConfig(steps=0),
        "tensorboard": False,
    }
    return Run(**{**config, **changes})


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


# --- rates -----------------------------------------------------------------------------------------------------------


def test_layers_learn_the_slower_the_lower_they_are() -> None:
    clip = small_clip()
    names = {id(p): name for name, p in clip.named_parameters()}
    table = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in layer_groups(clip, 1.0, 0.1, 0.5) for p in g["params"]}
    assert len(table) == len(names)
    expected = {
        "vision.patch_embed.weight": (0.125, 0.1),
        "vision.class_token": (0.125, 0.0),
        "vision.pos_embed": (0.125, 0.0),
        "vision.norm_pre.weight": (0.125, 0.0),
        "vision.blocks.0.attn.qkv.weight": (0.25, 0.1),
        "vision.blocks.1.mlp.fc1.weight": (0.5, 0.1),
        "vision.blocks.1.mlp.fc1.bias": (0.5, 0.0),
        "vision.norm_post.weight": (1.0, 0.0),
        "vision.pool.qkv.weight": (1.0, 0.1),
        "vision.pool.probe": (1.0, 0.0),
        "vision.project.weight": (1.0, 0.1),
        "text.token_embed.weight": (0.25, 0.0),  # one block: L + 1 = 2
        "text.blocks.0.attn.qkv.weight": (0.5, 0.1),
        "text.project.weight": (1.0, 0.1),
        "logit_scale": (1.0, 0.0),
    }
    assert {name: table[name] for name in expected} == expected
    clip.text.requires_grad_(False)
    assert not any(names[id(p)].startswith("text.") for g in layer_groups(clip, 1.0) for p in g["params"])


def test_warm_up_then_half_a_cosine() -> None:
    factors = [warmup_cosine(step, 100, 9, 0.1) for step in range(101)]
    assert factors[:2] == pytest.approx([0.1, 0.2])
    assert factors[9] == pytest.approx(1)
    assert factors[100] == pytest.approx(0.1)
    assert warmup_cosine(50, 100) == pytest.approx(0.5)
    assert max(factors) == factors[9]


def test_wide_matrices_are_made_orthogonal_by_the_same_formula() -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    step = x / x.norm()
    for _ in range(5):
        gram = step @ step.T
        step = 3.4445 * step + (-4.7750 * gram + 2.0315 * gram @ gram) @ step
    torch.testing.assert_close(orthogonal(x), step, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(orthogonal(x.T), step.T, atol=1e-5, rtol=1e-4)


# --- some of the patches ---------------------------------------------------------------------------------------------


def test_all_patches_are_the_tower_itself() -> None:
    model = tower()
    pixels = torch.randn(2, 3, 16, 24)
    every = torch.arange(24).expand(2, -1)
    tokens = sparse_tokens(model, pixels, every)
    torch.testing.assert_close(pool(model, tokens), model.pooled(pixels))
    few = sparse_tokens(model, pixels, every[:, 3:9])
    assert few.shape == (2, 7, 32)
    moved = pixels.clone()
    moved[:, :, 8:] = 0  # patches 12 and on, none of those kept
    torch.testing.assert_close(sparse_tokens(model, moved, every[:, 3:9]), few)


def test_what_is_empty_goes_first() -> None:
    pixels = torch.full((3, 3, 16, 16), 0.7)
    pixels[:, :, 4:8, 4:12] = torch.rand(3, 3, 4, 8)
    chosen = choose_patches(pixels, 4, 3, torch.Generator().manual_seed(0))
    assert chosen.shape == (3, 3)
    assert all({5, 6} < set(row.tolist()) for row in chosen)
    assert len({tuple(row.tolist()) for row in chosen}) > 1, "the rest is drawn"


def test_places_are_the_teachers_at_the_same_spot() -> None:
    """A head that already says what the teacher says has no loss left, whatever the look."""
    from perception_encoder.training.augment import Augment
    from perception_encoder.training.nano import Lessons, Look

    config = NanoConfig(vision_width=64, vision_depth=1, text_width=32, text_depth=1, place_width=4, feature_width=8)
    student = ImageStudent(config.build(), config)
    places = torch.zeros(1, 4, 10, 10, dtype=torch.float16)
    places[:, 0] = 1  # the same everywhere
    blank = torch.zeros(0)
    lessons = Lessons(
        torch.randint(0, 255, (2, 72, 72, 4), dtype=torch.uint8),
        torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2, dtype=torch.long), [], blank, blank, blank, blank,
        torch.randn(1, 8), places, blank,
    )  # fmt: skip
    torch.nn.init.zeros_(student.places.weight)
    with torch.no_grad():
        student.places.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    look = Look(Augment(scale=(2, 2), shift=0, turn=0), 64, 20, features=1.0, places=2.0)
    rows, names = torch.tensor([0, 1]), torch.randn(3, 384)
    found = student.losses(lessons, rows, names, look, torch.Generator().manual_seed(0))
    assert found["places"].item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        student.places.bias.neg_()
    found = student.losses(lessons, rows, names, look, torch.Generator().manual_seed(0))
    assert found["places"].item() == pytest.approx(4, abs=1e-4)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_the_same_pairs_from_a_folder_a_table_and_an_archive(pictures: Path) -> None:
    files = sorted(pictures.rglob("*.png"))
    rows = [{"image": str(f.relative_to(pictures)), "text": f.parent.name} for f in files]
    (pictures / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (pictures / "rows.csv").write_text(
        "text,image\n" + "\n".join(f"{row['text']},{row['image']}" for row in rows), encoding="utf-8"
    )
    with tarfile.open(pictures / "rows.tar", "w") as archive:
        for i, (file, row) in enumerate(zip(files, rows, strict=True)):
            archive.add(file, f"{i:04}.png")
            text = json.dumps({"caption": row["text"]}) if i % 2 else row["text"]
            member = tarfile.TarInfo(f"{i:04}.{'json' if i % 2 else 'txt'}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    wanted = [(Image.open(f).tobytes(), (f.parent.name,)) for f in files]
    for source in (pictures, pictures / "rows.jsonl", pictures / "rows.csv", pictures / "rows.tar"):
        pairs = open_pairs(PairsConfig(source=str(source)))
        found = [pairs[i] for i in range(len(pairs))]
        opened = [Image.open(io.BytesIO(p.image) if isinstance(p.image, bytes) else p.image) for p in found]
        assert [(o.tobytes(), p.texts) for o, p in zip(opened, found, strict=True)] == wanted, source.name
        assert pairs.fingerprint() == open_pairs(PairsConfig(source=str(source))).fingerprint()


def test_pictures_stay_inside_their_root(pictures: Path) -> None:
    (pictures / "rows.jsonl").write_text(
        '{"image": "../../etc/passwd", "text": "x"}\n{"image": 3, "text": "x"}\nno json\n{"image": "a", "text": []}'
    )
    pairs = RowPairs(pictures / "rows.jsonl", PairsConfig(source=""))
    for index, why in enumerate(("outside", "expected a path", "no row with", "expected a caption")):
        with pytest.raises(MediaError, match=why):
            pairs[index]


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    """F-124: where an editor finds it, behind empty lines, texts of several lines, and marks that end none in JSON."""
    text = '\n{"image": "a", "text": "x\u2028y"}\n\n   \nno json\n'
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "rows.csv").write_text('image,text\n\na,"two\nlines"\n\n../b,"three\n\nlines",more,"and\nmore"\nc\n')
    (tmp_path / "rows.tsv").write_text("image\ttext\r\na\tx\r\n../b\ty\r\n", newline="")
    for file, lines, bad in (("rows.jsonl", [2, 5], 1), ("rows.csv", [3, 6, 10], 1), ("rows.tsv", [2, 3], 1)):
        pairs = RowPairs(tmp_path / file, PairsConfig(source=""))
        assert [pairs.where(i) for i in range(len(pairs))] == [f"{tmp_path / file}:{line}" for line in lines]
        with pytest.raises(MediaError, match=rf"{file}:{lines[bad]}: "):
            pairs[bad]
    assert RowPairs(tmp_path / "rows.jsonl", PairsConfig(source=""))[0].texts == ("x\u2028y",)


def test_data_that_is_none_says_so(tmp_path: Path) -> None:
    for source, why in (("nowhere", "no data at"), ("a.parquet", "of no kind"), (".", "no picture"), ("b.tar", "tar")):
        if "." in source[1:]:
            (tmp_path / source).write_text("x")
        with pytest.raises(ConfigError, match=why):
            open_pairs(PairsConfig(source=str(tmp_path / source)))
        (tmp_path / source).unlink() if (tmp_path / source).is_file() else None


def test_several_captions_and_a_text_beside(pictures: Path) -> None:
    (pictures / "red" / "0.txt").write_text("a red square\n\nsomething red\n", encoding="utf-8")
    pairs = FolderPairs(pictures / "red")
    assert pairs[0].texts == ("a red square", "something red")
    assert pairs[1].texts == ("red",)


def test_the_shares_of_two_processes_are_the_batch_of_one(pictures: Path) -> None:
    config, spec = PairsConfig(source=str(pictures), crop=0.5, flip=0.5, workers=2), PixelSpec(size=16)
    pairs = open_pairs(config)

    def batches(rank: int, size: int, position: int) -> list[Any]:
        steps = PairStream(pairs, config, spec, 8, seed=3, rank=rank, size=size).steps(position)
        return [next(next(steps).packs) for _ in range(2)]

    whole, parts = batches(0, 1, 8), [batches(rank, 2, 8) for rank in range(2)]
    for step in range(2):
        for rank in range(2):
            assert parts[rank][step].texts == whole[step].texts[rank::2]
            assert torch.equal(parts[rank][step].pixels, whole[step].pixels[rank::2])
    assert not torch.equal(whole[0].pixels, whole[1].pixels)
    assert batches(0, 1, 16)[0].texts == whole[1].texts, "a step is a function of its position"


def test_a_picture_that_cannot_be_read_is_replaced_and_counted(pictures: Path) -> None:
    (pictures / "red" / "1.png").write_bytes(b"no picture")
    run = make_run(pictures, batch=24, steps=1)
    with pytest.raises(Stopped, match="1 bad rows"):
        train(run, model=small_clip(), progress=False)
    lenient = replace(run, out=run.out + "2", data=replace(run.data, max_bad=0.1))
    assert train(lenient, model=small_clip(), progress=False)
    assert records(lenient)[0]["samples"] == 24
    assert records(lenient)[0]["bad_rows"] == 1


def test_bad_rows_of_labels_are_counted_like_others(pictures: Path) -> None:
    """Texts that cannot be read: neither the list of labels nor a step ends at them, while `max_bad` allows them."""
    (pictures / "red" / "1.txt").write_bytes(b"caf\xe9")
    (pictures / "blue" / "2.txt").write_text(" \n")
    found = FolderPairs(pictures)
    assert class_names(found) == sorted(COLOURS)
    bad = next(i for i in range(len(found)) if found.where(i).endswith(str(Path("red") / "1.png")))
    with pytest.raises(MediaError, match=r"1\.txt is no UTF-8"):
        found[bad]
    run = make_run(pictures, "classify", batch=24, steps=1)
    lenient = replace(run, data=replace(run.data, max_bad=0.1))
    assert train(lenient, model=tower(), progress=False)
    assert records(lenient)[0]["bad_rows"] == 2
    for file in found.files:
        file.with_suffix(".txt").write_text("")
    with pytest.raises(MediaError, match=r"none of 24 rows has a label.*expected a caption"):
        class_names(found)


@pytest.mark.parametrize("name", ["a\0b.png", "round"])
def test_a_path_that_is_none_is_a_bad_row(tmp_path: Path, name: str) -> None:
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": name, "text": "a"}) + "\n")
    pairs = open_pairs(PairsConfig(source=str(tmp_path / "rows.jsonl")))
    with pytest.raises((MediaError, OSError)):
        read_image(pairs[0].image)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_run_files_of_the_package_are_whole() -> None:
    assert {"contrastive_nano", "distill_nano", "finetune_nano", "spatial_nano", "probe_nano"} <= set(run_names())
    probe = load_run("probe_nano", ["data.source=elsewhere", "kind=logistic"])
    assert isinstance(probe, ProbeRun)
    assert (probe.data.source, probe.kind, probe.strengths) == ("elsewhere", "logistic", STRENGTHS)
    for override in ("steps=3", "data.crop=0.5", "data.held_out=1", "task=classify"):
        with pytest.raises(ConfigError):
            load_run("probe_nano", [override])
    for name in set(run_names()) - {"probe_nano"}:
        run = load_run(name, ["steps=777", "data.source=elsewhere"])
        assert (run.steps, run.data.source) == (777, "elsewhere"), name
    with pytest.raises(ConfigError, match="lerning"):
        load_run("contrastive_nano", ["optimizer.lerning=3"])
    with pytest.raises(ConfigError, match="warmup"):
        load_run("contrastive_nano", ["steps=3"])
    with pytest.raises(ConfigError, match=r"no run file at contrastive; those of the package are .*contrastive_nano, "):
        load_run("contrastive")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.clip=-1", "optimizer.lr=-1", "optimizer.lr=nan", "optimizer.weight_decay=-0.1", "optimizer.eps=-1",
        "optimizer.betas=[0.9, 1.0]", "optimizer.layer_decay=0", "schedule.floor=2", "schedule.warmup=-1", "average=7",
        "stop_after=-1",
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_run("contrastive_nano", [override])


def weights(folder: str) -> dict[str, Tensor]:
    return dict(load_clip(f"{folder}/model", device="cpu", dtype="fp32").named_parameters())


def test_contrastive_training_learns_and_continues_exactly(pictures: Path) -> None:
    run = make_run(pictures, steps=10, average=0.9)
    run = replace(run, optimizer=replace(run.optimizer, lr=3e-3, layer_decay=0.9))
    assert train(run, model=small_clip(), progress=False)
    losses = [line["loss"] for line in records(run)]
    assert losses[-1] < losses[0]
    part = replace(run, out=run.out + "-part", stop_after=1e-9)
    assert not train(part, model=small_clip(), progress=False), "it stopped after a step"
    while not train(replace(part, stop_after=0.05), model=small_clip(), progress=False):
        pass
    assert [line["loss"] for line in records(part)] == losses
    whole, cut = weights(run.out), weights(part.out)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(whole["vision.project.weight"], small_clip().vision.project.weight)


def test_the_model_handed_in_is_whole_again(pictures: Path, tmp_path: Path) -> None:
    """Its scale is as learned: saved and loaded, it is the model of the run."""
    model = small_clip()
    run = make_run(pictures, steps=2)
    rehearse(run, model=model)
    assert "logit_scale" in model.state_dict()
    stopped = replace(run, out=run.out + "2", stop_after=1e-9)
    assert not train(stopped, model=model, progress=False)
    assert "logit_scale" in model.state_dict()
    assert train(run, model=model, progress=False)
    save(model, tmp_path / "saved" / "model")
    saved, wrote = weights(str(tmp_path / "saved")), weights(run.out)
    assert all(torch.equal(saved[name], value) for name, value in wrote.items())


def test_a_text_tower_that_is_left_out_stays(pictures: Path) -> None:
    run = make_run(pictures, model=ModelConfig(init="-", learn=("vision",)))
    assert train(run, model=small_clip(), progress=False)
    before, after = dict(small_clip().named_parameters()), weights(run.out)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision"}
    with pytest.raises(ConfigError, match="vsion"):
        make_trainer(replace(run, model=ModelConfig(init="-", learn=("vsion",))), model=small_clip())


def test_a_teachers_embeddings_are_learned(pictures: Path) -> None:
    from perception_encoder.zoo import save

    torch.manual_seed(5)
    save(tower(depth=1, pool=None, output_width=None), pictures.parent / "teacher")
    loss = LossConfig(contrastive=0, teacher=str(pictures.parent / "teacher"), features=1.0, relations=0.1)
    run = make_run(pictures, steps=12, loss=loss)
    run = replace(run, optimizer=replace(run.optimizer, lr=3e-3), model=ModelConfig(init="-", learn=("vision", "feat")))
    assert train(run, model=small_clip(), progress=False)
    losses = [line["loss"] for line in records(run)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ConfigError, match="teacher"):
        LossConfig(features=1.0)


def _two_ranks(rank: int, run: Run, meet: str) -> None:
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=meet)
    torch.set_num_threads(1)
    assert train(run, model=small_clip(), progress=False)


def test_two_processes_are_one(pictures: Path) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    run = make_run(pictures, steps=3)
    run = replace(run, optimizer=replace(run.optimizer, lr=1e-3, eps=1e-4))
    assert train(run, model=small_clip(), progress=False)
    both = replace(run, out=run.out + "-2")
    mp.spawn(_two_ranks, args=(both, port), nprocs=2)
    for one, two in zip(records(run), records(both), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    alone, together = weights(run.out), weights(both.out)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=2e-4, rtol=0)


def test_compiled_blocks_learn_the_same(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(pictures, steps=2)
    assert train(run, model=small_clip(), progress=False)
    compiled = replace(run, out=run.out + "-compiled", engine=EngineConfig(device="cpu", compile=True))
    with watched_compiler(monkeypatch) as graphs:
        assert train(compiled, model=small_clip(), progress=False)
    assert len(graphs) >= 2, "blocks of both towers"
    assert [line["loss"] for line in records(compiled)] == pytest.approx([line["loss"] for line in records(run)])
    named, other = weights(run.out), weights(compiled.out)
    assert named.keys() == other.keys()


@pytest.mark.parametrize("task", ["contrastive", "classify", "spatial"])
def test_bf16_passes(pictures: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """Near the run in float32; losses, the scale and what is kept are in float32 all the same."""
    seen: list[tuple[torch.dtype, float]] = []
    inner = tasks.clip_loss

    def watched(image: Tensor, text: Tensor, scale: Tensor, **how: Any) -> Tensor:
        seen.append((image.dtype, scale.item()))
        return inner(image, text, scale, **how)

    monkeypatch.setattr(tasks, "clip_loss", watched)

    def losses(out: str, precision: Any) -> list[float]:
        run = make_run(pictures, task, steps=2, out=str(pictures.parent / out), loss=LossConfig(layer=1))
        run = replace(run, engine=EngineConfig(device="cpu", precision=precision))
        model = small_clip() if task == "contrastive" else tower(depth=4)
        assert train(run, model=model, progress=False)
        return [line["loss"] for line in records(run)]

    wanted, found = losses("whole", "fp32"), losses("half", "bf16")
    assert found == pytest.approx(wanted, rel=0.02)
    assert not any(torch.tensor(loss).bfloat16().item() == loss for loss in found), "the sum is not of bf16 numbers"
    if task == "contrastive":
        assert [dtype for dtype, _ in seen] == 2 * [torch.float32] + 2 * [torch.bfloat16]
        assert seen[2][1] == pytest.approx(seen[0][1], rel=1e-6), "the scale is not rounded"
    load: Any = load_clip if task == "contrastive" else load_encoder
    saved = load(str(pictures.parent / "half" / "model"), device="cpu")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    assert not all(torch.equal(p, p.bfloat16().float()) for p in saved.parameters()), "kept in float32"


@pytest.mark.parametrize("task", ["contrastive", "classify", "spatial"])
def test_a_checkpoint_is_a_model(pictures: Path, tmp_path: Path, task: str) -> None:
    """What a run ends with is what its newest checkpoint holds, averages first; `perception export` writes it."""
    from perception.cli import build

    model: Any = small_clip() if task == "contrastive" else tower(depth=4)
    save(model, tmp_path / "base")
    init = ModelConfig(init=str(tmp_path / "base"), layer_scale=0.5 if task == "spatial" else None)
    run = make_run(pictures, task, steps=2, average=0.5, model=init, loss=LossConfig(layer=1))
    assert train(run, progress=False)
    load: Any = load_clip if task == "contrastive" else load_encoder
    expected = dict(load(f"{run.out}/model", device="cpu", dtype="fp32").named_parameters())
    found = dict(load_checkpoint(run.out).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    plain = dict(load_checkpoint(run.out, average=False).named_parameters())
    assert not all(torch.equal(plain[name], value) for name, value in expected.items())
    call = CliRunner().invoke(build(), ["export", run.out, str(tmp_path / "written")], catch_exceptions=False)
    assert call.exit_code == 0
    written = dict(load(str(tmp_path / "written"), device="cpu", dtype="fp32").named_parameters())
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    with pytest.raises(ConfigError, match="`perception convert"):
        CliRunner().invoke(build(), ["export", run.out, str(tmp_path / "hf"), "--format", "hf"], catch_exceptions=False)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)


def test_a_rehearsal_leaves_nothing_behind(pictures: Path) -> None:
    run = make_run(pictures)
    found = rehearse(run, model=small_clip())
    assert not Path(run.out).exists()
    assert found["samples"] == 24
    assert found["learn"] == found["parameters"] == sum(p.numel() for p in small_clip().parameters())
    assert found["step"]["loss"] > 0
    broken = small_clip()
    torch.nn.init.constant_(broken.vision.patch_embed.weight, torch.nan)
    with pytest.raises(ConfigError, match="the first step taught nothing: loss nan"):
        rehearse(run, model=broken)


def test_finetuning_a_classifier(pictures: Path) -> None:
    run = make_run(pictures, "classify", steps=20)
    run = replace(run, optimizer=replace(run.optimizer, lr=3e-3, layer_decay=0.7))
    model = tower()
    assert train(run, model=model, progress=False)
    losses = [line["loss"] for line in records(run)]
    assert losses[0] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-4), "the head begins at nothing"
    assert losses[-1] < 0.8 * losses[0]
    folder = Path(run.out) / "model"
    assert json.loads((folder / "head.json").read_text()) == sorted(COLOURS)
    from safetensors.torch import load_file

    saved, head = load_encoder(str(folder), device="cpu"), load_file(folder / "head.safetensors")
    pixels = torch.stack([saved.preprocess(pictures / name / "5.png") for name in sorted(COLOURS)])
    logits = saved.pooled(pixels) @ head["head.weight"].T + head["head.bias"]
    assert (logits.argmax(1) == torch.arange(4)).float().mean() >= 0.75


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_probe_finds_what_is_there_and_chooses_its_strength(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 12, generator=g)
    labels, test_labels = torch.arange(60) % 5, torch.arange(200) % 5
    noise = 3 * torch.randn(60, 40, generator=g), 3 * torch.randn(200, 40, generator=g)
    x = torch.cat([centres[labels] + 0.7 * torch.randn(60, 12, generator=g), noise[0]], 1)
    y = torch.cat([centres[test_labels] + 0.7 * torch.randn(200, 12, generator=g), noise[1]], 1)
    probe = linear_probe(x, labels, y, test_labels, kind=kind, strengths=(1e-6, 1e-2, 0.3, 1e4))
    assert probe.accuracy > 0.6, "chance is 0.2"
    assert probe.accuracy == max(probe.sweep.values())
    assert probe.sweep[1e4] < probe.accuracy, "too strong a hold loses"
    if kind == "ridge":
        assert probe.sweep[1e-6] < probe.accuracy, "52 features and 60 rows: so does too weak a one"
    right = (probe.logits(y).argmax(1) == test_labels).float().mean().item()
    assert right == pytest.approx(probe.accuracy)
    with pytest.raises(ConfigError, match="expected N D"):
        linear_probe(x, labels[:3], y, test_labels)


def test_the_ridge_is_the_formula() -> None:
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)
    probe = linear_probe(x, labels, x, labels, strengths=(0.5,))
    z = (x - x.mean(0)) / x.std(0)
    y = torch.nn.functional.one_hot(labels, 3).float()
    want = torch.linalg.solve(z.T @ z / 30 + 0.5 * torch.eye(4), z.T @ (y - y.mean(0)) / 30)
    torch.testing.assert_close(probe.weight, want.T)
    torch.testing.assert_close(probe.bias, y.mean(0))


# --- towers from towers ----------------------------------------------------------------------------------------------


def test_a_lang_tower_is_the_inner_layer_of_its_core() -> None:
    core, pixels = tower(depth=4), torch.randn(2, 3, 16, 16)
    lang = to_lang(core, drop_last=1, layer_scale=1.0)
    want = core.intermediates(pixels, [2])[0]
    got = lang(pixels)
    assert torch.equal(got.patches, want.patches)
    assert torch.equal(got.prefix, want.prefix)
    assert (lang.config.depth, lang.config.pool, lang.config.norm_post) == (3, None, False)
    published = to_lang(core)
    assert published.config.layer_scale == 0.1
    assert not torch.allclose(published(pixels).patches, want.patches, atol=0.1), "gains of 0.1 change what it says"
    old = dict(core.named_parameters())
    assert all(torch.equal(p, old[name]) for name, p in published.named_parameters() if "gamma" not in name)
    assert not any(p is q for p in lang.parameters() for q in core.parameters())
    with pytest.raises(ConfigError, match="depth=0 of a tower of 4 blocks"):
        to_lang(core, drop_last=4)


def test_self_distillation_moves_the_last_layer_to_an_inner_one(pictures: Path) -> None:
    core, pixels = tower(depth=4), torch.randn(2, 3, 16, 16)
    exact = SelfDistillation(to_lang(core, drop_last=2, layer_scale=None), core, 1)
    assert exact(pixels).item() == pytest.approx(0, abs=1e-6), "the layer itself has nothing to learn"
    assert SelfDistillation(to_spatial(core), core, 1)(pixels).item() > 0.01
    run = make_run(pictures, "spatial", steps=12, loss=LossConfig(layer=1))
    run = replace(run, optimizer=replace(run.optimizer, lr=3e-3))
    assert train(run, model=core, progress=False)
    losses = [line["loss"] for line in records(run)]
    assert losses[-1] < 0.6 * losses[0]
    saved = load_encoder(f"{run.out}/model", device="cpu")
    assert saved.config == to_spatial(core).config
    with pytest.raises(ConfigError, match="no layer 4"):
        SelfDistillation(core, core, 4)


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ConfigError, match="no tar archive"):
        TarPairs(tmp_path / "x.tar")


# --- what a step takes -----------------------------------------------------------------------------------------------


def test_operations_are_counted(pictures: Path) -> None:
    """Against torch's own counter, which leaves attention out on a CPU; a frozen tower costs its forward pass alone."""
    from torch.utils.flop_counter import FlopCounterMode

    core, clip = tower(depth=2), small_clip()
    for module, x, tokens, causal in ((core, torch.randn(3, 3, 16, 16), 17, False), (clip.text, None, 12, True)):
        given = clip.tokenize(["red"] * 3) if x is None else x
        for learns in (True, False):
            module.requires_grad_(learns)
            with FlopCounterMode(display=False) as counter:
                out = module(given) if causal else module(given).patches
                if learns:
                    out.sum().backward()
            depth = len(module.blocks)
            attention = (3 if learns else 1) * 4 * tokens**2 * 32 * depth / (2 if causal else 1)
            counted = 3 * (tower_flops(module, tokens, causal=causal) - attention)
            assert counted == pytest.approx(counter.get_total_flops(), rel=0.08)
    assert vision_flops(core, 16) == tower_flops(core, 17)
    assert vision_flops(core, 16, blocks=1) < 0.6 * vision_flops(core, 16)
    clip.requires_grad_(True)
    wanted = {
        "contrastive": vision_flops(clip.vision, 16) + tower_flops(clip.text, 12, causal=True),
        "classify": vision_flops(tower(depth=2), 16),
        "spatial": vision_flops(tower(depth=2), 16) + vision_flops(core, 16, blocks=1),
    }
    for task, flops in wanted.items():
        model = small_clip() if task == "contrastive" else tower(depth=2)
        made = make_trainer(make_run(pictures, task, loss=LossConfig(layer=0)), model=model, progress=False)
        (batch,) = next(made.data.steps(0)).packs
        assert made.task(batch).flops == 8 * flops, task


# --- a probe by a run file -------------------------------------------------------------------------------------------


def probe_run(pictures: Path, **changes: Any) -> ProbeRun:
    data = LabelsConfig(source=str(pictures), held_out=0.25, workers=2)
    given = {"out": str(pictures.parent / "probe"), "task": "probe", "model": FeaturesConfig(init="-"), "data": data}
    return ProbeRun(**{**given, "batch": 5, **changes})


def test_a_probe_tells_colours_apart(pictures: Path) -> None:
    """By hand: the same rows held out, the same features, the same map."""
    run, core = probe_run(pictures, strengths=(0.5, 50.0)), tower()
    facts = probe(run, tower=core)
    assert (facts["accuracy"], facts["rows"]) == (1.0, {"learned": 18, "validation": 6})
    assert facts["majority"] < 0.6
    found, classes = load_probe(run.out)
    assert classes == sorted(COLOURS)
    assert set(found.sweep) == {0.5, 50.0}
    pairs = FolderPairs(pictures)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        features = core.pooled(torch.stack([core.preprocess(pairs[i].image) for i in order]))
    labels = torch.tensor([classes.index(pairs[i].texts[0]) for i in order])
    wanted = linear_probe(features[6:], labels[6:], features[:6], labels[:6], strengths=run.strengths)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-4, atol=1e-5)
    assert found.logits(features).argmax(1).tolist() == labels.tolist()
    (Path(run.out) / "probe.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no probe"):
        load_probe(run.out)
    with pytest.raises(CheckpointError, match=r"no probe: it lacks probe\.json"):
        load_probe(pictures)


def test_a_probe_of_an_inner_layer_with_rows_of_its_own(pictures: Path, tmp_path: Path) -> None:
    core = tower()
    run = probe_run(pictures, model=FeaturesConfig(init="-", layer=0), kind="logistic", strengths=(1e-2, 1.0))
    other = replace(run, data=replace(run.data, validation=str(pictures)))
    facts = probe(other, tower=core)
    assert facts["rows"] == {"learned": 24, "validation": 24}
    assert set(facts["sweep"]) == {"0.01", "1"}
    assert load_probe(run.out)[0].weight.shape == (4, 32)
    assert rehearse_probe(other, tower=core)["features"] == [5, 32]
    (pictures / "red" / "1.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"1 bad rows, more than data\.max_bad=0\.001"):
        probe(run, tower=core)
    lenient = replace(run, data=replace(run.data, max_bad=0.1))
    assert sum(probe(lenient, tower=core)["rows"].values()) == 23
    with pytest.raises(ConfigError, match="to choose by"):
        probe(replace(lenient, data=replace(lenient.data, held_out=0.999)), tower=core)


def test_the_command_probes(pictures: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from perception.cli import build

    given = ["train-encoder", "probe_nano", f"data.source={pictures}", f"out={tmp_path / 'probe'}", "device=cpu"]
    call = CliRunner().invoke
    seen = json.loads(call(build(), [*given, "--dry-run", "--json"], catch_exceptions=False).stdout)
    assert (seen["samples"], seen["classes"]) == (24, 4)
    assert not (tmp_path / "probe").exists()
    assert "rows that chose the strength; 4 classes" in call(build(), given, catch_exceptions=False).stdout
    found = json.loads(call(build(), [*given, "--json"], catch_exceptions=False).stdout)
    assert found["accuracy"] == 1.0
