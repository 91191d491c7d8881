"""The drawings that `make nano` renders, as a Parquet file of PNG pictures with their labels."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_drawings(data: Path, out: Path) -> tuple[Path, list[str]]:
    """All drawings over white; the file, and the label of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    concepts = json.loads((data / "concepts.json").read_text())
    with np.load(data / "drawings.npz", allow_pickle=False) as arrays:
        pixels, concept = arrays["pixels"], arrays["concept"]
    alpha = pixels[..., 3:].astype(np.float32) / 255
    codes = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    pictures = []
    for one in codes:
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG", compress_level=1)
        pictures.append(buffer.getvalue())
    labels = [str(concepts[i]["label"]) for i in concept.tolist()]
    pq.write_table(pa.table({"image": pictures, "label": labels}), out, row_group_size=1024)
    return out, labels
