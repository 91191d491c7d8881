"""What happens in a part of a clip, and what it costs to ask.

Takes a model's name or folder. PLM-nano, which answers by default, knows drawings and no photographs.
"""

import sys

import perception_lm as plm
from perception_encoder import samples

assistant = plm.load(sys.argv[1] if len(sys.argv) > 1 else "PLM-nano")
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
