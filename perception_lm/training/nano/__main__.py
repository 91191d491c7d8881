"""All of PLM-nano's training, in order; begun again after a stop, it goes on where it was.

python -m perception_encoder.training.drawings --out runs/data     # once: emoji and words
python -m perception_lm.training.nano --data runs/data --out runs/plm_nano

Each stage is a run file of its own (`perception train nano_stage2`); this fills in the folders and hands one stage's
model to the next. What is finished is not done again: for other settings or newer code, give another --out. SIGTERM and
SIGINT save first, and end with status 1. Under torchrun the first process alone makes what training starts from and
what it ends with.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

from perception.errors import PerceptionError
from perception_lm.training.launch import train
from perception_lm.training.nano.build import build_start
from perception_lm.training.run import Run, load_run
from perception_lm.zoo import load

log = logging.getLogger(__name__)
STAGES = ("stage1", "stage2", "stage3")
NAME = "PLM-nano"
LONGEST = 3600.0  # seconds that the other processes wait for the start


def stage(name: str, data: Path, out: Path, overrides: tuple[str, ...] = ()) -> Run:
    """The run of a stage, with its folders filled in."""
    before = out / ("start" if name == STAGES[0] else f"{STAGES[STAGES.index(name) - 1]}/model")
    plain = load_run(f"nano_{name}")
    folders = [f"out={out / name}", f"model.init={before}"]
    folders += [f"data.sources.{source}.options.data={data}" for source in plain.data.sources]
    return load_run(f"nano_{name}", [*folders, *overrides])


def begin(out: Path, data: Path, tower: str | Path, rank: int) -> None:
    """What training starts from: made by the first process, and waited for by the others.

    Raises what `build_start` raises, TimeoutError when there is no start after an hour.
    """
    if rank == 0:
        build_start(out, data, tower)
        return
    ready, end = out / "start" / "config.json", time.monotonic() + LONGEST  # once it is there, so is the rest
    while not ready.is_file():
        if time.monotonic() > end:
            raise TimeoutError(f"no {ready} after {LONGEST:.0f} seconds; the first process, which makes it, says why")
        time.sleep(0.2)


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
    parser.add_argument("--stages", default=",".join(STAGES), help="which of them, with commas between")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("overrides", nargs="*", help="key=value for every stage")
    options = parser.parse_args(arguments)
    stages = options.stages.split(",")
    if strange := sorted(set(stages) - set(STAGES)):
        parser.error(f"no stages {strange}; there are {', '.join(STAGES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return _train(options, stages)
    except (PerceptionError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _train(options: argparse.Namespace, stages: list[str]) -> int:
    """The exit status: 1 for a run that was told to stop, which goes on when it is begun again."""
    rank = int(os.environ.get("RANK", "0"))
    begin(options.out, options.data, options.tower, rank)
    for name in STAGES:
        if name not in stages or (options.out / name / "model" / "config.json").is_file():
            continue
        log.info("%s", name)
        if not train(stage(name, options.data, options.out, tuple(options.overrides))):
            log.info("%s stopped before its end; the same command goes on", name)
            return 1
    last = options.out / STAGES[-1] / "model"
    if rank == 0 and last.is_dir():
        finish(last, options.out / NAME)
        log.info("saved %s", options.out / NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
