"""How long is it from starting Python to the first embedding of a photograph?

    python benchmarks/first_image.py
    python benchmarks/first_image.py --only timm        # beside timm alone

PE-Core-B16-224's image tower with random weights, from a file in the page cache; whole processes: interpreter, imports,
model, weights, decoding, one forward pass. Ours reads our file through `load_encoder`; timm reads timm's through
`create_model(checkpoint_path=)` with its own transform; open_clip reads open_clip's, both towers, as it always does.
Both are told the published transform (left alone they crop, or resize and normalise in another way), and the three
embeddings must be the same.

Beside them "import torch" alone, which nobody who uses it gets below, and where our own seconds go.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import Gate, Rounds, describe, options, save, show
from peers import agree, clip

PHOTO = Path(__file__).parents[1] / "perception_encoder" / "samples" / "photos" / "china.jpg"
SHIM = "import sys; sys.path.insert(0, {here!r}); from shim import shim; shim()\n"
STAGES = ("import torch", "import ours", "model and weights", "photograph", "forward pass")
TORCH = "import torch"
PROGRAMS = {
    "ours": """
import time; times = [time.perf_counter()]
import torch; times.append(time.perf_counter())
from perception_encoder import load_encoder
from perception_encoder.zoo import MODELS; times.append(time.perf_counter())
tower = load_encoder({folder!r} + "/ours.safetensors", config=MODELS.get("PE-Core-B16-224").vision, device="cpu")
times.append(time.perf_counter())
with torch.inference_mode():
    pixels = tower.preprocess({photo!r})[None]; times.append(time.perf_counter())
    vector = tower.pooled(pixels); times.append(time.perf_counter())
print([b - a for a, b in zip(times, times[1:])])
print(vector[0].tolist())
""",
    "timm": """
import torch, timm
from PIL import Image
name = "vit_pe_core_base_patch16_224"
model = timm.create_model(name, pretrained=False, checkpoint_path={folder!r} + "/timm.safetensors").eval()
config = timm.data.resolve_model_data_config(model) | {{"interpolation": "bilinear", "crop_mode": "squash"}}
transform = timm.data.create_transform(**config)
with torch.inference_mode():
    print(model(transform(Image.open({photo!r}).convert("RGB"))[None])[0].tolist())
""",
    "open_clip": """
import torch, open_clip
from PIL import Image
path = {folder!r} + "/open_clip.safetensors"
rule = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, image_interpolation="bilinear", image_resize_mode="squash")
model, _, transform = open_clip.create_model_and_transforms("PE-Core-B-16", pretrained=path, **rule)
with torch.inference_mode():
    print(model.eval().encode_image(transform(Image.open({photo!r}))[None])[0].tolist())
""",
    TORCH: "import torch",
}


def main() -> None:
    chosen = options(__doc__)
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS if name in ("ours", TORCH) or chosen.wants(name)}
    from perception.checkpoint import write_safetensors
    from perception_encoder.checkpoints import export

    with tempfile.TemporaryDirectory() as folder:
        model = clip("PE-Core-B16-224")
        write_safetensors(Path(folder) / "ours.safetensors", model.vision.state_dict())
        export(model.vision, Path(folder) / "timm.safetensors", "timm")
        if "open_clip" in seconds:
            export(model, Path(folder) / "open_clip.safetensors", "open_clip")
        here = str(Path(__file__).parent)
        # The peers need the shim where their torchvision does not fit this torch.
        programs = {
            name: ("" if name in ("ours", TORCH) else SHIM.format(here=here))
            + text.format(folder=folder, photo=str(PHOTO))
            for name, text in PROGRAMS.items()
            if name in seconds
        }
        vectors: dict[str, torch.Tensor] = {}
        begin = time.perf_counter()
        stages: list[list[float]] = []
        for index in range(2 if chosen.quick else chosen.rounds + 1):
            if index > 1 and time.perf_counter() - begin >= chosen.seconds:
                break
            for name, program in programs.items():
                start = time.perf_counter()
                done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                took = time.perf_counter() - start
                lines = done.stdout.splitlines()
                if name != TORCH:
                    vectors[name] = torch.tensor([json.loads(lines[-1])])
                if index:  # the first of each fills the page cache
                    seconds[name].append(took)
                if index and name == "ours":
                    stages.append(json.loads(lines[-2]))
    differences = agree(vectors.pop("ours"), vectors, relative=1e-5)
    what = "first embedding after process start / best peer"
    gates = [Gate(what=what, ours="ours", peers=("timm", "open_clip"), least=3, aim=4)]
    case = describe(Rounds(seconds), gates, torch.get_num_threads())
    case |= {"threads": 0, "differences": differences}
    columns = zip(STAGES, zip(*stages, strict=True), strict=True)
    case["our stages, ms"] = {stage: round(1000 * statistics.median(column), 1) for stage, column in columns}
    show("first image", case)
    save("first_image", __doc__, {"first image": case}, chosen)


if __name__ == "__main__":
    main()
