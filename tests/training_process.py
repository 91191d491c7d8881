"""One process of a tiny run, for tests that need several or kill one: python training_process.py OUT JSON"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from training_tiny import Colours, tiny_assistant, tiny_run

from perception.settings import read_settings
from perception.training.distributed import EngineConfig
from perception.training.state import KeepConfig
from perception_lm.training.launch import train


def main(out: str, settings: str) -> None:
    torch.set_num_threads(1)
    given = json.loads(settings)
    die_at, media_chunk = given.pop("die_at", None), given.pop("media_chunk", 8)
    engine = read_settings(EngineConfig, given.pop("engine", {}), "engine")
    given["keep"] = read_settings(KeepConfig, given.get("keep", {}), "keep")

    def after_step(trainer: object, line: dict[str, float]) -> None:
        sys.stdout.write(f"step {line['step']}\n")
        sys.stdout.flush()
        if line["step"] == die_at and os.environ.get("RANK") == "1":
            os._exit(3)

    run = tiny_run(Path(out), engine=engine, **given)
    assistant = tiny_assistant()
    assistant.model.media_chunk = media_chunk
    done = train(run, assistant=assistant, sources={"colours": Colours()}, after_step=after_step)
    sys.stdout.write("done\n" if done else "stopped\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
