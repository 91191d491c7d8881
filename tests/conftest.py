"""What every test may lean on."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


# A CPU build of torch beside a CUDA build of torchvision cannot load torchvision's operators, and then timm, open_clip
# and transformers cannot even be imported. Declaring the two that they look up at import is enough to use them as
# oracles: nothing that the tests run calls one.
if "+cpu" in torch.__version__ and "+cpu" not in _version("torchvision"):
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# Without a GPU, Triton's kernels run through its interpreter; it is chosen when Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# CLIP's tokenizer mends texts with ftfy. A machine for GPU tests may be without it: what tokenises is skipped there.
if find_spec("ftfy") is None:
    sys.modules["ftfy"] = ModuleType("ftfy")
    sys.modules["ftfy"].fix_text = lambda text: pytest.skip("ftfy is not installed")  # type: ignore[attr-defined]

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tiny weights with inputs and outputs of the reference implementation; see its README.md."""
    return Path(__file__).parent / "golden"
