"""How much memory, and time, does loading weights take?

    python benchmarks/load_memory.py            # PE-Core-B16-224, random weights made on the spot; about five minutes

Each run is a process of its own that imports the library, loads a small model once so that nothing is first, resets
its peak counter (VmHWM, by /proc/self/clear_refs), loads the model, reads every weight once, and reports the peak over
what was resident before, divided by the bytes of the weights in the dtype that was asked for. Mapped pages of the file
count as resident, so a loader cannot hide its weights in a mapping. Linux only.

A `.pt` file that is cast is unpickled again each time its mapping is given back, so that is done less often: its peak
is somewhat above that of safetensors, and the limit of 1.1 is for safetensors.

`plain` is the usual way, on the same module and the same file: build it, read the file, `load_state_dict`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import record, spread

MODEL = "PE-Core-B16-224"
LIMIT = 1.1


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def one_run(path: str, kind: str, dtype: str, how: str) -> dict[str, float]:
    """In the child: load once, and say what it took."""
    from safetensors.torch import load_file

    from perception_encoder.checkpoints import save
    from perception_encoder.clip import CLIP
    from perception_encoder.config import VisionConfig
    from perception_encoder.text import TextTransformer
    from perception_encoder.vision import VisionTransformer
    from perception_encoder.zoo import MODELS, load_clip, load_encoder

    entry = MODELS.get(MODEL)

    def plain() -> torch.nn.Module:
        vision = VisionTransformer(entry.vision)
        model = CLIP(vision, TextTransformer(entry.text)) if kind == "clip" else vision
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
        model.load_state_dict(state)
        return model.to(getattr(torch, dtype)).eval()

    def ours() -> torch.nn.Module:
        load, config = (load_clip, entry.config) if kind == "clip" else (load_encoder, entry.vision)
        return load(path, config=config, device="cpu", dtype=dtype)

    with tempfile.TemporaryDirectory() as folder:  # warm up
        config = VisionConfig(image_size=8, patch_size=4, width=8, depth=1, heads=1, mlp_width=8, pool=None)
        save(VisionTransformer(config), folder)
        load_encoder(folder, device="cpu", dtype=dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident(), time.perf_counter()
    model = {"ours": ours, "plain": plain}[how]()
    seconds = time.perf_counter() - began
    for parameter in model.parameters():
        parameter.view(-1).view(torch.uint8)[::4096].sum()  # every page of every weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"ratio": (peak() - before) / weights, "weights": weights, "seconds": seconds}


def write_weights(folder: Path) -> dict[str, Path]:
    """Random weights of the tower and of the pair, in our names and both formats."""
    from perception.checkpoint import write_safetensors
    from perception_encoder.clip import CLIP
    from perception_encoder.text import TextTransformer
    from perception_encoder.vision import VisionTransformer
    from perception_encoder.zoo import MODELS

    entry = MODELS.get(MODEL)
    torch.manual_seed(0)
    model = CLIP(VisionTransformer(entry.vision), TextTransformer(entry.text))
    files = {}
    for kind, state in {"tower": model.vision.state_dict(), "clip": model.state_dict()}.items():
        files[f"{kind} .safetensors"] = folder / f"{kind}.safetensors"
        write_safetensors(files[f"{kind} .safetensors"], state)
        files[f"{kind} .pt"] = folder / f"{kind}.pt"
        torch.save(state, files[f"{kind} .pt"])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(*options.one)))
        return

    cases, worst = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_weights(Path(folder)).items():
            for dtype in ("float32", "bfloat16"):
                for how in ("ours", "plain") if dtype == "float32" else ("ours",):
                    command = [sys.executable, __file__, "--one", str(path), name.split()[0], dtype, how]
                    outputs = [subprocess.check_output(command, text=True) for _ in range(options.runs)]
                    runs = [json.loads(output.splitlines()[-1]) for output in outputs]
                    ratio, seconds = (spread([run[key] for run in runs]) for key in ("ratio", "seconds"))
                    case = f"{MODEL} {name} to {dtype}, {how}"
                    cases[case] = {"weights, bytes": runs[0]["weights"], "peak / weights": ratio, "seconds": seconds}
                    print(f"{case:65} {ratio['max']:.3f} x   {seconds['median']:.2f} s", flush=True)
                    if how == "ours" and path.suffix == ".safetensors":
                        worst = max(worst, ratio["max"])
    facts = {"method": __doc__, "limit, safetensors": LIMIT, "worst of ours, safetensors": worst}
    print(record("load_memory", {**facts, **cases}))
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
