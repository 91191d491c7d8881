"""How long does it take until weights are in memory, beside open_clip's loader and beside the usual pattern?

    python benchmarks/load.py
    python benchmarks/load.py --only open_clip
    python benchmarks/load.py --folder DIR              # the files are kept there, and used where they are already

PE-Core-B16-224, both towers, 447.7 M random parameters in float32: our file for us, open_clip's for open_clip, a `.pt`
for the usual pattern (build the model, `torch.load`, `load_state_dict`), which the reference follows. Each run is a
process of its own; the seconds are from the call until every page of every weight was read once, so mapping a file is
not mistaken for reading it. Memory is what `load_memory.py` measures, in the same way.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from harness import Gate, Rounds, at_most, describe, options, save, show
from load_memory import peak, resident
from peers import clip, shim

MODEL, THEIRS = "PE-Core-B16-224", "PE-Core-B-16"
QUICK = ("PE-Core-S16-384", "PE-Core-S-16-384")
FILES = {"ours": "ours.safetensors", "open_clip": "open_clip.safetensors", "usual pattern": "plain.pt"}


def one_run(how: str, folder: str, ours: str, theirs: str) -> dict[str, float]:
    """In the child: everything imported, then load, then read every page."""
    from perception_encoder.clip import CLIP
    from perception_encoder.text import TextTransformer
    from perception_encoder.vision import VisionTransformer
    from perception_encoder.zoo import MODELS, load_clip

    entry, path = MODELS.get(ours), str(Path(folder) / FILES[how])
    if how == "open_clip":
        shim()
        import open_clip

    def usual() -> torch.nn.Module:
        model = CLIP(VisionTransformer(entry.vision), TextTransformer(entry.text))
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    loaders = {
        "ours": lambda: load_clip(path, config=entry.config, device="cpu", dtype="float32"),
        "open_clip": lambda: open_clip.create_model(theirs, pretrained=path),
        "usual pattern": usual,
    }
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident(), time.perf_counter()
    model = loaders[how]()
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": (peak() - before) / sum(p.nbytes for p in model.parameters())}


def write_files(folder: Path, ours: str, wanted: Sequence[str]) -> None:
    from perception.checkpoint import write_safetensors
    from perception_encoder.checkpoints import export

    if all((folder / FILES[how]).is_file() for how in wanted):
        return
    model = clip(ours)
    write_safetensors(folder / FILES["ours"], model.state_dict())
    if "open_clip" in wanted:
        export(model, folder / FILES["open_clip"], "open_clip")
    if "usual pattern" in wanted:
        torch.save(model.state_dict(), folder / FILES["usual pattern"])


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(one_run(*sys.argv[sys.argv.index("--one") + 1 :])))
        return
    kept, arguments = None, sys.argv[1:]
    if "--folder" in arguments:
        at = arguments.index("--folder")
        kept = arguments[at + 1]
        del arguments[at : at + 2]
    chosen = options(__doc__, arguments)
    names = QUICK if chosen.quick else (MODEL, THEIRS)
    here = [how for how in FILES if how == "ours" or chosen.wants(how)]
    seconds: dict[str, list[float]] = {how: [] for how in here}
    peaks: dict[str, list[float]] = {how: [] for how in here}
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), names[0], here)
        begin = time.perf_counter()
        for index in range(3 if chosen.quick else chosen.rounds + 1):
            if index > 1 and time.perf_counter() - begin >= chosen.seconds:
                break
            for how in here:
                command = [sys.executable, __file__, "--one", how, folder, *names]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                if index:  # the first of each fills the page cache
                    seconds[how].append(found["seconds"])
                    peaks[how].append(found["peak"])
    for peer in here[1:]:
        gate = Gate(what=f"load time / {peer}", ours="ours", peers=(peer,), least=5, aim=9)
        case = describe(Rounds({how: seconds[how] for how in ("ours", peer)}), [gate], torch.get_num_threads())
        case["threads"] = 0
        case["gates"].append(at_most("load: peak memory / weights", peaks["ours"], 1.1, 1.01))
        case["peak memory / weights"] = {
            how: round(sorted(peaks[how])[len(peaks[how]) // 2], 3) for how in ("ours", peer)
        }
        show(f"load, beside {peer}", case)
        save("load", __doc__, {f"beside {peer}": case}, chosen)


if __name__ == "__main__":
    main()
