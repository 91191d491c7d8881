"""Dense features at two layers, as a map of colours, and the same place in two pictures."""

import sys
from pathlib import Path

import perception_encoder as pe
from perception_encoder import samples

tower = pe.load_encoder(sys.argv[1] if len(sys.argv) > 1 else "PE-Core-nano")
out = Path(sys.argv[2] if len(sys.argv) > 2 else "demo")
out.mkdir(parents=True, exist_ok=True)

photo = samples.photos()["chelsea"]
early, late = pe.features(tower, photo, layers=[0, -1])
print("patches", tuple(late.patches.shape), "prefix", tuple(late.prefix.shape))
print("the layers differ by", round(float((early.patches - late.patches).abs().mean()), 3))

pe.pca_image(tower, photo, size=4 * tower.preprocess.size).save(out / "chelsea_pca.png")
found = pe.correspond(tower, photo, samples.photos()["coffee"], points=[(225, 150)])
print("the cat's nose looks most like", found.second.tolist(), "in the coffee, cosine", round(float(found.score), 3))
