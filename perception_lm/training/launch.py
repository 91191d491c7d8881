"""What `perception train` does."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perception.cli import table
from perception.training.distributed import processes
from perception_lm.assistant import Assistant
from perception_lm.training.export import write_models
from perception_lm.training.run import Run, make_trainer

log = logging.getLogger(__name__)


def train(
    run: Run,
    *,
    assistant: Assistant | None = None,
    sources: Mapping[str, Any] | None = None,
    after_step: Any = None,
    progress: bool | None = None,
) -> bool:
    """Train to the end of a run, from its newest checkpoint if it was begun before. False when it was told to stop.

    assistant   a model to start from, in place of the run file's; it is changed
    sources     name -> samples, beside those of the run file: lists of rows, or objects asked by number
    after_step  called with the trainer and the record's line after every step
    progress    whether to show a bar; where there is a terminal when not given

    At the end the model is in `out/model` (and `out/adapter`). Raises what `make_trainer` and `Trainer.run` raise.
    """
    with processes(run.engine) as world:
        trainer = make_trainer(
            run, world, assistant=assistant, sources=sources, after_step=after_step, progress=progress
        )
        described = trainer.facts["model"] is not None
        if run.export and not described and world.first:
            log.warning("this model has foreign parts: its checkpoints stay, and %s are not written", list(run.export))
        done = trainer.run()
        if done and run.export and described:
            for folder in write_models(trainer, run):
                log.info("written: %s", folder)
        return done


def rehearse(
    run: Run, *, assistant: Assistant | None = None, sources: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One step of a run in a folder of its own that is thrown away: shapes, parameters, memory, time.

    Raises ConfigError when nothing was learned in it.
    """
    import tempfile

    with processes(run.engine) as world, tempfile.TemporaryDirectory() as folder:
        shared = world.same(folder)
        trial = replace(run, out=str(Path(shared) / "run"))
        trainer = make_trainer(trial, world, assistant=assistant, sources=sources, progress=False)
        parts: dict[str, dict[str, int]] = {}
        for name, p in trainer.task.named_parameters():
            part = parts.setdefault(name.removeprefix("model.").split(".")[0], {"parameters": 0, "learn": 0})
            part["parameters"] += p.numel()
            part["learn"] += p.numel() * p.requires_grad
        passes = []

        def watched(steps: Any) -> Any:
            for step in steps:
                packs = list(step.packs)
                passes.extend(packs)
                yield replace(step, packs=iter(packs))

        line = trainer.rehearse(watched(trainer.data.steps(0)))
        return {
            "out": run.out,
            "processes": world.size,
            "device": str(world.device),
            "parts": parts,
            "passes": [
                {
                    "tokens": list(pack.tokens.shape),
                    "samples": len(pack.lengths),
                    "learned": pack.learned,
                    "pixels": None if pack.pixels is None else list(pack.pixels.shape),
                }
                for pack in passes
            ],
            "step": line,
        }


def summary(found: dict[str, Any]) -> str:
    """What `rehearse` found, for people."""
    parts = [[name, f"{p['parameters']:,}", f"{p['learn']:,}"] for name, p in found["parts"].items()]
    passes = [
        [str(p["tokens"]), str(p["samples"]), str(p["learned"]), str(p["pixels"] or "none")]
        for p in found["passes"][:8]
    ]
    step = found["step"]
    speed = f"{step['step_s']:.2f} s, {step['tokens_s']:.0f} tokens/s, {step['memory'] / 2**30:.2f} GiB at most"
    return "\n\n".join(
        (
            f"{found['processes']} process(es) on {found['device']}",
            table(parts, ["part", "parameters", "learn"]),
            table(passes, ["tokens of a pass", "samples", "learned", "pixels"]),
            f"one step: loss {step['loss']:.4f}, gradient {step['grad_norm']:.3f}, {speed}",
        )
    )
