"""Two pictures in one question, three ways; and many questions as one batch. Takes a model's name or folder."""

import sys

from PIL import Image

import perception_encoder as pe
import perception_lm as plm
from perception.pixels import PixelSpec
from perception_encoder import samples


def random_model() -> plm.Assistant:
    """A model that knows nothing, to show the way without a download."""
    words, spec = plm.LlamaTokenizer.of_bytes(), PixelSpec(size=32, interpolation="bicubic")
    small = pe.VisionConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, pool=None)
    llama = plm.DecoderConfig(width=64, depth=2, heads=4, kv_heads=2, mlp_width=128, vocab=words.vocab)
    return plm.compose(encoder=pe.VisionTransformer(small, spec), decoder=llama, tokenizer=words)


assistant = plm.load(sys.argv[1]) if len(sys.argv) > 1 else random_model()
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
