"""Drawings, photographs and clips to show, change and pass on; ASSETS.md and CREDITS.md say whose they are."""

from pathlib import Path

_HERE = Path(__file__).parent

captions = {
    "astronaut": "an astronaut in an orange suit with a flag and a model of a space shuttle",
    "camera": "a man with a camera on a tripod, in black and white",
    "chelsea": "a tabby cat looking to the side",
    "china": "a pagoda with many roofs above a lake",
    "clock": "a blurred photo of a clock on a wall",
    "coffee": "a cup of espresso on a red saucer",
    "coins": "rows of old coins",
    "flower": "an orange dahlia",
    "hubble": "distant galaxies in the night sky",
    "retina": "the retina of an eye",
    "rocket": "a rocket on a launch pad at dusk",
    "text": "handwriting on squared paper",
    "bunny": "a big grey cartoon rabbit stretches in front of its burrow",
    "city": "skyscrapers with lit windows at night",
}


def drawings() -> dict[str, Path]:
    """The drawings by what they show, in order."""
    return {path.stem.replace("_", " "): path for path in sorted((_HERE / "drawings").glob("*.png"))}


def photos() -> dict[str, Path]:
    """The photographs by name, in order."""
    return {path.stem: path for path in sorted((_HERE / "photos").iterdir()) if path.suffix in (".jpg", ".png")}


def clips() -> dict[str, Path]:
    """The clips by name, in order."""
    return {path.stem: path for path in sorted((_HERE / "clips").glob("*.mp4"))}
