"""A question about a picture, the answer as it is written, and another question. Takes a model's name or folder."""

import sys

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
photo = samples.photos()["chelsea"]
print(assistant.ask(photo, "What animal is this?", max_tiles=4, max_new_tokens=20))

chat = assistant.chat(max_tiles=4, max_new_tokens=20)
for question, media in (("Describe the image in details.", [photo]), ("And what colour is it?", [])):
    print(f"\n{question}", end="\n  ")
    for piece in chat.stream(question, *media):
        print(piece, end="", flush=True)
print(f"\n{len(chat.session.tokens)} tokens are remembered for the next question")
