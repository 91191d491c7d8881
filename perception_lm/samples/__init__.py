"""A bar chart, a scene and a clip for `perception demo`, drawn by this project; `samples.json` says what they show.

`python -m perception_lm.training.nano.samples` draws them again.
"""

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def samples() -> dict[str, dict[str, Any]]:
    """Name -> path of a picture or of a folder of frames, and questions with the answers they should get."""
    listed = json.loads((_HERE / "samples.json").read_text(encoding="utf-8"))
    return {name: {**entry, "path": _HERE / entry["path"]} for name, entry in listed.items()}
