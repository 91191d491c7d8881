"""The two video decoders, torchcodec and PyAV, made to give the same frames. `perception.media.read_video` calls them.

Both get an open file and never a name. PyAV is also told which demuxer to use and allowed no protocol, so a file that
is not what it seemed cannot make FFmpeg open another one.

N frames  H W pixels
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from perception.errors import ConfigError, LimitError, MediaError
from perception.media import DEMUXERS, ClipLimits, FrameChoice, Video

EXACT_BYTES = 512 * 2**20  # larger files are not read through to count their frames; the header is believed
# torchcodec seeks by time, and without an index in the file lands on the wrong frame (MPEG streams, FLV).
INDEXED = ("mov", "matroska", "avi")
CHILD = "from perception.decoders import serve_one; serve_one()"
INSTALL = "pip install 'perception-vision[video]'"


class _Failed(Exception):
    """This decoder cannot; another one may."""


class Reader(io.RawIOBase):
    """A file as decoders may see it: past the deadline, or after an error, it simply ends.

    The decoders call `read` from C, where an exception has nowhere good to go.
    """

    def __init__(self, file: BinaryIO, timeout: float):
        self._file, self._deadline = file, time.monotonic() + timeout
        self.error: Exception | None = None
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if self.error is not None or time.monotonic() > self._deadline:
            return b""
        try:
            data = self._file.read(size)
        except Exception as error:
            self.error = error
            return b""
        return data if size < 0 else data[:size]

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            self.error = error
            return -1

    def tell(self) -> int:
        return self._file.tell()


def decode(
    reader: Reader, demuxer: str, name: str, choice: FrameChoice, limits: ClipLimits, backend: str = "auto"
) -> tuple[Video, str]:
    """The chosen frames, and a note on what is missing of a damaged file ("" when nothing is).

    Raises MediaError when no decoder is installed or none can read the file.
    """
    if backend not in ("auto", *_DECODERS):
        raise ConfigError(f"backend={backend!r}; expected 'auto', 'torchcodec' or 'pyav'")
    names = [backend] if backend != "auto" else ["torchcodec", "pyav"] if demuxer in INDEXED else ["pyav"]
    reasons = []
    for candidate in names:
        if why_not := installed(candidate):
            reasons.append(f"{candidate} does not work here ({why_not})")
            continue
        reader.seek(0)
        try:
            return _DECODERS[candidate](reader, demuxer, name, choice, limits)
        except _Failed as error:
            reasons.append(f"{candidate}: {error}")
        if reader.error is not None:
            raise MediaError(f"{name} cannot be read: {_short(reader.error)}") from reader.error
    hint = f"; {INSTALL}" if all("does not work here" in reason for reason in reasons) else ""
    raise MediaError(f"{name} cannot be decoded: {'; '.join(reasons)}{hint}")


@cache
def installed(backend: str) -> str:
    """Why a decoder cannot be used here; empty when it can. Only importing finds missing libraries."""
    try:
        if backend == "torchcodec":
            import torchcodec.decoders  # noqa: F401
        else:
            import av  # noqa: F401
    except Exception as error:  # ImportError, and RuntimeError or OSError when FFmpeg is not there
        return f"{type(error).__name__}: {_short(error)}"
    return ""


# --- torchcodec ---------------------------------------------------------------------------------------------------


def _with_torchcodec(
    reader: Reader, demuxer: str, name: str, choice: FrameChoice, limits: ClipLimits
) -> tuple[Video, str]:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(reader, seek_mode="exact" if reader.size <= EXACT_BYTES else "approximate")
    except Exception as error:
        if isinstance(error, ValueError) and "video stream" in str(error):
            raise MediaError(f"{name} has no video stream") from error
        raise _Failed(_short(error)) from error
    about = decoder.metadata
    if not about.num_frames or not about.width or not about.height:
        raise _Failed("no frames")
    fps, num_frames = float(about.average_fps or 0), int(about.num_frames)
    chosen = choice.pick(num_frames, fps)
    limits.check(about.width, about.height, len(chosen), name)

    wanted = sorted(set(chosen))
    found: dict[int, tuple[Tensor, float]] = {}
    try:
        batch = decoder.get_frames_at(wanted)
        found = dict(zip(wanted, zip(batch.data, batch.pts_seconds.tolist(), strict=True), strict=True))
    except Exception:  # one bad frame fails them all: take them one by one
        for index in wanted:
            try:
                frame = decoder.get_frame_at(index)
            except Exception:  # told below, as missing
                continue
            found[index] = (frame.data, float(frame.pts_seconds))
    if not found:
        raise _Failed("none of the chosen frames can be decoded")
    times = [time for _, (_, time) in sorted(found.items())]
    if any(later <= earlier for earlier, later in pairwise(times)):
        raise _Failed("frames are not where the file says")
    begin = float(about.begin_stream_seconds or 0)
    frames = {index: (data, time - begin) for index, (data, time) in found.items()}
    duration = float(about.duration_seconds or 0)
    note = _note(len(chosen), sum(i in found for i in chosen), about.num_frames_from_header, num_frames)
    return _clip(frames, chosen, fps, num_frames, duration, "torchcodec"), note


# --- PyAV ---------------------------------------------------------------------------------------------------------


def _with_pyav(reader: Reader, demuxer: str, name: str, choice: FrameChoice, limits: ClipLimits) -> tuple[Video, str]:
    with _Walk(reader, demuxer, name) as walk:
        context = walk.stream.codec_context
        if context is None:
            raise _Failed("no decoder for this codec")
        timeline = walk.timeline()
        if timeline.num_frames < 1:
            raise _Failed("no frames")
        chosen = choice.pick(timeline.num_frames, timeline.fps)
        limits.check(context.width, context.height, len(chosen), name)
        found = {}
        for index in sorted(set(chosen)):
            if (frame := walk.to(timeline.pts(index))) is not None:
                pixels = frame.to_ndarray(format="rgb24", width=context.width, height=context.height)
                pixels = np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
                seconds = float((frame.pts - timeline.pts(0)) * frame.time_base)
                found[index] = (torch.from_numpy(pixels).permute(2, 0, 1), seconds)
        promised = walk.stream.frames
    if not found:
        raise _Failed("none of the chosen frames can be decoded")
    note = _note(len(chosen), sum(i in found for i in chosen), promised, timeline.num_frames)
    return _clip(found, chosen, timeline.fps, timeline.num_frames, timeline.duration, "pyav"), note


@dataclass
class _Timeline:
    """When each frame of a stream is shown, in the stream's clock."""

    num_frames: int
    fps: float
    duration: float
    times: list[int] | None  # of each frame; None when only the rate is known
    first: int = 0
    step: float = 0.0
    keys: list[tuple[int, int]] = field(default_factory=list)  # shown, decoded: of the frames that stand alone

    @property
    def slack(self) -> float:
        # A header gives a rate, not the time of each frame: half a frame to either side is that frame.
        return 0.0 if self.times is not None else self.step / 2

    def pts(self, index: int) -> int:
        return self.times[index] if self.times is not None else self.first + round(index * self.step)


class _Walk:
    """Forward through a stream, jumping when a nearer start is known."""

    # Streams without an index land near a time, not on it: try again from further back, and last from the beginning.
    BACK = (0, 2, 10, None)

    def __init__(self, reader: Reader, demuxer: str, name: str):
        self._reader, self._demuxer, self._name = reader, demuxer, name
        self._frames: Iterator[Any] | None = None
        self._here: Any = None
        self._timeline = _Timeline(0, 0.0, 0.0, None)
        self._open()

    def _open(self) -> None:
        import av

        self._reader.seek(0)
        try:
            self.container = av.open(self._reader, format=self._demuxer, options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise _Failed(_short(error)) from error
        cover = av.stream.Disposition.attached_pic  # the picture on a song
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams:
            self.container.close()
            raise MediaError(f"{self._name} has no video stream")
        self.stream = streams[0]

    def __enter__(self) -> "_Walk":
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def timeline(self) -> _Timeline:
        """Read through the packets of the stream, or believe the header of a very large file."""
        import av

        stream, clock = self.stream, float(self.stream.time_base or 0)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if self._reader.size > EXACT_BYTES and rate > 0 and clock > 0:
            seconds = stream.duration * clock if stream.duration else (self.container.duration or 0) / 1e6
            number = stream.frames or int(seconds * rate)
            self._timeline = _Timeline(number, rate, seconds, None, stream.start_time or 0, 1 / (rate * clock))
            return self._timeline

        times, keys, end = [], [], 0
        try:
            for packet in self.container.demux(stream):
                shown = packet.pts if packet.pts is not None else packet.dts
                if packet.size and shown is not None and not packet.is_discard:
                    times.append(shown)
                    end = max(end, shown + (packet.duration or 0))
                    if packet.is_keyframe:
                        keys.append((shown, shown if packet.dts is None else packet.dts))
        except av.error.FFmpegError:  # cut short: what came before counts
            pass
        times.sort()
        seconds = (end - times[0]) * clock if times else 0.0
        fps = len(times) / seconds if seconds > 0 else rate
        self._timeline = _Timeline(len(times), fps, seconds, times, keys=sorted(keys))
        return self._timeline

    def to(self, pts: int) -> Any:
        """The frame shown at `pts`, or None when the file does not have it. Times must rise from call to call."""
        slack = self._timeline.slack
        if self._here is not None and abs(self._here.pts - pts) <= slack:
            return self._here
        if self._frames is not None and self._here is not None and self._start(pts)[0] <= self._here.pts:
            frame = self._advance(pts)
            if frame is not None and frame.pts <= pts + slack:
                return frame
        return self._jump(pts)

    def _start(self, pts: int) -> tuple[float, int]:
        """When the nearest frame that stands alone is shown, and when it is decoded: jumps go by the second."""
        keys = self._timeline.keys
        if not keys:  # not known: two seconds ahead are worth a jump
            return pts - 2 * self._second, pts
        return keys[max(0, bisect_right(keys, (pts, sys.maxsize)) - 1)]

    @property
    def _second(self) -> int:
        return round(1 / float(self.stream.time_base or 1))

    def _jump(self, pts: int) -> Any:
        import av

        for back in self.BACK:
            if back is None:
                self.container.close()
                self._open()
            else:
                try:
                    self.container.seek(self._start(pts)[1] - back * self._second, stream=self.stream)
                except av.error.FFmpegError:
                    continue
            self._frames, self._here = self.container.decode(self.stream), None
            frame = self._advance(pts)
            if frame is not None and frame.pts <= pts + self._timeline.slack:
                return frame
        return None

    def _advance(self, pts: int) -> Any:
        import av

        assert self._frames is not None
        try:
            for frame in self._frames:
                if frame.pts is not None:
                    self._here = frame
                    if frame.pts >= pts - self._timeline.slack:
                        return frame
        except (av.error.FFmpegError, ValueError):  # damage: the caller jumps past it, or gives up
            pass
        self._frames = None
        return None


_DECODERS: dict[str, Callable[..., tuple[Video, str]]] = {"torchcodec": _with_torchcodec, "pyav": _with_pyav}


def _clip(
    found: dict[int, tuple[Tensor, float]],
    chosen: list[int],
    fps: float,
    num_frames: int,
    duration: float,
    backend: str,
) -> Video:
    here = [index for index in chosen if index in found]
    return Video(
        frames=torch.stack([found[index][0] for index in here]),
        timestamps=tuple(found[index][1] for index in here),
        indices=tuple(here),
        fps=fps,
        num_frames=num_frames,
        duration=duration,
        backend=backend,
    )


def _note(chosen: int, found: int, promised: int | None, num_frames: int) -> str:
    notes = []
    if promised and promised > num_frames + 2:  # edit lists hide a frame or two of a whole file
        notes.append(f"its header promises {promised} frames and {num_frames} are there")
    if found < chosen:
        notes.append(f"{chosen - found} of {chosen} chosen frames cannot be decoded")
    return " and ".join(notes)


def _short(error: BaseException) -> str:
    """The first line of an error, without the source file it happens to name."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    if ".cpp:" in line:
        line = line.split(".cpp:", 1)[1].partition(", ")[2] or "cannot be decoded"
    return line[:160]


# --- a decoder of its own process ---------------------------------------------------------------------------------


def decode_in_child(
    file: BinaryIO, kind: str, name: str, choice: FrameChoice, limits: ClipLimits, backend: str, timeout: float
) -> tuple[Video, str]:
    """`decode` in a process that is started for it, and killed when it takes too long."""
    indices = None if choice.indices is None else [int(index) for index in choice.indices]
    order = {
        "demuxer": DEMUXERS[kind],
        "name": name,
        "choice": {**asdict(choice), "indices": indices},
        "limits": asdict(limits),
        "backend": backend,
        "timeout": timeout,
    }
    command = [sys.executable, "-c", CHILD, json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        _on_disk(file) as media,
        subprocess.Popen(
            command, stdin=media, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as child,
    ):
        try:
            answer, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            raise MediaError(f"{name} took longer than timeout={timeout:g} seconds to decode") from None
    header, newline, pixels = answer.partition(b"\n")
    if not newline:
        raise MediaError(f"{name}: the decoder's process died with status {child.returncode}")
    reply = json.loads(header)
    if "error" in reply:
        kinds = {error.__name__: error for error in (MediaError, LimitError, ConfigError)}
        raise kinds[reply["error"]](reply["message"])
    shape, note = reply.pop("shape"), reply.pop("note")
    frames = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
    reply["timestamps"], reply["indices"] = tuple(reply["timestamps"]), tuple(reply["indices"])
    return Video(frames=frames, **reply), note


def serve_one() -> None:
    """The child: an order as argument, the file on standard input, JSON and pixels to standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is not pixels
    order = json.loads(sys.argv[1])
    try:
        with os.fdopen(0, "rb", closefd=False) as file:
            video, note = decode(
                Reader(file, order["timeout"]),
                order["demuxer"],
                order["name"],
                FrameChoice(**order["choice"]),
                ClipLimits(**order["limits"]),
                order["backend"],
            )
    except (MediaError, LimitError, ConfigError) as error:
        out.write(json.dumps({"error": type(error).__name__, "message": str(error)}).encode() + b"\n")
    else:
        about = {key: value for key, value in vars(video).items() if key != "frames"}
        out.write(json.dumps({**about, "shape": list(video.frames.shape), "note": note}).encode() + b"\n")
        out.write(video.frames.contiguous().numpy().tobytes())
    out.flush()


def _on_disk(file: BinaryIO) -> Any:
    """The file with a descriptor a child can inherit; what lives in memory is written out."""
    try:
        return os.fdopen(os.dup(file.fileno()), "rb")
    except (OSError, AttributeError):
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        file.seek(0)
        spool.write(file.read())
        spool.flush()
        spool.seek(0)
        return spool
