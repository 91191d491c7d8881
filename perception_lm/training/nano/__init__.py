"""PLM-nano, the small model that comes with the package: its data, its tokenizer, its run files in order.

    python -m perception_lm.training.nano --data runs/data --out runs/plm_nano

Pictures are drawn while training runs, each from its number alone, and their answers are exact: `scenes`, `charts`,
`reading`, `emoji` and `clips` draw, `mixture` chooses among them. What is held out (styles, palettes, fonts, words,
drawings, phrasings) is in `world`.
"""

from perception_lm.training.nano.mixture import make
from perception_lm.training.sources import SOURCES

if "nano/mixture" not in SOURCES:
    SOURCES.add("nano/mixture", make)
