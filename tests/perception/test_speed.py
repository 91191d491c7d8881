"""`perception doctor --speed`: limits, shares, and models that this package does not know."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from perception import speed
from perception.attention import attention_kernel
from perception.cli import build
from perception.errors import ConfigError
from perception.speed import Case, Limits, cases, reached, report
from perception_encoder.config import VisionConfig
from perception_encoder.speed import flops
from perception_encoder.vision import VisionTransformer
from perception_lm import speed as language
from perception_lm.config import DecoderConfig
from perception_lm.decoder import Decoder
from perception_lm.zoo import load_model

LIMITS = Limits(threads=2, instructions="AVX2", float32=100.0, bfloat16=90.0, int8=None, read=40.0)


def test_shares_are_of_the_float32_product(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def work(seconds: float) -> object:
        now[0] += seconds
        return None

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    row = reached(Case("a model", 20e9, lambda: work(0.4), lambda: lambda: work(0.25)), LIMITS)
    assert (row.plain_ms, row.fast_ms) == pytest.approx((400, 250))
    assert (row.plain_share, row.fast_share) == pytest.approx((0.5, 0.8))
    text = report(LIMITS, [row])
    assert "float32 100   bfloat16 90   int8 -" in text
    assert "a model" in text
    assert "400.0 ms       50%" in text
    assert text.endswith("product")


def test_what_takes_longer_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GFLOP at 100 GFLOP/s are 0.2 s, 16 GB at 40 GB/s 0.4 s; what a cache holds may be read faster than that."""
    now = [0.0]

    def work(seconds: float) -> object:
        now[0] += seconds
        return None

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    for seconds in (0.5, 0.2):
        row = reached(Case("a model", 20e9, lambda: work(0.8), lambda s=seconds: lambda: work(s), 16e9), LIMITS)
        assert (row.plain_share, row.fast_share, row.bound) == (
            pytest.approx(0.5),
            pytest.approx(0.4 / seconds),
            "memory",
        )
        assert ("stay in a cache" in report(LIMITS, [row])) == (seconds == 0.2)
    few = reached(Case("a model", 20e9, lambda: work(0.4), lambda: lambda: work(0.25), 4e9), LIMITS)
    assert (few.plain_share, few.bound) == (pytest.approx(0.5), "product")


def test_packages_say_what_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def some(names: list[str]) -> Iterator[Case]:
        asked.append(list(names))
        if not names or "theirs" in names:
            yield Case("theirs, 1 picture", 1.0, lambda: None, lambda: lambda: None)

    monkeypatch.setattr(speed, "_modules", lambda: [SimpleNamespace(cases=some)])
    assert [case.name for case in cases()] == ["theirs, 1 picture"]
    assert [case.name for case in cases(["theirs"])] == ["theirs, 1 picture"]
    with pytest.raises(ConfigError, match="no model nobodys"):
        list(cases(["theirs", "nobodys"]))
    assert asked == [[], ["theirs"], ["theirs", "nobodys"]]


def test_the_encoder_is_found_through_its_entry_point() -> None:
    assert "perception_encoder.speed" in [module.__name__ for module in speed._modules()]
    (case,) = cases(["PE-Core-nano"])
    assert case.name == "PE-Core-nano, 8 pictures of 64"
    with torch.inference_mode():
        assert case.plain().shape == case.fast()().shape


def test_the_language_model_is_found_through_its_entry_point() -> None:
    """By default, a prompt and a token behind others; the same step each time it is called."""
    assert "perception_lm.speed" in [module.__name__ for module in speed._modules()]
    prompt, step = cases(["PLM-nano"])
    assert (prompt.name, step.name) == ("PLM-nano, prompt of 512 tokens", "PLM-nano, a token behind 256")
    assert [case.name for case in language.cases()] == [prompt.name, step.name]
    with torch.inference_mode():
        for case in (prompt, step):
            plain, fast = case.plain(), case.fast()()
            assert plain.shape == fast.shape
            assert plain.shape[:2] == (1, 1)
        assert torch.equal(step.plain(), step.plain())
    decoder = load_model("PLM-nano", device="cpu", dtype="float32")[0].decoder
    assert step.read == sum(p.nbytes for p in decoder.parameters()) - decoder.norm.weight.nbytes


def test_the_decoders_arithmetic_is_what_torch_counts() -> None:
    """But for the pairs that no token may look at, which a plain product of queries and keys has as well."""
    from torch.utils.flop_counter import FlopCounterMode

    config = DecoderConfig(width=24, depth=2, heads=4, kv_heads=2, head_dim=6, mlp_width=40, vocab=50, tied=False)
    decoder = Decoder(config).eval()
    cache = decoder.new_cache(1, 9)
    for tokens, seen in ((8, 0), (1, 8)):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_kernel("reference"):
            decoder(torch.zeros(1, tokens, 24), cache, last=1)
        unseen = config.depth * 4 * tokens * (tokens - 1) // 2 * config.heads * config.head_dim
        assert language.flops(config, tokens, seen) == counter.get_total_flops() - unseen


@pytest.mark.parametrize("pool", ["attention", None])
def test_arithmetic_is_what_torch_counts(pool: str | None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = VisionConfig(
        image_size=32,
        patch_size=8,
        width=24,
        depth=2,
        heads=2,
        mlp_width=40,
        pool=pool,
        pool_heads=2,
        output_width=16 if pool else None,
    )
    tower = VisionTransformer(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_kernel("reference"):
        (tower.pooled if pool else tower)(torch.zeros(1, 3, 32, 32))
    assert flops(config) == counter.get_total_flops()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "limits", lambda: LIMITS)
    monkeypatch.setattr(speed, "SAMPLE", 0.01)
    done = CliRunner().invoke(build(), ["doctor", "--speed", "--model", "PE-Core-nano", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["limits"]["read"] == 40.0
    (row,) = found["models"]
    assert row["plain_ms"] > 0
    assert row["fast_ms"] > 0
    unknown = CliRunner().invoke(build(), ["doctor", "--speed", "--model", "PE-Core-mini"])
    assert isinstance(unknown.exception, ConfigError)


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "perception.kernels.probe.capabilities", lambda: SimpleNamespace(threads=1, instructions="X", int8=None)
    )
    monkeypatch.setattr(
        "perception.kernels.probe.gemm_limit", lambda dtype, *shape, **_: 2.0 if dtype is torch.float32 else 1.0
    )
    monkeypatch.setattr("perception.kernels.probe.read_bandwidth", lambda: 3.0)
    assert speed.limits() == Limits(1, "X", 2.0, 1.0, None, 3.0)
