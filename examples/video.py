"""One embedding of a clip, with the frames chosen by time."""

import sys

import torch

import perception_encoder as pe
from perception.media import read_video
from perception_encoder import samples

clip = pe.load_clip(sys.argv[1] if len(sys.argv) > 1 else "PE-Core-nano")
video = read_video(samples.clips()["bunny"], max_frames=8, start=1.0, end=4.0)
print(f"{len(video.frames)} of {video.num_frames} frames at", [round(t, 2) for t in video.timestamps])
frames = torch.stack([clip.preprocess(frame) for frame in video.frames])[None]  # B N 3 S S
with torch.inference_mode():
    vector = clip.encode_video(frames, normalize=True, protocol="raw-mean")
print("embedding", tuple(vector.shape), "of length", round(float(vector.norm()), 4))
