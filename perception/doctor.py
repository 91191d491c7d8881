"""What works on this machine, and what to do about the rest."""

import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import perception

CORE = ("torch", "numpy", "pillow", "einops", "safetensors", "huggingface_hub", "regex", "ftfy", "typer", "tqdm")
# extra -> the packages it brings: import name, distribution name
EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "video": (("torchcodec.decoders", "torchcodec"), ("av", "av")),
    "retrieval": (("faiss", "faiss-cpu"), ("pyarrow", "pyarrow")),
    "interop": (("timm", "timm"), ("open_clip", "open_clip_torch")),
    "lm": (("tiktoken", "tiktoken"), ("tokenizers", "tokenizers"), ("jinja2", "jinja2")),
    "train": (("peft", "peft"), ("tensorboard", "tensorboard")),
    "quantize": (("torchao", "torchao"),),
    "serve": (("fastapi", "fastapi"), ("uvicorn", "uvicorn")),
    "eval": (("sklearn", "scikit-learn"), ("lmms_eval", "lmms-eval")),
    "ray": (("ray.data", "ray"),),
    "lance": (("lancedb", "lancedb"),),
    "hf": (("transformers", "transformers"),),
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None: not installed, and nothing needs it."""

    group: str
    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def diagnose() -> list[Check]:
    """Every check. Extras are really imported: a package that is installed and does not load is found out here."""
    return [*_house(), *_core(), *_devices(), *_extras()]


def report(checks: list[Check]) -> str:
    """The checks as a table for people."""
    lines, group = [], ""
    for check in checks:
        if check.group != group:
            group = check.group
            lines.append(f"\n{group}")
        mark = {True: "ok", False: "FAIL", None: "-"}[check.ok]
        lines.append(f"  {mark:<5}{check.name:<27}{check.detail}")
        if check.fix:
            lines.append(f"       {'':<27}fix: {check.fix}")
    return "\n".join(lines).lstrip("\n")


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"ok": healthy(checks), "checks": [asdict(check) for check in checks]}


def healthy(checks: list[Check]) -> bool:
    """False when something that `import perception_encoder` needs is broken; an extra that fails is not that."""
    return not any(check.ok is False and check.group != "extras" for check in checks)


def foreign_perception() -> str | None:
    """Who else owns the import name `perception` here, or None; PyPI's `Perception` (image hashing) has it too."""
    ours = "perception-vision"
    owners = {name for name in packages_distributions().get("perception", []) if name.lower() != ours}
    if owners:
        return ", ".join(sorted(owners))
    spec = importlib.util.find_spec("perception")
    if getattr(sys.modules.get("perception"), "__distribution__", None) != ours and spec is not None:
        return str(spec.origin)
    return None


def _house() -> list[Check]:
    ours = getattr(perception, "__version__", "unknown")
    checks = [
        Check("perception-vision", "version", True, f"{ours}, from {Path(__file__).parent.parent}"),
        Check(
            "perception-vision",
            "python",
            sys.version_info >= (3, 11),
            f"{platform.python_version()}, {platform.platform()}",
        ),
    ]
    foreign = foreign_perception()
    fix = "pip uninstall Perception; pip install --force-reinstall --no-deps perception-vision" if foreign else ""
    detail = f"another package shares the import name `perception`: {foreign}" if foreign else "`perception` is ours"
    return [*checks, Check("perception-vision", "import name", foreign is None, detail, fix)]


def _core() -> list[Check]:
    checks = []
    for name in CORE:
        try:
            checks.append(Check("core", name, True, version(name)))
        except PackageNotFoundError:
            checks.append(Check("core", name, False, "not installed", "pip install perception-vision"))
    return checks


def _devices() -> list[Check]:
    try:
        import torch

        from perception.device import available_devices
    except Exception as error:  # a torch that does not load is what this report is asked about
        return [Check("devices", "torch", False, _first_line(error), "pip install --force-reinstall torch")]

    names = {d: torch.cuda.get_device_name(d) if d.startswith("cuda") else "" for d in available_devices()}
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return [Check("devices", d, True, name or (threads if d == "cpu" else "")) for d, name in names.items()]


def _extras() -> list[Check]:
    checks = []
    for extra, packages in EXTRAS.items():
        found = [_try(extra, module, distribution) for module, distribution in packages]
        if extra == "video":
            found = _either(found)
        checks += found
    return checks


def _try(extra: str, module: str, distribution: str, load: Callable[[str], Any] = importlib.import_module) -> Check:
    name = f"{extra}: {distribution}"
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return Check("extras", name, None, f"not installed (pip install 'perception-vision[{extra}]')")
    try:
        load(module)
    except Exception as error:
        return Check(
            "extras", name, False, f"{installed}, does not load: {_first_line(error)}", _remedy(distribution, error)
        )
    return Check("extras", name, True, installed)


def _either(found: list[Check]) -> list[Check]:
    """Either video reader is enough: the one that fails is then a remark, not a fault."""
    if not any(check.ok for check in found):
        return found
    return [
        replace(check, ok=None, detail=f"{check.detail}; the other one is used") if check.ok is False else check
        for check in found
    ]


def _remedy(distribution: str, error: Exception) -> str:
    if distribution == "torchcodec":
        return "install FFmpeg (apt-get install ffmpeg, brew install ffmpeg) and the torchcodec made for this torch"
    if "torchvision" in str(error):
        import torch

        return (
            f"torch {torch.__version__} and the torchvision here do not belong together; install the matching release"
        )
    return f"pip install --force-reinstall {distribution}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
