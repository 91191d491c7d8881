"""A question about a picture, the answer as it is written, and another question.

Takes a model's name or folder. PLM-nano, which answers by default, knows drawings and no photographs.
"""

import sys

import perception_lm as plm
from perception_encoder import samples

assistant = plm.load(sys.argv[1] if len(sys.argv) > 1 else "PLM-nano")
photo = samples.photos()["chelsea"]
print(assistant.ask(photo, "What animal is this?", max_tiles=4, max_new_tokens=20))

chat = assistant.chat(max_tiles=4, max_new_tokens=20)
for question, media in (("Describe the image in details.", [photo]), ("And what colour is it?", [])):
    print(f"\n{question}", end="\n  ")
    for piece in chat.stream(question, *media):
        print(piece, end="", flush=True)
print(f"\n{len(chat.session.tokens)} tokens are remembered for the next question")
