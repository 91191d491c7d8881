"""Models without memory: built quickly, and without what only a compiler needs."""

import subprocess
import sys

import torch
from torch import nn

from perception.device import shapes_only

CODE = """
import sys
from perception.device import shapes_only
from perception_encoder import VisionConfig, VisionTransformer
config = VisionConfig(image_size=32, patch_size=16, width=64, depth=1, heads=1, mlp_width=128, output_width=8)
with shapes_only():
    tower = VisionTransformer(config)
assert all(p.is_meta for p in tower.parameters())
print(sorted(m for m in sys.modules if m in ("sympy", "torch._dynamo")))
"""


def test_nothing_is_filled_outside_of_it_everything_is() -> None:
    with shapes_only():
        assert nn.Linear(3, 4).weight.is_meta
    layer = nn.Linear(3, 4)
    assert not layer.weight.is_meta
    assert layer.weight.std() > 0
    with torch.device("cpu"):
        assert nn.init.constant_(torch.empty(2), 3.0).tolist() == [3.0, 3.0]


def test_the_compiler_is_not_imported_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
