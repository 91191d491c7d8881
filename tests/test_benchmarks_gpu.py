"""The scripts for a GPU where there is none: they skip, say what was not run, and run on a device of make-believe."""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import plm_tiny
import pytest
import torch
from torch.overrides import TorchFunctionMode

import perception_encoder as pe
from perception.kernels.triton import language
from perception_encoder.fast import FastVision

ROOT = Path(__file__).parents[1]
NAMES = ("gpu_encoder", "gpu_attention", "gpu_decode")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """A benchmark by name; results go to a folder that is empty at first."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        for file in ("record", "harness", "gpu"):
            monkeypatch.setattr(importlib.import_module(file), "RESULTS", tmp_path)
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(ROOT / "benchmarks") in str(sys.modules[name].__file__):
            del sys.modules[name]


def start(module: ModuleType, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu(
    script: Callable[[str], ModuleType],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, table = script(name), script("table")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--quick"], ["--no-save"]):
        start(module, *arguments)
        assert not list(tmp_path.iterdir())
    start(module)
    assert "skipped: no CUDA device" in capsys.readouterr().out
    cases = json.loads((tmp_path / f"{name}.json").read_text())["cases"]
    rows = [row for case in cases.values() for row in case["gates"]]
    assert {(row["verdict"], row["why"].split(": ")[1].split(";")[0]) for row in rows} == {
        ("not run", "no CUDA device")
    }
    text = table.render(tmp_path)
    assert all(f"| {row['what']} | {row['gate']} ({row['aim']}) | not run | - |" in text for row in rows)
    first = next(iter(cases))
    cases[first] = {"gates": [], "measured": "on a GPU, once"}
    (tmp_path / f"{name}.json").write_text(json.dumps({"cases": cases}))
    start(module)
    assert (
        json.loads((tmp_path / f"{name}.json").read_text())["cases"][first] == cases[first]
    )  # what was measured stays


class MakeBelieve(TorchFunctionMode):
    """What asks for "cuda" gets the CPU, and for bfloat16, of which not every CPU is capable, float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def there(x: Any) -> Any:
            cuda = (isinstance(x, str) and x == "cuda") or (isinstance(x, torch.device) and x.type == "cuda")
            return "cpu" if cuda else torch.float32 if x is torch.bfloat16 else x

        return func(*map(there, args), **{name: there(x) for name, x in (kwargs or {}).items()})


@pytest.fixture
def make_believe(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpu, harness = script("gpu"), script("harness")
    product = gpu.gemm
    monkeypatch.setattr(gpu, "here", lambda *a: True)
    monkeypatch.setattr(gpu, "Clock", lambda: time.perf_counter)
    monkeypatch.setattr(gpu, "device", lambda: {"device": "none"})
    monkeypatch.setattr(gpu, "gemm", lambda dtype, m, k, n, times=1: product(dtype, 8, 16, 16, times))
    monkeypatch.setattr(
        gpu, "copy", lambda: harness.Limit(lambda: torch.ones(1 << 16).clone(), 8.0 * (1 << 16), "GB/s")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(harness, "GOOD", 1)  # rounds with --quick
    monkeypatch.setattr(language, "INTERPRETED", False)
    with MakeBelieve():
        yield


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr().out
    assert "Error" not in out, out  # of a contender that was left out
    return out


def test_the_encoder_script(
    script: Callable[[str], ModuleType],
    make_believe: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = script("gpu_encoder")
    small = pe.VisionConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, output_width=16)
    monkeypatch.setattr(module, "tower", lambda name: script("peers").randomise(pe.VisionTransformer(small)))
    monkeypatch.setattr(FastVision, "compile", torch.nn.Module.compile)  # the twin of a CPU, which it is, refuses
    modes: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: (modes.append(options.get("mode")), model)[1])
    monkeypatch.setattr(module, "CASES", [module.Case("B16-224", 9)])
    monkeypatch.setattr(module, "LARGE", {"B16-224": 9})
    start(module, "--quick")
    out = printed(capsys)
    assert modes == [None, "max-autotune"]  # ours chooses its own
    for name in ("ours", "ours, plain", "ours, compiled", "plain", "plain, compiled"):
        assert f"  {name} " in out
    assert "GPU, B16-224 batch 9 bf16 / plain compiled / plain, compiled: " in out
    assert "share of the matrix product's rate / limit: " in out


def test_the_attention_script(
    script: Callable[[str], ModuleType],
    make_believe: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = script("gpu_attention")
    monkeypatch.setattr(module, "TOWERS", [(16, 2, 9, 2)])
    monkeypatch.setattr(module, "CACHES", [(2, 24)])
    monkeypatch.setattr(module, "LAYERS", 2)
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(module, "DOCUMENTS", (4, 2, 9))
    start(module, "--quick")
    out = printed(capsys)
    for case in (
        "head_dim 16, 9 tokens, batch 2",
        "causal",
        "packed: 4 documents",
        "decode: batch 2",
        "rotary",
        "swiglu",
    ):
        assert case in out
    assert out.count("/ the fastest other / ") == 7
    assert "chosen by measurement:" in out


def test_a_case_whose_truth_fails_is_left_out(
    script: Callable[[str], ModuleType],
    make_believe: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what is measured is saved before the next case begins."""
    module, gpu = script("gpu_attention"), script("gpu")
    monkeypatch.setattr(module, "TOWERS", [(16, 2, 9, 2)])
    try_out, saved = gpu.try_out, []

    def without(calls: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        if saved:
            return try_out(calls)
        return {name: call for name, call in calls.items() if name != "reference"}, {"reference": "no memory left"}

    monkeypatch.setattr(gpu, "try_out", without)
    monkeypatch.setattr(module, "save", lambda name, method, cases, chosen: saved.append(list(cases)))
    start(module, "--quick", "--only", "head_dim 16")
    first, second = "head_dim 16, 9 tokens, batch 2", "head_dim 16, 9 tokens, batch 2, causal"
    assert saved == [[first], [first, second]]
    out = printed(capsys)
    assert "no memory left" in out
    assert f"GPU, {first}: auto / the fastest other: -, gate 0.95 (1.0): not run" in out
    assert f"GPU, {second}: auto / the fastest other / " in out


def test_every_attention_case_was_promised(
    script: Callable[[str], ModuleType],
    make_believe: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = script("gpu_attention")
    monkeypatch.setattr(module, "TOWERS", [(16, 2, 9, 2)])
    monkeypatch.setattr(module, "CACHES", [(2, 24)])
    monkeypatch.setattr(module, "LAYERS", 1)
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(module, "DOCUMENTS", (4, 2, 9))
    found = {}

    def compare(name: str, chosen: Any, calls: Any, limit: Any, work: float, truth: str, ours: str) -> dict[str, Any]:
        found[name] = ours, set(calls) - {ours}
        return {"threads": 0}

    monkeypatch.setattr(module, "compare", compare)
    start(module, "--quick")
    promised = module.promised()
    assert list(promised) == list(found)
    for name, (ours, others) in found.items():
        (gate,) = promised[name]
        assert gate.ours == ours
        assert others <= set(gate.peers)


@pytest.mark.slow  # transformers takes its time to be imported
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_decode_script(
    script: Callable[[str], ModuleType],
    make_believe: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    module = script("gpu_decode")

    def slice_of_1b(depth: int, tower: int) -> tuple[Any, Any]:
        config = plm_tiny.tiny_config(width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=256)
        return config, plm_tiny.tiny_model(config)

    monkeypatch.setattr(module.decode, "slice_of_1b", slice_of_1b)
    monkeypatch.setattr(module, "LARGE_PRODUCT", (8, 8, 8))
    start(module, "--quick")
    out = printed(capsys)
    for name in ("ours", "ours int8", "ours int4", "ours, plain", "transformers", "transformers, static + compile"):
        assert f"  {name} " in out
    assert "GPU, decoding, batch 1 / transformers eager / transformers: " in out
    assert "GPU, prefill of 3 tiles: share of the matrix product's rate / limit: " in out
