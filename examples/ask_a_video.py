"""What happens in a part of a clip, and what it costs to ask. Takes a model's name or folder."""

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
clip = samples.clips()["bunny"]
question = {"type": "text", "text": "What is happening in the video?"}
messages = [{"role": "user", "content": [{"type": "video", "video": clip, "start": 1.0, "end": 4.0}, question]}]

for frames in (4, 8):
    (cost,) = assistant.processor.estimate(messages, frames=frames)
    print(f"{frames} frames: {cost.slots} of {cost.tokens} tokens; room for {cost.room} more")
reply = assistant.generate([messages], frames=4, max_new_tokens=20, logprobs=True)[0]
print(f"{reply.text!r}, {len(reply.tokens)} tokens, ended by {reply.finish}")

answers = ["A rabbit wakes up.", "A car drives by."]
scores = assistant.score(messages, answers, frames=4, mean=True)
print("more likely:", answers[scores.index(max(scores))])
