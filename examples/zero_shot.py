"""Name what is in a picture, choosing the names now. Offline with the model in the package."""

import sys

import perception_encoder as pe
from perception_encoder import samples

clip = pe.load_clip(sys.argv[1] if len(sys.argv) > 1 else "PE-Core-nano")
pictures = samples.drawings()
classifier = pe.ZeroShotClassifier(clip, list(pictures), ["a drawing of a {}", "an emoji of {}", "{}"])
for name, row in zip(pictures, classifier.predict(list(pictures.values()), top=3), strict=True):
    print(f"{name:<16}", "   ".join(f"{label} {score:.0%}" for label, score in row))
