"""A folder to vectors, a sentence to the pictures that fit it best."""

import sys

import torch

import perception_encoder as pe
from perception_encoder import samples
from perception_encoder.retrieval.embed import nearest

clip = pe.load_clip(sys.argv[1] if len(sys.argv) > 1 else "PE-Core-nano")
names, files = zip(*samples.drawings().items(), strict=True)
vectors = pe.embed(clip, files, batch_size=4, progress=True)
queries = ["something to eat", "an animal"]
with torch.inference_mode():
    texts = clip.encode_text(clip.tokenize(queries), normalize=True).cpu()
for query, hits in zip(queries, nearest(texts, vectors, k=3), strict=True):
    print(f"{query}:", ", ".join(f"{names[row]} ({score:.2f})" for row, score in hits))
