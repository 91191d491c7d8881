"""Run files to models: packing, freezing, adapters, stages, several processes."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from training_tiny import (
    TOKENIZER,
    Colours,
    one_thread,  # noqa: F401  every test here runs with it
    tiny_assistant,
    tiny_run,
    turns,
    watched_compiler,
    write_rows,
)

import perception_lm as plm
from perception.errors import CheckpointError, ConfigError, MissingExtra
from perception.training.distributed import EngineConfig
from perception.training.metrics import read_metrics
from perception.training.state import Checkpoints, KeepConfig
from perception.training.trainer import Stopped
from perception_encoder.checkpoints import save as save_tower
from perception_encoder.config import VisionConfig
from perception_encoder.training.recipes import adapt_tower
from perception_encoder.vision import VisionTransformer
from perception_lm.config import DecoderConfig
from perception_lm.losses import IGNORE
from perception_lm.training import load_checkpoint, load_run, make_trainer, rehearse, run_names, train
from perception_lm.training.examples import Examples, Pack, join, pad
from perception_lm.training.flops import Flops
from perception_lm.training.freeze import learn_only
from perception_lm.training.lora import add_lora, apply_adapter, merge, targets
from perception_lm.training.rows import read_row
from perception_lm.training.run import DataConfig, LoraConfig, ModelConfig, Run, ScheduleConfig, _weights
from perception_lm.training.sources import SourceConfig
from perception_lm.training.task import AnswerTask
from perception_lm.training.tower import DropPath, add_drop_path

PROCESS = Path(__file__).parents[1] / "training_process.py"
RED = Image.new("RGB", (30, 20), (220, 30, 30))


def run_here(run: Run, **given: Any) -> bool:
    return train(run, assistant=tiny_assistant(), sources={"colours": Colours()}, **given)


def losses(out: Path | str) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


# --- packing --------------------------------------------------------------------------------------------------------


def test_packed_as_if_each_were_alone() -> None:
    """Loss and every gradient; and what one document says is nothing to the others."""
    assistant = tiny_assistant()
    make = Examples(processor=assistant.processor, seq_len=160)
    examples = [make(read_row(Colours()[i])) for i in range(6)]
    assert sum(example.pixels is not None for example in examples) == 5
    task = AnswerTask(assistant.model)

    def gradients(packs: list[Pack]) -> tuple[float, dict[str, torch.Tensor]]:
        task.zero_grad()
        found = [task(pack) for pack in packs]
        total = sum(loss.total for loss in found)
        total.backward()  # type: ignore[union-attr]
        return float(total.detach()), {name: p.grad.clone() for name, p in task.named_parameters()}  # type: ignore[union-attr]

    alone, wanted = gradients([join([example]) for example in examples])
    for packs in ([join(examples)], [pad(examples, 160, 434)], [join(examples[:2]), join(examples[2:])]):
        total, found = gradients(packs)
        assert total == pytest.approx(alone, rel=1e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=2e-4, atol=2e-5, msg=name)
    other = [replace(examples[0], tokens=examples[0].tokens.clone()), *examples[1:]]
    other[0].tokens[0] = 7
    silent = [replace(other[0], labels=torch.full_like(other[0].labels, IGNORE)), *examples[1:]]
    same = [replace(examples[0], labels=silent[0].labels), *examples[1:]]
    assert task(join(silent)).total.item() == task(join(same)).total.item()


@pytest.mark.parametrize("data", [{"tokens": 160}, {"layout": "padded", "rows": 2}, {"ahead": True, "workers": 1}])
def test_passes_change_nothing_but_the_rounding(tmp_path: Path, data: dict[str, Any]) -> None:
    """Accumulated over tokens, not over passes: a short one counts for what it holds."""
    run_here(tiny_run(tmp_path / "a", steps=2))
    run = tiny_run(tmp_path / "b", steps=2)
    run_here(replace(run, data=replace(run.data, **data)))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)


def test_recomputed_blocks_give_the_same(tmp_path: Path) -> None:
    run_here(tiny_run(tmp_path / "a", steps=2))
    run_here(tiny_run(tmp_path / "b", steps=2, engine=EngineConfig(checkpointing=True)))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_text_goes_through_every_part_where_parts_are_shared() -> None:
    """One process with pictures and one without must ask for the same parameters; the loss is that of the text."""
    assistant = tiny_assistant()
    text = Examples(processor=assistant.processor, seq_len=160)(read_row({"conversations": turns("yes")}))
    alone, shared = (AnswerTask(assistant.model, together=together) for together in (False, True))
    wanted = alone(join([text])).total
    assert shared(join([text])).total.item() == wanted.item()
    wanted.backward()
    assert assistant.model.projector.fc1.weight.grad is None
    shared(join([text])).total.backward()
    for part in (assistant.model.projector.fc1.weight, assistant.model.encoder.patch_embed.weight):
        assert part.grad is not None
        assert not part.grad.any()


def test_text_teaches_nothing_where_the_decoder_is_frozen() -> None:
    """Alone in a pass it would have no graph to go back through. The loss is that of the text, every gradient zero."""
    assistant = tiny_assistant()
    pack = join([Examples(processor=assistant.processor, seq_len=160)(read_row({"conversations": turns("yes")}))])
    task = AnswerTask(assistant.model)
    wanted = task(pack).total.item()
    for parts in (("projector",), ("encoder",), ("encoder", "projector")):
        learned = learn_only(assistant.model, parts)
        task.zero_grad()
        total = task(pack).total
        total.backward()
        assert total.item() == wanted
        assert not any(p.grad.any() for n, p in assistant.model.named_parameters() if n in learned)
        with torch.no_grad(), no_picture(assistant):
            assert task(pack).total.item() == wanted


@contextmanager
def no_picture(assistant: plm.Assistant) -> Iterator[None]:
    """Nothing goes through the tower."""
    tower = assistant.model.encoder
    handle = tower.register_forward_pre_hook(lambda *_: pytest.fail("a picture went through the tower"))
    yield
    handle.remove()


class Foreign(nn.Module):
    """A tower that does not say the size of its pictures, as those of other libraries."""

    def __init__(self, tower: Any):
        super().__init__()
        self.inner, self.width, self.patch_size = tower, tower.width, tower.patch_size

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.inner(pixels)


def test_text_through_a_tower_of_another_library(tmp_path: Path) -> None:
    assistant = tiny_assistant()
    pack = join([Examples(processor=assistant.processor, seq_len=160)(read_row({"conversations": turns("yes")}))])
    wanted = AnswerTask(assistant.model)(pack).total.item()
    assistant.model.encoder = Foreign(assistant.model.encoder)
    assert AnswerTask(assistant.model, together=True, tile=24)(pack).total.item() == wanted
    task = make_trainer(tiny_run(tmp_path), assistant=assistant, sources={"colours": Colours()}).task
    assert task.tile == assistant.processor.media.tile == 24


def test_compiled_blocks_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(tiny_run(tmp_path / "plain", steps=2))
    with watched_compiler(monkeypatch) as graphs:
        run_here(tiny_run(tmp_path / "compiled", steps=2, engine=EngineConfig(device="cpu", compile=True)))
    assert len(graphs) >= 2, "blocks of the tower and of the decoder"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    kept = [load_checkpoint(tmp_path / name).model.state_dict() for name in ("plain", "compiled")]
    assert kept[0].keys() == kept[1].keys()


@pytest.mark.parametrize("engine", [{"precision": "bf16"}, {"shard": "full", "checkpointing": True}])
def test_one_process_with_sharded_parameters(tmp_path: Path, engine: dict[str, Any]) -> None:
    """How bf16 passes keep float32 weights; what is saved is float32, and goes on without."""
    run_here(tiny_run(tmp_path / "a", steps=3))
    run_here(tiny_run(tmp_path / "b", steps=2, engine=EngineConfig(**engine)))
    wanted = losses(tmp_path / "a")
    near = 0.02 if "precision" in engine else 1e-6
    assert losses(tmp_path / "b") == pytest.approx(wanted[:2], rel=near)
    assert load_checkpoint(tmp_path / "b").model.decoder.norm.weight.dtype == torch.float32
    run_here(tiny_run(tmp_path / "b", steps=3))
    assert losses(tmp_path / "b") == pytest.approx(wanted, rel=near)


# --- the whole way --------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_model_that_answers(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", steps=12, average=0.5, export=("native", "hf"), keep=KeepConfig(steps=5))
    lines: list[dict[str, Any]] = []
    assert run_here(run, after_step=lambda trainer, line: lines.append(line))
    assert losses(run.out)[-1] < 0.8 * losses(run.out)[0]
    assert {"tokens_s", "samples_s", "data_s", "tflops", "memory", "lr", "grad_norm"} <= set(lines[0])
    assert [line["position"] for line in lines] == [6 * step for step in range(1, 13)]
    answers = [
        model.ask(RED, "What?", max_new_tokens=6)
        for model in (
            plm.load(tmp_path / "run" / "model"),
            plm.load(tmp_path / "run" / "model-hf"),
            load_checkpoint(run.out),
        )
    ]
    assert answers[0] == answers[1] == answers[2]
    assert plm.load(tmp_path / "run" / "model").processor.media.tiling == "vanilla"
    now, mean = (load_checkpoint(run.out, average=average).model.projector.fc1.weight for average in (False, True))
    assert not torch.equal(now, mean)
    assert load_checkpoint(run.out, dtype=torch.bfloat16).model.projector.fc1.weight.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)


def test_one_step_to_see_what_a_run_would_need(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", model=ModelConfig(init="unused", learn=("projector",)))
    found = rehearse(run, assistant=tiny_assistant(), sources={"colours": Colours()})
    assert found["parts"]["projector"]["learn"] == found["parts"]["projector"]["parameters"] > 0
    assert found["parts"]["decoder"]["learn"] == 0
    assert sum(p["samples"] for p in found["passes"]) == 6
    assert found["step"]["loss"] > 0
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with pytest.raises(ConfigError, match="no data"):
        make_trainer(run, assistant=tiny_assistant())
    with pytest.raises(ConfigError, match=r"data\.mix names \['b'\]; there are \['colours'\]"):
        run_here(replace(run, data=replace(run.data, mix={"b": 1.0})))
    with pytest.raises(ConfigError, match="one of the two"):
        make_trainer(replace(run, model=ModelConfig()), sources={"colours": Colours()})


def test_the_three_stages_at_the_size_of_a_toy(tmp_path: Path) -> None:
    """A tower and a fresh decoder; then the projector alone, unpooled; then all, pooled and with gains."""
    vision = VisionConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_width=32)
    save_tower(VisionTransformer(vision), tmp_path / "tower")
    words = plm.LlamaTokenizer.from_file(TOKENIZER)
    sizes = DecoderConfig(width=24, depth=2, heads=2, kv_heads=1, mlp_width=32, vocab=words.vocab, context=600)
    RED.save(tmp_path / "red.png")
    rows = write_rows(tmp_path, [{"image": "red.png", "text": f"red {i}"} for i in range(12)])
    data = DataConfig(sources={"rows": SourceConfig(rows=str(rows))}, seq_len=200, tiling="vanilla")
    one = tiny_run(
        tmp_path / "one",
        steps=2,
        model=ModelConfig(
            encoder=str(tmp_path / "tower"), decoder=sizes, tokenizer=str(TOKENIZER),
            image_size=24, depth=2, pool=1, learn=("projector",),
        ),
        data=replace(data, form="warmup"),
        export=("native",),
    )  # fmt: skip
    assert train(one)
    first = plm.load(tmp_path / "one" / "model")
    assert (first.processor.slots, first.model.projector.pool, len(first.model.encoder.blocks)) == (36, 1, 2)
    two = tiny_run(
        tmp_path / "two",
        steps=2,
        model=ModelConfig(init=str(tmp_path / "one" / "model"), layer_scale=0.1, drop_path=0.1, pool=2),
        data=data,
        export=("native", "original"),
    )
    assert train(two)
    second = plm.load(tmp_path / "two" / "model-original")
    assert (second.processor.slots, second.model.encoder.config.layer_scale) == (9, 0.1)
    assert second.model.encoder.blocks[0].ls1.gamma.std() > 0
    assert second.ask(RED, "What?", max_new_tokens=3) == plm.load(tmp_path / "two" / "model").ask(
        RED, "What?", max_new_tokens=3
    )


# --- parts ----------------------------------------------------------------------------------------------------------


def test_what_is_frozen_does_not_move(tmp_path: Path) -> None:
    assistant = tiny_assistant()
    before = {name: p.clone() for name, p in assistant.model.named_parameters()}
    run = tiny_run(tmp_path, steps=3, model=ModelConfig(init="unused", learn=("projector", r"decoder\.norm\..*")))
    train(run, assistant=assistant, sources={"colours": Colours()})
    moved = {name for name, p in assistant.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"projector.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")} | {"decoder.norm.weight"}
    for parts, message in (((), "nothing would learn"), (("head",), "matches no parameter"), (("(",), "no part and")):
        with pytest.raises(ConfigError, match=message):
            learn_only(assistant.model, parts)


def test_a_tower_is_cut_stretched_and_scaled() -> None:
    config = VisionConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_width=32)
    tower = VisionTransformer(config).eval()
    nn.init.normal_(tower.pos_embed)
    new = adapt_tower(tower, image_size=24, depth=2, layer_scale=0.1).eval()
    assert (new.config.image_size, new.config.depth, new.config.layer_scale, new.config.pool) == (24, 2, 0.1, None)
    assert torch.equal(new.pos_embed, tower.positions(6, 6))
    for block in new.blocks:
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(new(pixels).patches, tower.intermediates(pixels, [1])[0].patches)
    with pytest.raises(ConfigError, match="depth=4 of a tower of 3"):
        adapt_tower(tower, depth=4)


def test_stochastic_depth() -> None:
    config = VisionConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, mlp_width=32, layer_scale=0.5)
    tower = VisionTransformer(config).eval()
    names, pixels = list(tower.state_dict()), torch.randn(4, 3, 8, 8)
    before = tower(pixels).patches
    add_drop_path(tower, 0.5)
    assert list(tower.state_dict()) == names
    assert torch.equal(tower.eval()(pixels).patches, before)
    assert not torch.equal(tower.train()(pixels).patches, before)
    torch.manual_seed(0)
    kept = DropPath(0.25, nn.Identity()).train()(torch.ones(4000, 3))
    assert set(kept.unique().tolist()) == {0.0, kept.max().item()}
    assert kept.max().item() == pytest.approx(1 / 0.75)
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert (kept.std(1) == 0).all()
    for wrong, rate in ((tower, 1.0), (nn.Identity(), 0.1)):
        with pytest.raises(ConfigError, match="drop_path"):
            add_drop_path(wrong, rate)


def test_operations_are_counted() -> None:
    """Against torch's own counter, forward and backward; a frozen tower costs its forward pass alone."""
    from torch.utils.flop_counter import FlopCounterMode

    assistant = tiny_assistant()
    make = Examples(processor=assistant.processor, seq_len=160)
    pack = join([make(read_row(Colours()[i])) for i in range(1)])
    for parts in (("encoder", "projector", "decoder"), ("projector",)):
        learn_only(assistant.model, parts)
        task = AnswerTask(assistant.model)
        with FlopCounterMode(display=False) as counter:
            task(pack).total.backward()
        flops, n = Flops(assistant.model), len(pack.tokens[0])
        # 48 and 24 channels, 2 blocks each; causal pairs are half. torch does not count attention on a CPU.
        assert flops.squared * n * n == 3 * 4 * 48 * 2 * n * n / 2
        assert flops.item_squared == (3 if "encoder" in parts else 1) * 4 * 24 * 2
        flops.squared = flops.item_squared = 0
        # Ours leave out the class token, torch's the gradient of the head, which is added in place.
        assert flops(pack) == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_run_files_of_the_published_stages() -> None:
    published = {
        "stage1": (8000, 512, 20, 1280, "warmup", "vanilla", 1, 8),
        "stage2": (35000, 2048, 120, 6144, "chat", "thumb+tile", 16, 16),
        "stage3": (21000, 1024, 120, 11520, "chat", "thumb+tile", 36, 32),
    }
    for size in ("1b", "3b", "8b"):
        for stage, expected in published.items():
            run = load_run(f"plm_{size}_{stage}")
            data = run.data
            shown = (data.seq_len, data.form, data.tiling, data.max_tiles, data.frames)
            assert (run.steps, run.batch, run.schedule.warmup, *shown) == expected
            lr = {"stage1": 1e-4, "stage2": 4e-5, "stage3": 1e-5 if size == "8b" else 4e-5}[stage]
            decay = 0.05 if size == "8b" else 0.01
            assert (run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.clip, run.schedule.floor) == (
                lr, decay, 1.0, 0.01,
            )  # fmt: skip
            assert (run.seed, run.engine.precision, run.engine.checkpointing, run.keep) == (
                777, "bf16", True, KeepConfig(steps=500, keep=1),
            )  # fmt: skip
            assert (run.model.learn == ("projector",)) == (stage == "stage1")
            assert run.model.drop_path == (0.0 if stage == "stage1" else 0.1)
    assert {f"plm_{size}_{stage}" for size in ("1b", "3b", "8b") for stage in published} <= set(run_names())
    assert load_run("plm_1b_stage1").model.depth == 23
    assert (load_run("plm_8b_stage1").model.depth, load_run("plm_8b_stage1").model.plain_rope) == (47, True)
    assert load_run("plm_1b_stage2", ["model.pool=1", "out=x"]).model.pool == 1
    numbers = ("steps=0", "batch=0", "log_every=0", "patience=0")
    for override in (*numbers, "schedule.warmup=21000", "data.max_bad=2", "data.tokens=5"):
        with pytest.raises(ConfigError):
            load_run("plm_1b_stage3", [override])
    with pytest.raises(ConfigError, match=r"no run file at plm_2b_stage1; those of the package are .*plm_1b_stage1,"):
        load_run("plm_2b_stage1")
    assert ScheduleConfig().kind == "cosine"


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.clip=-1", "optimizer.lr=-1", "optimizer.lr=nan", "optimizer.weight_decay=-0.1", "optimizer.eps=-1",
        "optimizer.betas=[0.9, 1.0]", "optimizer.rates={decoder = -2}", "schedule.floor=2", "schedule.decay=-1",
        "schedule.warmup=-1", "lora.rank=0", "lora.alpha=0", "lora.dropout=1", "lora.targets=[]", "average=7",
        "stop_after=-1", "data.max_tiles=0", "data.frames=0", "data.tokens=-1",
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(override: str) -> None:
    targets = ["lora.targets=['q']"] if override.startswith("lora") else []
    with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0])):
        load_run("nano_stage3", [*targets, override])


def test_a_key_of_the_adapters_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"lora has unknown keys \['ranks'\]; LoraConfig has"):
        load_run("nano_stage3", ["lora.targets=['q']", "lora.ranks=4"])


def test_every_row_is_too_long(tmp_path: Path) -> None:
    """No run that learned nothing is a finished one, and none is approved."""
    run = tiny_run(tmp_path / "run", steps=3, data=DataConfig(seq_len=8), export=("native",))
    with pytest.raises(Stopped, match=r"in 3 of 3 steps: 18 samples too long, such as Colours\[\d+\]: .*seq_len is 8"):
        run_here(run)
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ConfigError, match=r"the first step taught nothing: 6 samples too long, such as .*seq_len is 8"):
        rehearse(run, assistant=tiny_assistant(), sources={"colours": Colours()})


def test_rows_that_are_all_bad_are_not_approved(tmp_path: Path) -> None:
    rows = [{"image": f"gone{i}.png", "text": "red"} for i in range(6)]
    with pytest.raises(ConfigError, match=r"the first step taught nothing: list\[\d\]: .*gone"):
        rehearse(tiny_run(tmp_path), assistant=tiny_assistant(), sources={"rows": rows})


# --- adapters -------------------------------------------------------------------------------------------------------

LORA = LoraConfig(targets=(r"decoder\.blocks\..*\.attn\.[qv]",), rank=2, alpha=8.0)


def test_adapters_go_where_they_are_told() -> None:
    """A suffix such as "q" must not reach another part: names match from end to end."""
    model = tiny_assistant().model
    found = targets(model, LORA.targets)
    assert found == [f"decoder.blocks.{i}.attn.{m}" for i in range(2) for m in "qv"]
    for wrong in ("q", "attn.q", "decoder", "("):
        with pytest.raises(ConfigError, match=r"lora\.targets"):
            targets(model, (wrong,))
    pytest.importorskip("peft")
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert add_lora(model, LORA) == found
    merge(model)
    assert dict.fromkeys(before, True) == {n: torch.equal(p, before[n]) for n, p in model.named_parameters()}


@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_is_learned_saved_loaded_and_merged(tmp_path: Path, frozen: bool) -> None:
    pytest.importorskip("peft")
    tiny_assistant().save(tmp_path / "base")
    run = tiny_run(
        tmp_path / "run",
        steps=3,
        model=ModelConfig(init=str(tmp_path / "base"), learn=("projector",)),
        lora=LORA,
        save_frozen=frozen,
        export=("native",),
    )
    assert train(run, sources={"colours": Colours()})
    base, adapted, merged = (
        dict(plm.load(path).model.named_parameters())
        for path in (tmp_path / "base", tmp_path / "run" / "adapter", tmp_path / "run" / "model")
    )
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"decoder.blocks.{i}.attn.{m}.weight" for i in range(2) for m in "qv"} | {
        f"projector.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    for name, parameter in adapted.items():
        torch.testing.assert_close(parameter, merged[name], rtol=1e-6, atol=1e-7)
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    resumed = replace(run, steps=5)
    assert train(resumed, sources={"colours": Colours()})
    assert len(losses(run.out)) == 5


def test_an_adapter_is_put_on_the_model_it_was_trained_on(tmp_path: Path) -> None:
    """The run cut the tower, pooled more and showed media another way: an adapter alone does so, too."""
    pytest.importorskip("peft")
    tiny_assistant().save(tmp_path / "base")
    run = tiny_run(
        tmp_path / "run",
        steps=2,
        model=ModelConfig(init=str(tmp_path / "base"), learn=("projector",), depth=1, layer_scale=0.5, pool=1),
        lora=LORA,
        export=("native",),
    )
    assert train(run, sources={"colours": Colours()})
    adapted, merged = (plm.load(tmp_path / "run" / name) for name in ("adapter", "model"))
    assert adapted.processor.media == merged.processor.media != plm.load(tmp_path / "base").processor.media
    assert adapted.model.projector.pool == merged.model.projector.pool == 1
    expected = dict(merged.model.named_parameters())
    found = dict(adapted.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-7)
    (tmp_path / "run" / "adapter" / "perception.json").write_text('{"changes": [1]}')
    with pytest.raises(ConfigError, match=r"perception.json: changes is \[1\]; expected a table"):
        plm.load(tmp_path / "run" / "adapter")


@pytest.mark.parametrize("save_frozen", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_learns_beside_adapters_is_float32(tmp_path: Path, precision: Any, save_frozen: bool) -> None:
    """Published weights are bf16: frozen they may stay so, where passes are; steps are too small for what learns."""
    pytest.importorskip("peft")
    base = tiny_assistant()
    base.model.bfloat16()
    base.save(tmp_path / "base")
    run = tiny_run(
        tmp_path / "run",
        steps=2,
        model=ModelConfig(init=str(tmp_path / "base"), learn=("projector",)),
        lora=LORA,
        engine=EngineConfig(precision=precision),
        save_frozen=save_frozen,
        export=("native",),
    )
    made = make_trainer(run, sources={"colours": Colours()})
    assert {p.dtype for p in made.learned.values()} == {torch.float32}
    frozen = {p.dtype for name, p in made.task.named_parameters() if name not in made.learned}
    assert frozen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert train(run, sources={"colours": Colours()})
    found = load_checkpoint(run.out).model
    learned = found.projector.fc1.weight
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert not torch.equal(learned, base.model.projector.fc1.weight.float())
    assert not torch.equal(learned, learned.bfloat16().float()), "it was rounded on the way"
    merged = found.decoder.blocks[0].attn.q.weight
    assert not torch.equal(merged, merged.bfloat16().float())
    adapted = plm.load(tmp_path / "run" / "adapter", dtype="float32").model
    torch.testing.assert_close(adapted.decoder.blocks[0].attn.q.weight, merged, rtol=1e-6, atol=1e-7)
    assert torch.equal(plm.load(tmp_path / "run" / "model", dtype="stored").model.projector.fc1.weight, learned)


def test_adapters_beside_a_torchvision_that_cannot_be_loaded(tmp_path: Path) -> None:
    """peft would import it by way of transformers; it stays as it was for everybody else."""
    pytest.importorskip("peft")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms is not there')"
    )
    code = "from perception_lm.training.lora import _peft; print(_peft().LoraConfig.__name__); import torchvision"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.stdout == "LoraConfig\n", done.stderr
    assert done.stderr.splitlines()[-1] == "RuntimeError: operator torchvision::nms is not there"


def test_a_peft_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr("perception_lm.training.lora.import_module", refuse)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(MissingExtra, match=r"peft is broken\); pip install 'perception-vision\[train\]'"):
        add_lora(tiny_assistant().model, LORA)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tiny_assistant().save(tmp_path / "base")
    run = tiny_run(tmp_path / "run", steps=1, model=ModelConfig(init=str(tmp_path / "base"), learn=()), lora=LORA)
    assert train(replace(run, export=("native",)), sources={"colours": Colours()})
    folder = tmp_path / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    model = tiny_assistant().model
    apply_adapter(model, folder)
    for change, message in (
        ({"peft_type": "IA3"}, "expected plain LORA"),
        ({"use_dora": True}, "expected plain LORA"),
        ({"r": "two"}, "expected numbers"),
        ({"base_model_name_or_path": None}, "does not name the model"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            plm.load(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    other = tiny_assistant().model
    other.decoder.blocks[0].attn.q = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="another model"):
        apply_adapter(other, folder)


# --- processes ------------------------------------------------------------------------------------------------------


def start(out: Path, ranks: int = 1, **settings: Any) -> list[subprocess.Popen[str]]:
    """The processes of a tiny run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(PROCESS), str(out), json.dumps(settings)]
        pipe = subprocess.PIPE
        found.append(subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe))
    return found


def finish(processes: list[subprocess.Popen[str]], timeout: float = 200) -> list[tuple[int, str]]:
    """Exit code and what was said, of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out + err) for process, (out, err) in zip(processes, said, strict=True)]


def test_f121_two_processes_as_one(tmp_path: Path) -> None:
    """The same curve; saved by two, continued by one; saved by one, continued by two.

    One has more pictures than the other, and more than go through the tower at a time elsewhere: they still meet.
    """
    assert run_here(tiny_run(tmp_path / "one", steps=4))
    wanted = losses(tmp_path / "one")
    assert run_here(tiny_run(tmp_path / "mixed", steps=1))
    ended = finish(start(tmp_path / "mixed", ranks=2, steps=3, media_chunk=1))
    assert [code for code, _ in ended] == [0, 0], ended
    assert Checkpoints(tmp_path / "mixed" / "checkpoints").steps()[-1] == 3
    assert run_here(tiny_run(tmp_path / "mixed", steps=4))
    assert losses(tmp_path / "mixed") == pytest.approx(wanted, rel=1e-6)
    assert [line["samples"] for line in read_metrics(tmp_path / "mixed")] == [6] * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_copies_of_sharded_parameters(tmp_path: Path) -> None:
    """HSDP: two copies of one shard each, on one machine."""
    assert run_here(tiny_run(tmp_path / "one", steps=3))
    ended = finish(start(tmp_path / "two", ranks=2, steps=3, engine={"shard": "hybrid", "replicas": 2}))
    assert [code for code, _ in ended] == [0, 0], ended
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f129_one_process_dies(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = finish(start(tmp_path, ranks=2, steps=50, die_at=2, engine={"timeout": 20.0}))
    assert ended[1][0] == 3
    assert ended[0][0] not in (0, None)
    assert time.monotonic() - began < 120


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_f120_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9, again and again: the curve is that of a run nobody touched, bit for bit."""
    settings = {"steps": 40, "keep": {"steps": 1}}
    assert finish(start(tmp_path / "whole", **settings))[0][0] == 0
    step = read_metrics(tmp_path / "whole")[-1]["seconds"] / 40  # with its checkpoint
    seed = time.time_ns()
    sys.stdout.write(f"random.Random({seed})\n")  # shown where it fails
    draw = random.Random(seed)
    for moment in [draw.uniform(0, 5) for _ in range(5)]:  # steps after its first
        (process,) = start(tmp_path / "killed", **settings)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment * step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert finish(start(tmp_path / "killed", **settings))[0][0] == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f128_sigterm_saves_and_ends_well(tmp_path: Path) -> None:
    for ranks in (1, 2):
        processes = start(tmp_path / str(ranks), ranks=ranks, steps=10_000)
        assert processes[0].stdout is not None
        for _ in range(3):
            processes[0].stdout.readline()
        processes[-1].send_signal(signal.SIGTERM)  # to one: all of them stop
        ended = finish(processes)
        assert [code for code, _ in ended] == [0] * ranks, ended
        assert "stopped" in ended[0][1]
        assert Checkpoints(tmp_path / str(ranks) / "checkpoints").steps()


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from perception.cli import build

    tiny_assistant().save(tmp_path / "base")
    rows = write_rows(tmp_path, [{"conversations": turns(f"yes {i}")} for i in range(8)])
    file = tmp_path / "run.toml"
    file.write_text(
        f'''out = "{tmp_path / "out"}"
steps = 2
batch = 2
[model]
init = "{tmp_path / "base"}"
[data]
seq_len = 160
sources.rows = {{ rows = "{rows}" }}
'''
    )
    call = CliRunner().invoke
    found = json.loads(call(build(), ["train", str(file), "--dry-run", "--json"], catch_exceptions=False).stdout)
    assert found["parts"]["encoder"]["learn"] > 0
    assert not (tmp_path / "out").exists()
    assert "one step: loss" in call(build(), ["train", str(file), "--dry-run"], catch_exceptions=False).stdout
    done = call(build(), ["train", str(file), "steps=3", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout) == {"out": str(tmp_path / "out"), "finished": True}
    assert len(losses(tmp_path / "out")) == 3
    call(build(), ["export", str(tmp_path / "out"), str(tmp_path / "hf"), "--format", "hf"], catch_exceptions=False)
    trained = plm.load(tmp_path / "out" / "model")
    assert torch.equal(plm.load(tmp_path / "hf").model.projector.fc1.weight, trained.model.projector.fc1.weight)
    assert "plm_1b_stage1" in call(build(), ["train", "--list"], catch_exceptions=False).stdout
    for wrong in ("stepz=3", "model.pool=0", "keep.steps=-1", "engine.threads=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0].split(".")[-1]):
            call(build(), ["train", str(file), wrong], catch_exceptions=False)
    for more in (["--dry-run"], []):
        assert call(build(), ["train", str(file), f"out={tmp_path / 'none'}", "data.seq_len=3", *more]).exit_code == 1
    assert not (tmp_path / "none" / "model").exists()


def test_weights_of_some_sources_alone_are_refused() -> None:
    """One that has a weight of 3 beside one that counts as its million samples would never be seen."""
    data = DataConfig(sources={"a": SourceConfig(rows="a", weight=3.0), "b": SourceConfig(rows="b")})
    with pytest.raises(ConfigError, match="no weight for b, where other sources have one"):
        _weights(data, {"a": [1, 2], "b": [1] * 5})
    assert _weights(replace(data, mix={"b": 2.0}), {"a": [1, 2], "b": [1] * 5}) == [3.0, 2.0]
    none = DataConfig(sources={"a": SourceConfig(rows="a"), "b": SourceConfig(rows="b")})
    assert _weights(none, {"a": [1, 2], "b": [1] * 5}) == [2.0, 5.0]
