"""Two pictures in one question, three ways; and many questions as one batch.

Takes a model's name or folder. PLM-nano, which answers by default, knows drawings and no photographs.
"""

import sys

from PIL import Image

import perception_lm as plm
from perception_encoder import samples

assistant = plm.load(sys.argv[1] if len(sys.argv) > 1 else "PLM-nano")
one, two = (Image.open(samples.photos()[name]).convert("RGB").resize((300, 200)) for name in ("coffee", "chelsea"))
side_by_side = Image.new("RGB", (600, 200))
side_by_side.paste(one, (0, 0))
side_by_side.paste(two, (300, 0))


def ask(text: str, *images: Image.Image) -> list:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


talks = [
    ask("<image><image>What is the difference between two images.", one, two),  # as the models were trained
    ask("First: <image>\nThen: <image>\nWhich one is an animal?", one, two),  # each at its mark
    ask("What is the difference between the two halves?", side_by_side),  # one picture, tiled
]
for talk, cost in zip(talks, assistant.processor.estimate(talks, max_tiles=4), strict=True):
    print(f"{cost.slots:>5} of {cost.tokens} tokens, pieces {cost.pieces}:", talk[0]["content"][-1]["text"])
for reply in assistant.generate(talks, max_tiles=4, max_new_tokens=12):
    print(repr(reply.text))
