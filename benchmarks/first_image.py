"""How long is it from starting Python to the first embedding of a photograph?

    python benchmarks/first_image.py
    python benchmarks/first_image.py --only timm        # beside timm alone

PE-Core-B16-224's image tower with random weights, from a file in the page cache; whole processes: interpreter, imports,
model, weights, decoding, one forward pass. Ours reads our file through `load_encoder`; timm reads timm's through
`create_model(checkpoint_path=)` with its own transform; open_clip reads open_clip's, both towers, as it always does.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import Gate, Rounds, describe, options, save, show
from peers import clip

PHOTO = Path(__file__).parents[1] / "perception_encoder" / "samples" / "photos" / "china.jpg"
SHIM = "import sys; sys.path.insert(0, {here!r}); from shim import shim; shim()\n"
PROGRAMS = {
    "ours": """
import torch
from perception_encoder import load_encoder
from perception_encoder.zoo import MODELS
tower = load_encoder({folder!r} + "/ours.safetensors", config=MODELS.get("PE-Core-B16-224").vision, device="cpu")
with torch.inference_mode():
    print(tower.pooled(tower.preprocess({photo!r})[None]).norm())
""",
    "timm": """
import torch, timm
from PIL import Image
name = "vit_pe_core_base_patch16_224"
model = timm.create_model(name, pretrained=False, checkpoint_path={folder!r} + "/timm.safetensors").eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    print(model(transform(Image.open({photo!r}).convert("RGB"))[None]).norm())
""",
    "open_clip": """
import torch, open_clip
from PIL import Image
path = {folder!r} + "/open_clip.safetensors"
model, _, transform = open_clip.create_model_and_transforms("PE-Core-B-16", pretrained=path)
with torch.inference_mode():
    print(model.eval().encode_image(transform(Image.open({photo!r}))[None]).norm())
""",
}


def main() -> None:
    chosen = options(__doc__)
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS if name == "ours" or chosen.wants(name)}
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
            name: ("" if name == "ours" else SHIM.format(here=here)) + text.format(folder=folder, photo=str(PHOTO))
            for name, text in PROGRAMS.items()
            if name in seconds
        }
        lengths, begin = {}, time.perf_counter()
        for index in range(2 if chosen.quick else chosen.rounds + 1):
            if index > 1 and time.perf_counter() - begin >= chosen.seconds:
                break
            for name, program in programs.items():
                start = time.perf_counter()
                done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                took = time.perf_counter() - start
                lengths[name] = float(done.stdout.split("tensor(")[1].split(")")[0].split(",")[0])
                if index:  # the first of each fills the page cache
                    seconds[name].append(took)
    middle = lengths["ours"]
    assert all(abs(length / middle - 1) < 0.02 for length in lengths.values()), lengths  # their resizes differ a little
    what = "first embedding after process start / best peer"
    gates = [Gate(what=what, ours="ours", peers=("timm", "open_clip"), least=3, aim=4)]
    case = describe(Rounds(seconds), gates, torch.get_num_threads())
    case["threads"] = 0
    show("first image", case)
    save("first_image", __doc__, {"first image": case}, chosen)


if __name__ == "__main__":
    main()
