"""Videos: the published choice of frames, the same frames from both decoders, and what strangers may send.

Every clip is made here. A frame carries its number as eight stripes, dark or bright, which survive lossy coding.
"""

import io
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from perception import decoders
from perception.errors import ConfigError, LimitError, MediaError
from perception.media import (
    ClipLimits,
    FrameChoice,
    benchmark_frames,
    choose_frames,
    draw_box,
    read_video,
    sniff,
    uniform_frames,
)

av = pytest.importorskip("av", reason="the extra `video` is not installed")

TORCHCODEC = decoders.installed("torchcodec")
BACKENDS = [
    pytest.param("torchcodec", marks=pytest.mark.skipif(bool(TORCHCODEC), reason=f"no torchcodec: {TORCHCODEC}")),
    "pyav",
]


def numbered(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    bits = [(index >> bit) & 1 for bit in range(8)]
    stripes = np.repeat(np.array(bits, np.uint8) * 200 + 25, width // 8)
    return np.broadcast_to(stripes[None, :, None], (height, width, 3)).copy()


def numbers(frames: torch.Tensor) -> list[int]:
    """What `numbered` wrote."""
    width = frames.shape[3] // 8
    middles = frames.float().mean(dim=(1, 2))[:, width // 2 :: width]
    return [int(sum(1 << bit for bit in range(8) if row[bit] > 125)) for row in middles]


def make_clip(
    path: Path,
    frames: int = 40,
    fps: int | Fraction = 10,
    *,
    codec: str = "libx264",
    gop: int = 8,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (64, 48),
    container: str | None = None,
) -> Path:
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(index % 256, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames, 10 a second."""
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


# --- which frames -------------------------------------------------------------------------------------------------


def published(golden: Path) -> dict:
    return json.loads((golden / "video" / "sampling.json").read_text())


def test_published_choice_of_frames(golden: Path) -> None:
    checked = 0
    for row in published(golden)["plm_load_video"]:
        asked = {key: row[key] for key in ("num_frames", "fps", "max_frames", "start", "end", "sampling_fps")}
        backwards = row["start"] is not None and row["end"] is not None and row["start"] > row["end"]
        if "error" in row or backwards or (row["start"] or 0) * row["fps"] > row["num_frames"] - 1:
            with pytest.raises(ConfigError):
                choose_frames(**asked)
        elif "note" in row:  # published indices run past the end; ours do not
            assert choose_frames(**asked) == [index for index in row["indices"] if index < row["num_frames"]]
        else:
            assert choose_frames(**asked) == row["indices"], asked
            checked += 1
    assert checked == 16


def test_published_even_spreads(golden: Path) -> None:
    for key, wanted in published(golden)["plm_uniform_sample_m_n"].items():
        assert uniform_frames(*map(int, key.split(","))) == wanted
    for key, wanted in published(golden)["clip_benchmark_indices_T_N"].items():
        assert benchmark_frames(*map(int, key.split(","))) == wanted
    for choose in (uniform_frames, benchmark_frames):
        for m, n in ((0, 3), (3, 0), (-1, 2)):
            with pytest.raises(ConfigError):
                choose(m, n)


@given(
    st.integers(1, 3000), st.floats(0.6, 120), st.integers(1, 64), st.floats(0, 200), st.floats(0, 200), st.booleans()
)
def test_laws_of_the_choice(frames: int, fps: float, most: int, a: float, b: float, window: bool) -> None:
    start, end = (min(a, b), max(a, b)) if window else (None, None)
    if start is not None and int(start * fps) > frames - 1:
        with pytest.raises(ConfigError, match="past the end"):
            choose_frames(frames, fps, most, start, end)
        return
    chosen = choose_frames(frames, fps, most, start, end)
    first = 0 if start is None else int(start * fps)
    assert 1 <= len(chosen) <= most
    assert chosen[0] == first
    assert all(earlier < later for earlier, later in itertools.pairwise(chosen))
    assert chosen[-1] <= frames - 1
    if end is not None:
        assert chosen[-1] <= max(int(end * fps), first + 1)


@given(st.integers(1, 500), st.integers(2, 64))
def test_laws_of_even_spreads(m: int, n: int) -> None:
    for spread in (uniform_frames(m, n), benchmark_frames(m, n)):
        assert len(spread) == n
        assert spread == sorted(spread)
        assert (spread[0], spread[-1]) == (0, m - 1)


def test_few_frames_are_all_taken() -> None:
    assert choose_frames(5, 25.0, 32) == [0, 1, 2, 3, 4]
    assert choose_frames(1, 30.0, 8) == [0]  # F-63
    assert choose_frames(900, 30.0, 8, 5.2, 5.2) == [156, 157]
    assert choose_frames(30, 30.0, 8, 0.98, 0.98) == [29]  # the last frame has no next


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (20.0, 5.0, "start=20 is after end=5"),
        (30.0, None, "start=30 is past the end: frame 900 of 900"),
        (31.0, 99.0, "past the end"),
        (-1.0, None, "start=-1.0; expected seconds"),
        (None, -0.1, "end=-0.1; expected seconds"),
        (math.nan, None, "start=nan"),
        (None, math.inf, "end=inf"),
    ],
)
def test_times_that_cannot_be(start: float | None, end: float | None, message: str) -> None:  # F-65
    with pytest.raises(ConfigError, match=message):
        choose_frames(900, 30.0, 8, start, end)


@pytest.mark.parametrize("fps", [0.0, math.nan, math.inf, 0.4])
def test_clips_without_a_usable_rate(fps: float) -> None:  # F-63
    with pytest.raises(ConfigError, match="too few to take 1"):
        choose_frames(40, fps, 8)
    # A reader has to do something with such a clip: every frame is a candidate.
    assert FrameChoice(max_frames=8).pick(40, fps) == uniform_frames(40, 8)
    if fps != 0.4:
        with pytest.raises(ConfigError, match="choose frames with indices"):
            FrameChoice(start=1).pick(40, fps)


@pytest.mark.parametrize(
    "asked",
    [{"num_frames": 0}, {"max_frames": 0}, {"max_frames": -1}, {"sampling_fps": 0}, {"sampling_fps": math.nan}],
    ids=str,
)
def test_counts_that_cannot_be(asked: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        choose_frames(**{"num_frames": 40, "fps": 10.0, "max_frames": 8, **asked})  # type: ignore[arg-type]


# --- boxes --------------------------------------------------------------------------------------------------------


def test_published_boxes(golden: Path) -> None:
    tensors, about = load_file(golden / "video" / "frames.safetensors"), published(golden)["boxes"]
    before = tensors["frames"].clone()
    assert torch.equal(draw_box(before, about["sample_pos"], about["bbox_map"]), tensors["frames_with_boxes"])
    assert torch.equal(before, tensors["frames"])


@pytest.mark.parametrize("box", [[1, 2, 3], [5, 5, 1, 9], [0, 0, math.nan, 9]], ids=str)
def test_boxes_that_cannot_be(box: list[float]) -> None:
    with pytest.raises(ConfigError, match="the box of frame 7"):
        draw_box(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), [7], {7: box})
    with pytest.raises(ConfigError, match="1 frames came with 2 indices"):
        draw_box(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), [7, 8], {})


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_frames_asked_for(clip: Path, backend: str) -> None:
    video = read_video(clip, max_frames=8, backend=backend)
    assert video.indices == tuple(choose_frames(40, 10.0, 8)) == (0, 6, 11, 17, 22, 28, 33, 39)
    assert numbers(video.frames) == list(video.indices)
    assert video.frames.shape == (8, 3, 48, 64)
    assert video.frames.dtype == torch.uint8
    assert video.timestamps == pytest.approx([index / 10 for index in video.indices])
    assert (video.fps, video.num_frames, video.duration) == pytest.approx((10, 40, 4))
    assert (video.backend, len(video)) == (backend, 8)

    window = read_video(clip, max_frames=2, start=1, end=3.5, backend=backend)
    assert numbers(window.frames) == list(window.indices) == [10, 30]
    named = read_video(clip, indices=[39, 0, 7, 7], backend=backend)
    assert numbers(named.frames) == [39, 0, 7, 7]


CONTAINERS = {
    "mp4": ("libx264", None),
    "mov": ("mpeg4", None),
    "mkv": ("libx264", None),
    "webm": ("libvpx", None),
    "avi": ("mpeg4", None),
    "ts": ("libx264", "mpegts"),
    "mpg": ("mpeg2video", "mpeg"),
    "flv": ("libx264", None),
    "ogv": ("libvpx", "ogg"),
    "wmv": ("msmpeg4", "asf"),
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container(suffix: str, tmp_path: Path) -> None:
    codec, container = CONTAINERS[suffix]
    fps = 25 if suffix == "mpg" else 10
    path = make_clip(tmp_path / f"clip.{suffix}", fps=fps, codec=codec, container=container)
    for indices in ([0, 13, 39], [39], [20, 21], list(range(40))):
        video = read_video(path, indices=indices)
        assert numbers(video.frames) == indices
        assert video.timestamps == pytest.approx([index / fps for index in indices], abs=0.005)
    assert video.num_frames == 40


@pytest.mark.skipif(bool(TORCHCODEC), reason=f"no torchcodec: {TORCHCODEC}")
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi"])
def test_both_decoders_give_the_same(suffix: str, tmp_path: Path) -> None:
    codec, container = CONTAINERS[suffix]
    path = make_clip(tmp_path / f"clip.{suffix}", codec=codec, container=container)
    ours, theirs = (read_video(path, max_frames=6, backend=backend) for backend in ("torchcodec", "pyav"))
    # Converting colours may round differently from one build of FFmpeg to the next.
    torch.testing.assert_close(ours.frames.int(), theirs.frames.int(), rtol=0, atol=2)
    assert ours.indices == theirs.indices
    assert ours.timestamps == pytest.approx(theirs.timestamps)
    assert (ours.fps, ours.num_frames) == pytest.approx((theirs.fps, theirs.num_frames))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_filmed_sideways_is_turned(backend: str, clip: Path, tmp_path: Path) -> None:
    # The track header of an MP4 holds a matrix; this one turns by a quarter.
    data = bytearray(clip.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    matrix = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    video = read_video(bytes(data), indices=[37], backend=backend)
    assert video.frames.shape == (1, 3, 64, 48)
    rows = video.frames.float().mean(dim=(1, 3))[0, 4::8]
    assert [int(value > 125) for value in rows] == [(37 >> bit) & 1 for bit in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_of_handing_over_a_clip(clip: Path, backend: str) -> None:
    data = clip.read_bytes()
    with clip.open("rb") as file:
        file.seek(100)
        for source in (clip, str(clip), data, bytearray(data), io.BytesIO(data), file):
            assert numbers(read_video(source, indices=[12], backend=backend).frames) == [12]
        assert not file.closed


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_at_uneven_times(backend: str, tmp_path: Path) -> None:  # F-63
    times = [0, 40, 80, 500, 540, 1000, 1900, 2000, 2040, 3000]
    path = make_clip(tmp_path / "uneven.mkv", frames=10, times=times, gop=3)
    video = read_video(path, backend=backend)
    assert numbers(video.frames) == list(range(10))
    assert video.timestamps == pytest.approx([time / 1000 for time in times], abs=0.002)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_of_one_frame(backend: str, tmp_path: Path) -> None:  # F-63
    video = read_video(make_clip(tmp_path / "one.mp4", frames=1), backend=backend)
    assert (video.indices, video.timestamps) == ((0,), (0.0,))
    assert numbers(video.frames) == [0]


def test_a_slide_show(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "slow.mp4", frames=12, fps=Fraction(1, 5))
    assert read_video(path, max_frames=4).indices == (0, 4, 7, 11)
    assert read_video(path, start=20).indices == (4, 5, 6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_videos(kind: str) -> None:  # F-48
    pages = [Image.fromarray(numbered(index)) for index in range(6)]
    file = io.BytesIO()
    options = {} if kind == "TIFF" else {"duration": 500}
    if kind == "WEBP":
        options["lossless"] = True
    pages[0].save(file, kind, save_all=True, append_images=pages[1:], **options)
    video = read_video(file.getvalue())
    assert numbers(video.frames) == list(range(6))
    seconds = 1.0 if kind == "TIFF" else 0.5
    assert video.timestamps == pytest.approx([index * seconds for index in range(6)])
    assert (video.fps, video.num_frames, video.backend) == (1 / seconds, 6, "pillow")
    assert numbers(read_video(file.getvalue(), indices=[4, 1]).frames) == [4, 1]
    with pytest.raises(LimitError, match="max_pixels=100"):
        read_video(file.getvalue(), max_pixels=100)


def test_a_damaged_animation() -> None:
    pages = [Image.fromarray(numbered(index)) for index in range(6)]
    file = io.BytesIO()
    pages[0].save(file, "WEBP", save_all=True, append_images=pages[1:], lossless=True)
    with pytest.raises(MediaError):
        read_video(file.getvalue()[: file.tell() // 2])


def test_pictures_are_frames(tmp_path: Path) -> None:
    for index in range(12):
        Image.fromarray(numbered(index)).save(tmp_path / f"frame_{index:03}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    folder = read_video(tmp_path, max_frames=4)
    assert numbers(folder.frames) == list(folder.indices) == uniform_frames(12, 4)
    listed = read_video([tmp_path / "frame_005.png", numbered(3), Image.fromarray(numbered(9))])
    assert numbers(listed.frames) == [5, 3, 9]
    assert listed.timestamps == (0.0, 1.0, 2.0)
    with pytest.raises(MediaError, match="several sizes"):
        read_video([numbered(1), numbered(1, 128)])
    with pytest.raises(MediaError, match="the list of frames is empty"):
        read_video([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="a folder without pictures"):
        read_video(tmp_path / "empty")


def test_arrays_are_clips() -> None:
    array = np.stack([numbered(index) for index in range(10)])
    for source in (array, array.transpose(0, 3, 1, 2), torch.from_numpy(array), torch.from_numpy(array).movedim(3, 1)):
        video = read_video(source, max_frames=4)
        assert numbers(video.frames) == list(video.indices) == uniform_frames(10, 4)
        assert video.frames.shape == (4, 3, 48, 64)
    for bad in (array[0], array / 255, array[:0], array[..., :2]):
        with pytest.raises(MediaError, match="is no clip; expected uint8 N 3 H W or N H W 3"):
            read_video(bad)


# --- faults -------------------------------------------------------------------------------------------------------


def cut(path: Path, part: float) -> bytes:
    data = path.read_bytes()
    return data[: int(len(data) * part)]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_what_is_no_video(backend: str, clip: Path, tmp_path: Path) -> None:  # F-60
    garbage = b"\0\0\0\x18ftypisom" + os.urandom(3000)
    for data in (b"", b"\x17" * 1000, b"<html></html>", garbage, cut(clip, 0.5)):  # the index of the last is cut off
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        with pytest.raises(MediaError, match=r"clip.mp4' cannot be (read|decoded)") as caught:
            read_video(path, backend=backend)
        assert ".cpp" not in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 400
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="No such file"):
        read_video(tmp_path / "missing.mp4", backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_clip_cut_short(backend: str, tmp_path: Path) -> None:  # F-61
    path = make_clip(tmp_path / "clip.mp4", frames=100, options={"movflags": "faststart"}, size=(128, 96), gop=10)
    head = path.read_bytes().index(b"mdat")
    data = path.read_bytes()
    short = data[: head + int((len(data) - head) * 0.6)]
    with pytest.warns(UserWarning, match="is damaged: its header promises 100 frames"):
        video = read_video(short, max_frames=8, backend=backend)
    assert numbers(video.frames) == list(video.indices)
    assert 30 < video.num_frames < 90
    assert len(video) >= 7


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_sound_alone(backend: str, tmp_path: Path) -> None:  # F-62
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match="has no video stream"):
        read_video(path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("indices", [[40], [0, 10**12], [-1], [], [1.5], [True], ["1"]], ids=str)
def test_frames_that_are_not_there(clip: Path, backend: str, indices: list) -> None:  # F-64
    with pytest.raises(ConfigError, match="indices"):
        read_video(clip, indices=indices, backend=backend)


@pytest.mark.parametrize("asked", [{"start": 3, "end": 1}, {"start": 5}, {"start": -1}, {"timeout": 0}], ids=str)
def test_times_the_clip_does_not_have(clip: Path, asked: dict) -> None:  # F-65
    with pytest.raises(ValueError, match=r"start|timeout"):
        read_video(clip, **asked)


def playlists(secret: Path) -> Iterator[tuple[str, bytes]]:
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    dash = f'<MPD profiles="urn:mpeg:dash:profile:isoff-main:2011"><BaseURL>{secret}</BaseURL></MPD>'.encode()
    yield "an HLS playlist", hls
    yield "an HLS playlist", hls.lower()
    yield "an ffconcat script", f"ffconcat version 1.0\nfile {secret.name}\n".encode()  # F-67
    yield "a DASH manifest", b'<?xml version="1.0"?>\n' + dash
    yield "an SDP session", b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n"
    # A container's first bytes, and then what FFmpeg's probe for playlists would find.
    yield "a DASH manifest", b"\x1a\x45\xdf\xa3" + dash
    yield "an HLS playlist", b"RIFF\1\1\1\1AVI " + hls
    yield "unknown binary data", b"FLV\1" + b"\n" * 5000 + hls
    yield "unknown binary data", b"\x1a\x45\xdf\xa3" + b" " * 5000 + dash


def test_lists_of_other_files_are_never_obeyed(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F-66, F-67
    opened = []
    sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
    secret = make_clip(tmp_path / "secret.ts", container="mpegts")
    monkeypatch.setattr(decoders, "decode", lambda *a: pytest.fail("a decoder saw the file"))
    for kind, data in playlists(secret):
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        opened.clear()
        for source in (path, data):
            with pytest.raises(MediaError, match=f"it holds {kind}"):
                read_video(source)
        assert str(secret) not in opened
        assert str(path) in opened


def test_pyav_alone_would_refuse_them_too(tmp_path: Path) -> None:  # F-66: the second lock
    secret = make_clip(tmp_path / "secret.ts", container="mpegts")
    for _, data in playlists(secret):
        for demuxer in set(decoders.DEMUXERS.values()) | {"hls"}:
            with pytest.raises(MediaError):
                decoders.decode(decoders.Reader(io.BytesIO(data), 9), demuxer, "x", FrameChoice(), ClipLimits(), "pyav")


@pytest.mark.parametrize(
    "source",
    [
        *("http://127.0.0.1:9/a.mp4", "rtsp://127.0.0.1/a", "file:{clip}", "concat:{clip}|{clip}", "crypto:{clip}"),
        *("subfile,,start,0,end,0,,:{clip}", "pipe:0", "async:{clip}", "{clip}?x=1"),
    ],
)
def test_strings_that_ffmpeg_would_obey(source: str, clip: Path) -> None:  # F-68
    with pytest.raises(MediaError, match=r"looks like a URL; nothing is fetched|cannot be opened"):
        read_video(source.format(clip=clip))


LONG = """
import resource, sys, time
from perception import decoders
from perception.media import read_video
steps = []
advance = decoders._Walk._advance
class Counted:
    def __init__(self, frames): self.frames = frames
    def __iter__(self): return self
    def __next__(self): steps.append(1); return next(self.frames)
def counted(self, pts):
    if not isinstance(self._frames, Counted): self._frames = Counted(self._frames)
    return advance(self, pts)
decoders._Walk._advance = counted
decoders.installed(sys.argv[2])
begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
video = read_video(sys.argv[1], max_frames=32, backend=sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(video), video.num_frames, video.indices[-1], len(steps), (after - before) // 1024, time.monotonic() - begin)
"""


@pytest.fixture(scope="module")
def eight_hours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28800 frames, one a second, a key frame every fifty."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return make_clip(path, frames=8 * 3600, fps=1, codec="mpeg4", gop=50, size=(64, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_hours(backend: str, eight_hours: Path) -> None:  # F-69
    run = subprocess.run(
        [sys.executable, "-c", LONG, str(eight_hours), backend], capture_output=True, text=True, check=True, timeout=120
    )
    frames, total, last, decoded, megabytes, seconds = map(float, run.stdout.split())
    assert (frames, total, last) == (32, 28800, 28799)
    assert megabytes < 500
    assert seconds < 20
    if backend == "pyav":
        assert 32 <= decoded < 32 * 60


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_too_large_to_read_through(
    backend: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "EXACT_BYTES", 100)
    if backend == "pyav":  # torchcodec takes the rate at its word
        shaky = make_clip(tmp_path / "shaky.mkv", times=[20 + 100 * index - index % 3 * 10 for index in range(40)])
        assert numbers(read_video(shaky, indices=[1, 2, 20, 38], backend=backend).frames) == [1, 2, 20, 38]
    video = read_video(clip, indices=[0, 3, 5, 20, 39], backend=backend)
    assert numbers(video.frames) == [0, 3, 5, 20, 39]
    assert (video.num_frames, video.fps) == (40, 10)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_huge_frames_are_refused_by_the_header(backend: str, tmp_path: Path) -> None:  # F-70
    path = tmp_path / "huge.mov"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16000, 16000, "rgb24"
        packet = av.Packet(b"\x89PNG\r\n\x1a\n" + bytes(500))
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        file.mux(packet)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LimitError, match=r"is 16000x16000, 256000000 pixels; the limit is max_pixels=50000000"):
        read_video(path, backend=backend)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_are_settings(backend: str, clip: Path) -> None:
    with pytest.raises(LimitError, match="is 64x48, 3072 pixels; the limit is max_pixels=3000"):
        read_video(clip, max_pixels=3000, backend=backend)
    with pytest.raises(LimitError, match=r"4 frames of 64x48 .* max_clip_pixels=9000, ask for fewer"):
        read_video(clip, max_frames=4, max_clip_pixels=9000, backend=backend)
    assert len(read_video(clip, max_frames=4, max_clip_pixels=4 * 3072, backend=backend)) == 4


class Slow(io.BytesIO):
    """A disk that takes its time."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(0.2)
        return super().read(min(size or 0, 256))


class Failing(io.BytesIO):
    """A disk that fails in the middle."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 500:
            raise OSError(5, "Input/output error")
        return super().read(min(size or 0, 256))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_that_never_ends(backend: str, clip: Path) -> None:  # F-71
    slow = Slow(clip.read_bytes() + bytes(10**6))
    begin = time.monotonic()
    with pytest.raises(MediaError, match=r"took longer than timeout=0.5 seconds|cannot be decoded"):
        read_video(slow, timeout=0.5, backend=backend)
    # The file ends for the thread that was left behind, so it ends too.
    while any(thread.name == "perception-decode" for thread in threading.enumerate()):
        assert time.monotonic() - begin < 5
        time.sleep(0.05)
    assert numbers(read_video(clip, indices=[3], backend=backend).frames) == [3]


def test_a_decoder_that_never_ends(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F-71
    forever = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(decoders, "decode", lambda *a: forever.wait(20))
        begin = time.monotonic()
        with pytest.raises(MediaError, match=r"took longer than timeout=0.3 seconds"):
            read_video(clip, timeout=0.3)
        assert time.monotonic() - begin < 5
    forever.set()
    assert numbers(read_video(clip, indices=[3]).frames) == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_fails_while_it_is_read(backend: str, clip: Path) -> None:
    with pytest.raises(MediaError, match=r"cannot be read: .*Input/output error"):
        read_video(Failing(clip.read_bytes()), backend=backend)
    assert len(read_video(clip, max_frames=2, backend=backend)) == 2


@pytest.mark.timeout(120)
def test_a_decoder_of_its_own_process(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F-71
    inside = read_video(clip, max_frames=5, backend="pyav")
    outside = read_video(clip, max_frames=5, backend="pyav", isolate=True, timeout=60)
    assert torch.equal(inside.frames, outside.frames)
    assert (inside.indices, inside.timestamps, inside.fps) == (outside.indices, outside.timestamps, outside.fps)
    with pytest.raises(ConfigError, match="indices has 77, but the clip has 40 frames"):
        read_video(clip.read_bytes(), indices=[77], backend="pyav", isolate=True, timeout=60)

    with monkeypatch.context() as patched:
        patched.setattr(decoders, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        with pytest.raises(MediaError, match="the decoder's process died with status -9"):
            read_video(clip, isolate=True)
        patched.setattr(decoders, "CHILD", "import time; time.sleep(600)")
        begin = time.monotonic()
        with pytest.raises(MediaError, match=r"took longer than timeout=0.5 seconds"):
            read_video(clip, isolate=True, timeout=0.5)
        assert time.monotonic() - begin < 5
    assert len(read_video(clip, max_frames=5)) == 5


class Missing:
    """An installation in which decoders cannot be imported."""

    def __init__(self, errors: dict[str, Exception]):
        self.errors = errors

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in self.errors:
            raise self.errors[name.split(".")[0]]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def block(**errors: Exception) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in errors]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Missing(errors), *sys.meta_path])
        decoders.installed.cache_clear()

    yield block
    decoders.installed.cache_clear()


def test_ffmpeg_is_missing(without, clip: Path) -> None:  # type: ignore[no-untyped-def]  # F-03
    without(torchcodec=RuntimeError("Could not load libtorchcodec.\nLikely causes: ..."), av=ImportError("No module"))
    with pytest.raises(MediaError) as caught:
        read_video(clip)
    message = str(caught.value)
    assert "torchcodec does not work here (RuntimeError: Could not load libtorchcodec.)" in message
    assert "pyav does not work here (ImportError: No module)" in message
    assert "pip install 'perception-vision[video]'" in message
    assert "\n" not in message


def test_torchcodec_alone_is_missing(without, clip: Path) -> None:  # type: ignore[no-untyped-def]  # F-03
    without(torchcodec=OSError("libavutil.so.60: cannot open shared object file"))
    video = read_video(clip, indices=[5])
    assert (video.backend, numbers(video.frames)) == ("pyav", [5])
    with pytest.raises(MediaError, match="torchcodec does not work here"):
        read_video(clip, backend="torchcodec")


def test_an_unknown_backend(clip: Path) -> None:
    with pytest.raises(ConfigError, match="expected 'auto', 'torchcodec' or 'pyav'"):
        read_video(clip, backend="decord")  # type: ignore[arg-type]


def test_containers_are_told_by_their_bytes(tmp_path: Path) -> None:
    for suffix, (codec, container) in CONTAINERS.items():
        path = make_clip(
            tmp_path / "clip.bin",
            frames=30,
            fps=25,
            codec=codec,
            container=container or {"mkv": "matroska"}.get(suffix, suffix),
        )
        assert sniff(path.read_bytes()[:4096]) in decoders.DEMUXERS, suffix
