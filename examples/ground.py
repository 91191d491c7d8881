"""Where in a picture is what a sentence says, and what is in a region of it.

Takes a model's name or folder. PLM-nano, which answers by default, knows drawings and no photographs.
"""

import sys
from pathlib import Path

import perception_lm as plm
from perception_encoder import samples
from perception_lm.regions import draw_boxes, parse_boxes

assistant = plm.load(sys.argv[1] if len(sys.argv) > 1 else "PLM-nano")
out = Path(sys.argv[2] if len(sys.argv) > 2 else "demo")
out.mkdir(parents=True, exist_ok=True)

photo = samples.photos()["coffee"]  # 600 x 400
boxes = assistant.ground(photo, "the cup of coffee", max_new_tokens=32)
print("the answer names", boxes or "no box")

# Boxes are thousandths of the picture, as text; here is one by hand.
cup = plm.Box(160, 80, 440, 340, label="cup")
text = cup.encode(width=600, height=400)
print(text, "is", parse_boxes(text, width=600, height=400)[0].xyxy, "in 600 x 400")
draw_boxes(photo, [*boxes, cup]).save(out / "coffee_boxes.png")

print("by its numbers:", repr(assistant.describe_region(photo, cup, max_new_tokens=12)))
print("drawn in red:  ", repr(assistant.describe_region(photo, cup, drawn=True, max_new_tokens=12)))
