"""The bundled photographs and clips are what ASSETS.md says they are."""

import re
from pathlib import Path

from perception.files import sha256_of
from perception.media import read_image, read_video
from perception_encoder import samples

FOLDER = Path(samples.__file__).parent


def test_every_file_has_its_line_and_every_line_its_file() -> None:
    lines = re.findall(r"^\| `([^`]+)` \|(.*)\| `([0-9a-f]{64})` \|$", (FOLDER / "ASSETS.md").read_text(), re.M)
    files = [*samples.photos().values(), *samples.clips().values()]
    assert {FOLDER / name: digest for name, _, digest in lines} == {path: sha256_of(path) for path in files}
    assert all(cell.strip() for _, cells, _ in lines for cell in cells.split("|"))
    assert len(samples.photos()) == 12
    assert len(samples.clips()) == 2


def test_they_open_and_have_captions() -> None:
    assert set(samples.captions) == {*samples.photos(), *samples.clips()}
    for path in samples.photos().values():
        assert min(read_image(path).size) >= 150
    for path in samples.clips().values():
        assert len(read_video(path, max_frames=4)) == 4


def test_they_stay_small() -> None:
    assert all(path.stat().st_size < 400_000 for path in samples.photos().values())
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 4_000_000
