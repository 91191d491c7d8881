"""What happened in a run: a line of JSON a step, TensorBoard where it is installed, a bar with the time left."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from perception.files import atomic_write

# Dense bf16 operations a second, of data sheets; what MFU is measured against.
PEAKS = {
    "B200": 2250e12,
    "GB200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


class Metrics:
    """The record of a run in its folder; a run that is resumed takes its record back to where it begins again."""

    def __init__(self, folder: Path, *, steps: int, step: int = 0, tensorboard: bool = True, bar: bool | None = None):
        from tqdm import tqdm

        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._cut(step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _board(folder, step) if tensorboard else None
        hidden = not sys.stderr.isatty() if bar is None else not bar
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=hidden, smoothing=0.05)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, line["step"])

    def advance(self, step: int, **shown: Any) -> None:
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _cut(self, step: int) -> None:
        """Drop lines of steps that will be done again, and half a line that a killed process left."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's record."""
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _board(folder: Path, step: int) -> Any:
    """A writer that tells TensorBoard to forget what earlier ones wrote of the steps after this one."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def peak_flops(device: torch.device) -> float | None:
    """bf16 operations a second of the device, None where they are not known."""
    if device.type != "cuda":
        return None
    words = re.split(r"[^0-9A-Za-z]+", torch.cuda.get_device_name(device))  # whole ones: an A1000 is no A100
    return next((PEAKS[word] for word in words if word in PEAKS), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was held on a CUDA device since `reset`; elsewhere the most this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
