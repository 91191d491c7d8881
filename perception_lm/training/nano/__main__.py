"""All of PLM-nano's training, in order; begun again after a stop, it goes on where it was.

python -m perception_encoder.training.drawings --out runs/data     # once: emoji and words
python -m perception_lm.training.nano --data runs/data --out runs/plm_nano

Each stage is a run file of its own (`perception train nano_stage2`); this fills in the folders and hands one stage's
model to the next. SIGTERM and SIGINT save first.
"""

import argparse
import logging
from pathlib import Path

import torch

from perception_lm.training.launch import train
from perception_lm.training.nano.build import build_start
from perception_lm.training.run import Run, load_run
from perception_lm.zoo import load

log = logging.getLogger(__name__)
STAGES = ("stage1", "stage2", "stage3")
NAME = "PLM-nano"


def stage(name: str, data: Path, out: Path, overrides: tuple[str, ...] = ()) -> Run:
    """The run of a stage, with its folders filled in."""
    before = out / ("start" if name == STAGES[0] else f"{STAGES[STAGES.index(name) - 1]}/model")
    plain = load_run(f"nano_{name}")
    folders = [f"out={out / name}", f"model.init={before}"]
    folders += [f"data.sources.{source}.options.data={data}" for source in plain.data.sources]
    return load_run(f"nano_{name}", [*folders, *overrides])


def finish(trained: Path, folder: Path) -> None:
    """A trained model as it is given away: in float16."""
    assistant = load(trained, device="cpu", dtype="float32")
    assistant.model.half()
    assistant.save(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="perception_lm.training.nano"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/plm_nano"))
    parser.add_argument("--tower", default="PE-Core-nano", help="a PE-Core to cut, or a PE-Lang as it is")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("overrides", nargs="*", help="key=value for every stage")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    build_start(options.out, options.data, options.tower)
    for name in STAGES:
        if name not in options.stages or (options.out / name / "model" / "config.json").is_file():
            continue
        log.info("%s", name)
        if not train(stage(name, options.data, options.out, tuple(options.overrides))):
            return 1
    last = options.out / STAGES[-1] / "model"
    if last.is_dir():
        finish(last, options.out / NAME)
        log.info("saved %s", options.out / NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
