"""Packed linears, compiled operators and the probe that chooses: each equal to its plain twin, none required."""

import logging
import os
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.attention import attend
from perception.errors import ConfigError
from perception.kernels import cpp, fused, linear, probe
from perception.kernels.fused import TORCH
from perception.kernels.linear import FORMS, Late, finish, fold, pack, quantize_rows_plain
from perception.rope import rope_2d, rotate

FLOATS = ["plain", "transposed", "onednn"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def near(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def compiled() -> object:
    operators = cpp.kernels()
    if operators is None:
        pytest.skip("no C++ compiler here, or it cannot build the kernels")
    return operators


# ---------------------------------------------------------------- the probe


def wait(milliseconds: float, result: Tensor):
    def call(x: Tensor) -> Tensor:
        end = time.perf_counter() + milliseconds / 1000
        while time.perf_counter() < end:
            pass
        return result[: len(x)]

    return call


def test_the_fastest_right_rival_wins() -> None:
    right, wrong = torch.ones(9), torch.full((9,), 1.01)

    def raises(x: Tensor) -> Tensor:
        raise NotImplementedError("not on this machine")

    rivals = {"right": wait(1, right), "wrong": wait(0.1, wrong), "raises": raises, "nan": wait(0.1, right * torch.nan)}
    assert probe.race(("plain", wait(4, right)), rivals, torch.zeros(9)) == "right"
    assert probe.race(("plain", wait(4, right)), {"wrong": rivals["wrong"]}, torch.zeros(9)) == "plain"
    assert probe.race(("plain", wait(1, right)), {"slower": wait(4, right)}, torch.zeros(9)) == "plain"


class Stopwatch:
    """A clock that only calls move on, each by its own seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, list[str]()
        monkeypatch.setattr(probe.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float):
        def run(x: Tensor) -> Tensor:
            self.log.append(name)
            self.now += seconds
            return x

        return run


def test_a_rival_has_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Stopwatch(monkeypatch).call
    plain, near, clear = ("plain", call("plain", 1.0)), {"near": call("near", 0.98)}, {"clear": call("clear", 0.96)}
    assert probe.race(plain, near, torch.ones(9)) == "plain"
    assert probe.race(plain, near | clear, torch.ones(9)) == "clear"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 8), (0.02, 3), (0.1, 2), (5.0, 1)])
def test_a_race_takes_little_time_on_a_slow_machine(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    clock = Stopwatch(monkeypatch)
    probe.race(("plain", clock.call("plain", seconds)), {"rival": clock.call("rival", seconds)}, torch.ones(9))
    before = {"plain": 3, "rival": 4}  # on a few rows, before the first round
    assert {name: clock.log.count(name) - before[name] for name in before} == {"plain": rounds, "rival": rounds}


def test_races_for_shapes_have_an_allowance(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """A second a model; what was found until then stays, and the next model may go on."""
    clock, raced = Stopwatch(monkeypatch), list[tuple[int, int]]()

    def won(dtype: torch.dtype, k: int, n: int, rows: int) -> str:
        raced.append((k, n))
        clock.now += 0.6
        return "onednn"

    monkeypatch.setattr(linear, "_choose", lambda *a: "plain")
    monkeypatch.setattr(linear, "_choose_for", won)
    shapes = [(8, 16), (8, 16), (8, 24), (8, 32), (8, 16)]
    found = [linear.choose(torch.float32, shape=shape) for shape in shapes]
    assert found == ["onednn", "onednn", "onednn", "plain", "onednn"]
    assert raced == [(8, 16), (8, 24)]
    linear.renew()
    assert linear.choose(torch.float32, shape=(8, 32)) == "onednn"


def test_what_the_machine_does_is_measured_once() -> None:
    first = probe.capabilities()
    assert probe.capabilities() is first
    assert first.float32 in FLOATS
    assert first.bfloat16 in (*FLOATS, "float32")
    assert first.int8 in (None, "int8", "int8-narrow")
    assert probe.gemm_limit(torch.float32, 32, 64, 64) > 0
    assert probe.read_bandwidth(1 << 22) > 0


# ---------------------------------------------------------------- linears


@pytest.mark.parametrize("form", [*FLOATS, "float32", "int8", "int8-narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_is_the_plain_linear(form: str, dtype: torch.dtype, bias: bool) -> None:
    if form == "int8" and not linear._exact():
        pytest.skip("this processor's int8 product saturates: the narrow form is for it")
    w, b, x, r = draw(48, 96) / 10, draw(48) if bias else None, draw(2, 5, 96), draw(2, 5, 48)
    try:
        layer = FORMS[form](w.to(dtype), None if b is None else b.to(dtype), dtype)
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"{form} {dtype} does not exist on this processor: {str(error)[:60]}")
    tolerance = 0.03 if "int8" in form else linear.TOLERANCE[dtype]
    x, r = x.to(dtype), r.to(dtype)
    wanted = F.linear(x.float(), w.to(dtype).float(), None if b is None else b.to(dtype).float())
    assert layer(x).dtype == dtype
    assert near(layer(x), wanted) < tolerance
    assert near(layer(x, r), wanted + r.float()) < tolerance
    assert near(layer.gelu(x), F.gelu(wanted)) < tolerance
    y, late = layer.unfinished(x)
    assert near(finish(y, late), wanted) < tolerance
    total, rest = layer.accumulate(x, r.clone())
    assert near(total if rest is None else total + rest, wanted + r.float()) < tolerance
    assert form in repr(layer)


def test_a_gain_folds_exactly() -> None:
    w, b, gain, x = draw(8, 16), draw(8), draw(8), draw(5, 16)
    assert near(pack(w, b, gain=gain)(x), gain * F.linear(x, w, b)) < 1e-6
    assert near(F.linear(x, *fold(w, None, gain)), gain * F.linear(x, w)) < 1e-6
    assert fold(w, b) == (w, b)


def test_packing_leaves_the_source_alone() -> None:
    w, b = draw(8, 16), draw(8)
    before = w.clone(), b.clone()
    pack(w, b, gain=draw(8))(draw(3, 16))
    assert torch.equal(w, before[0])
    assert torch.equal(b, before[1])
    with pytest.raises(ConfigError, match="no quantisation 'int4'"):
        pack(w, b, quantize="int4")  # type: ignore[arg-type]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Nothing remembered, before and after."""

    def forget() -> None:
        for cached in (
            linear._choose,
            linear._exact,
            linear._epilogue,
            linear._checked,
            fused._choose,
        ):
            cached.cache_clear()
        probe._capabilities.cache_clear()
        linear._fastest.clear()
        linear._spent.clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


def test_a_form_that_is_wrong_for_a_shape_is_not_used(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    class Wrong(linear.Transposed):
        def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
            return super()._product(x, bias) * 1.001

    monkeypatch.setitem(FORMS, "transposed", Wrong)
    monkeypatch.setattr(linear, "choose", lambda *a: "transposed")
    layer, x = pack(draw(24, 40), None), draw(3, 40)
    assert layer.form == "plain"
    assert torch.equal(layer(x), F.linear(x, draw(24, 40)))


def test_operators_that_are_missing_are_done_without(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    monkeypatch.setattr(torch.ops, "onednn", Nothing())
    assert linear.choose(torch.float32) in ("plain", "transposed")
    assert linear.choose(torch.float32, "int8") in ("plain", "transposed")
    assert linear.choose(torch.bfloat16) in ("plain", "float32")
    assert near(pack(draw(24, 48), None, quantize="int8")(draw(3, 48)), draw(3, 48) @ draw(24, 48).T) < 1e-5


def test_the_int8_form_in_use_never_saturates(fresh: None) -> None:
    if not (form := linear.choose(torch.float32, "int8")).startswith("int8"):
        pytest.skip("no int8 product here is both right and faster")
    x, w = torch.ones(32, 256), torch.ones(64, 256)  # the largest values everywhere: the largest sums there are
    assert near(FORMS[form](w, None, torch.float32)(x), torch.full((32, 64), 256.0)) < 0.01


def test_rounding_to_8_bits_meets_zero_and_stays_within_half_a_step(compiled: object) -> None:
    for levels in (255, 180):
        for x in (draw(33, 70) * 3, F.gelu(draw(33, 70)), draw(2, 3, 5).abs(), torch.zeros(4, 8), -draw(9, 16).abs()):
            for values, scale, zero in (quantize_rows_plain(x, levels), compiled.quantize(x, levels)):
                error = ((values.float() - zero) * scale[..., None] - x).abs()
                assert values.dtype == torch.uint8
                assert int(values.max()) <= levels
                assert float((error / scale[..., None]).max()) < 0.501
                assert float(error[x == 0].max() if (x == 0).any() else 0) == 0
    assert compiled.quantize(torch.zeros(0, 4), 255)[0].shape == (0, 4)


def test_one_strange_row_does_not_spoil_the_others(compiled: object) -> None:
    x = draw(64, 96)
    x[5] = -100 * x[5].abs()  # all of it on one side, and by far the largest
    for values, scale, zero in (quantize_rows_plain(x, 255), compiled.quantize(x, 255)):
        back = (values.float() - zero) * scale[..., None]
        rest = torch.arange(64) != 5
        assert near(back[rest], x[rest]) < 0.01
        assert near(back[5], x[5]) < 0.02


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_spoils_itself_alone(compiled: object, strange: float) -> None:
    x = draw(64, 96)
    x[5, 7] = strange
    for values, scale, zero in (quantize_rows_plain(x, 255), compiled.quantize(x, 255)):
        rest = torch.arange(64) != 5
        back = (values.float() - zero) * scale[..., None]
        assert near(back[rest], x[rest]) < 0.01


# ---------------------------------------------------------------- compiled operators


@pytest.mark.parametrize(
    ("B", "h", "w", "P", "heads", "d"),
    [(1, 1, 1, 0, 1, 8), (2, 5, 3, 1, 3, 24), (2, 14, 14, 1, 2, 64), (1, 7, 11, 0, 2, 96), (1, 20, 13, 1, 1, 128),
     (3, 2, 2, 1, 2, 20)],
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_compiled_attention(compiled: object, B: int, h: int, w: int, P: int, heads: int, d: int, causal: bool) -> None:
    N, D, rope = h * w + P, heads * d, rope_2d(h, w, d, prefix=P)
    qkv, bias, factor = draw(B, N, 3 * D + 8)[..., : 3 * D], draw(3 * D), draw(B, N).abs() + 0.5

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = (qkv.float() * factor[..., None] + bias).unflatten(-1, (3, heads, d)).unbind(2)
        return attend(rotate(q, rope), rotate(k, rope), v, causal=causal).flatten(2)

    got = compiled.attention(qkv, heads, bias, factor, *rope, causal)
    assert near(got, plain(qkv)) < 2e-6
    half = qkv.bfloat16()
    got = compiled.attention(half, heads, bias, factor, *rope, causal)
    assert got.dtype == torch.bfloat16
    assert near(got, plain(half)) < 4e-3
    q, k, v = qkv.unflatten(-1, (3, heads, d)).unbind(2)
    bare = attend(q, k, v, causal=causal).flatten(2)
    assert near(compiled.attention(qkv, heads, None, None, None, None, causal), bare) < 2e-6


def test_compiled_attention_of_extremes(compiled: object) -> None:
    qkv = draw(1, 40, 48)
    qkv[0, :, :16] *= 1e4  # one key wins by far: no overflow, no loss of the rest
    q, k, v = qkv.unflatten(-1, (3, 1, 16)).unbind(2)
    got = compiled.attention(qkv, 1, None, None, None, None, False)
    assert near(got, attend(q, k, v).flatten(2)) < 1e-4
    qkv[0, 7, 0] = torch.nan  # a query that is no number; the others do not see it
    got = compiled.attention(qkv, 1, None, None, None, None, False)
    assert got[0, 7].isnan().all()
    assert got[0, [i for i in range(40) if i != 7]].isfinite().all()
    assert compiled.attention(torch.zeros(0, 4, 48), 1, None, None, None, None, False).shape == (0, 4, 16)


def test_compiled_attention_uses_the_threads_it_is_given(compiled: object) -> None:
    qkv, before = draw(2, 50, 3 * 32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compiled.attention(qkv, 2, None, None, None, None, False)
        torch.set_num_threads(3)
        assert torch.equal(compiled.attention(qkv, 2, None, None, None, None, False), one)
    finally:
        torch.set_num_threads(before)


def test_compiled_operators_refuse_what_they_cannot_read(compiled: object) -> None:
    x = draw(2, 4, 48)
    for call in (
        lambda: compiled.attention(x, 5, None, None, None, None, False),
        lambda: compiled.attention(x.double(), 1, None, None, None, None, False),
        lambda: compiled.attention(x, 1, draw(47), None, None, None, False),
        lambda: compiled.attention(x, 1, None, None, draw(3, 8), draw(3, 8), False),
        lambda: compiled.attention(draw(1, 2, 3 * 130), 1, None, None, None, None, False),
        lambda: compiled.norm(x.transpose(1, 2), None, None, None, 1e-5),
        lambda: compiled.norm(x, draw(3), None, None, 1e-5),
        lambda: compiled.gelu_(x.half(), None, None),
        lambda: compiled.quantize(x, 300),
        lambda: tree(compiled, rows=torch.tensor([[0, 9]]), counts=torch.tensor([2])),
        lambda: tree(compiled, rows=torch.tensor([[0, 1]]), counts=torch.tensor([3])),
        lambda: tree(compiled, rows=torch.tensor([[0, 1]]), counts=torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError):
            call()


def tree(operators: object, rows: Tensor, counts: Tensor) -> Tensor:
    return operators.attention_paths(draw(1, 8), draw(4, 16), rows.int(), counts.int(), 1, None)


@pytest.mark.parametrize(("heads", "d"), [(2, 64), (3, 10)])
def test_compiled_attention_along_paths(compiled: object, heads: int, d: int) -> None:
    R, L, T, D = 300, 9, 40, heads * d
    kv, q, bias = draw(T, 3 * D)[:, D:], draw(R, 3 * D)[:, :D], draw(3 * D)
    path = torch.randint(0, T, (R, L), generator=torch.Generator().manual_seed(1)).int()
    lengths = (torch.arange(R) % L + 1).int()
    for b in (bias, None):
        wanted = TORCH.tree(q, kv, path, lengths, heads, b)
        assert near(compiled.attention_paths(q, kv, path, lengths, heads, b), wanted) < 2e-6


@pytest.mark.parametrize(("M", "D"), [(5, 7), (3, 64), (700, 48)])
def test_compiled_norm_and_gelu(compiled: object, M: int, D: int) -> None:
    x, bias, factor = draw(M, D) * 2 + 50, draw(D), draw(M).abs()
    norm = torch.nn.LayerNorm(D).requires_grad_(False)
    norm.weight.copy_(draw(D))
    norm.bias.copy_(draw(D) + 1)
    a, b = x.clone(), x.clone()
    got = compiled.norm(a, bias, norm.weight, norm.bias, norm.eps)
    assert near(got, TORCH.norm(b, norm, bias)) < 2e-5  # the mean is 25 times the spread
    assert torch.equal(a, b)
    assert near(compiled.norm(x.clone(), None, None, None, 1e-5), F.layer_norm(x, (D,))) < 2e-5
    x = draw(M, D) * 4
    for late in (Late(), Late(bias), Late(bias, factor), Late(None, factor)):
        y = x.clone()
        compiled.gelu_(y, late.bias, late.scale)
        torch.testing.assert_close(y, TORCH.gelu(x.clone(), late), rtol=1e-5, atol=1e-6)
    far = torch.tensor([[-40.0, -9.0, 40.0, 0.0, torch.nan]])
    compiled.gelu_(far, None, None)
    torch.testing.assert_close(far, torch.tensor([[0.0, 0.0, 40.0, 0.0, torch.nan]]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_attention_of_a_packed_qkv(dtype: torch.dtype) -> None:
    rope, qkv, bias = rope_2d(3, 4, 8, prefix=1), draw(2, 13, 48).to(dtype), draw(48).to(dtype)
    q, k, v = (qkv + bias).unflatten(-1, (3, 2, 8)).unbind(2)
    wanted = attend(rotate(q, rope), rotate(k, rope), v).flatten(2)
    assert near(TORCH.attention(qkv.clone(), 2, rope, Late(bias)), wanted) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_operators_that_are_wrong_here_are_not_used(
    compiled: object, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    def wrong(qkv: Tensor, heads: int, rope: object, late: Late) -> Tensor:
        return compiled.attention(qkv, heads, late.bias, late.scale, None, None, False)  # does not turn

    monkeypatch.setattr(fused, "attention_compiled", wrong)
    assert fused.operators(torch.float32, torch.device("cpu"), 8).attention is TORCH.attention


# ---------------------------------------------------------------- building


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty extension cache and no memory of what was built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp, "_loaded", {})
    monkeypatch.setattr(cpp, "_failed", set())
    cpp.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpp.library.cache_clear()


def test_without_a_compiler_there_are_no_kernels(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpp.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert cpp.kernels() is None
        assert cpp.kernels() is None
    assert len(caplog.records) == 1  # said once
    assert not cpp.has_compiler()
    assert fused.operators(torch.float32, torch.device("cpu"), 64) is TORCH


def test_nothing_is_built_unasked(elsewhere: Path) -> None:
    assert cpp.kernels(build=False) is None
    assert not (elsewhere / "cache").exists()


def test_a_build_that_fails_is_reported_once(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not cpp.has_compiler():
        pytest.skip("no C++ compiler and ninja here")
    sources = elsewhere / "cpu"
    sources.mkdir()
    (sources / "broken.cpp").write_text("#error not today\n")
    monkeypatch.setattr(cpp, "SOURCES", sources)
    with caplog.at_level(logging.WARNING):
        assert cpp.kernels() is None
        assert cpp.kernels() is None
    assert len(caplog.records) == 1


def test_a_library_that_does_not_load_is_not_used(elsewhere: Path) -> None:
    cpp.library().parent.mkdir(parents=True)
    cpp.library().write_bytes(b"no library")
    assert cpp.kernels(build=False) is None


def test_the_name_follows_the_sources(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpp.library()
    sources = elsewhere / "cpu"
    sources.mkdir()
    (sources / "a.cpp").write_text("int x;\n")
    monkeypatch.setattr(cpp, "SOURCES", sources)
    cpp.library.cache_clear()
    assert cpp.library() != before


def test_a_build_waits_for_no_other(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks and rubbish of killed builds are there; the build goes its own way and the result is found whole."""
    if not cpp.has_compiler():
        pytest.skip("no C++ compiler and ninja here")
    sources = elsewhere / "cpu"
    sources.mkdir()
    (sources / "small.cpp").write_text("int perception_small() { return 1; }\n")  # no torch inside: built in a second
    monkeypatch.setattr(cpp, "SOURCES", sources)
    home = cpp.library().parent
    old, young = home / "build-old", home / "build-young"
    for directory in (home, old, young):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "lock").touch()
    os.utime(old, (0, 0))
    assert cpp.kernels() is not None
    assert sorted(path.name for path in home.iterdir()) == ["build-young", "lock", cpp.library().name]
    cpp._loaded.clear()
    assert cpp.kernels(build=False) is not None  # what the next process finds


@pytest.mark.parametrize("home", ["/proc/nobody", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_done_without(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str
) -> None:
    monkeypatch.setattr(cpp, "has_compiler", lambda: True)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    cpp.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cpp.kernels(build=False) is None
        assert cpp.kernels() is None
        assert cpp.kernels() is None
    assert len(caplog.records) == 1


def test_native_code_is_never_taken_from_where_we_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody's home
    cpp.library.cache_clear()
    assert cpp.library().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp.library.cache_clear()
    assert cpp.library().is_relative_to(tmp_path)
    cpp.library.cache_clear()


def test_a_cache_that_cannot_be_read_is_done_without(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cpp.Path, "is_file", refuse)
    assert cpp.kernels(build=False) is None


# ---------------------------------------------------------------- the form of each shape


def test_a_form_is_chosen_for_the_shape(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """What wins at one shape is not taken at another without a race; what wins nowhere by much is plain."""

    class Uneven(linear.Transposed):
        def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
            if self.in_features == 80:
                time.sleep(0.12)
            return super()._product(x, bias)

    class Slow(linear.PackedLinear):
        def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
            time.sleep(0.05)  # far beyond what a busy machine adds
            return super()._product(x, bias)

    monkeypatch.setitem(linear.RIVALS, torch.float32, ("transposed",))
    monkeypatch.setitem(FORMS, "transposed", Uneven)
    monkeypatch.setitem(FORMS, "plain", Slow)
    monkeypatch.setattr(linear, "ALLOWANCE", float("inf"))
    assert pack(draw(48, 64), None).form == "transposed"
    assert pack(draw(48, 80), None).form == "plain"
    raced = len(linear._fastest)
    assert pack(draw(48, 80), None, rows=200).form == "plain"
    assert len(linear._fastest) == raced  # about as many rows: raced once
    pack(draw(48, 80), None, rows=577)
    assert len(linear._fastest) == raced + 1


def test_races_stay_small_and_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ALLOWANCE", float("inf"))
    assert [linear._about(rows) for rows in (17, 65, 197, 257, 577, 4096)] == [64, 64, 192, 192, 576, 576]
    linear.choose(torch.float32, shape=(3000, 5000), rows=600)
    raced = len(linear._fastest)
    linear.choose(torch.float32, shape=(1024, 4096), rows=1500)  # the same race stands for it
    assert len(linear._fastest) == raced


@torch.inference_mode()
def test_two_layouts_for_few_rows_and_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose", lambda dtype, q, rows, shape: "plain" if rows > 384 else "transposed")
    w, b = draw(24, 40), draw(24)
    layer = pack(w, b, rows=64, most=1600)
    assert layer.form == "transposed or plain"
    for rows, form in ((384, "transposed"), (385, "plain")):
        x, into = draw(1, rows, 40), draw(1, rows, 24)
        wanted = F.linear(x, w, b)
        assert layer.at(x).form == form
        assert near(layer(x), wanted) < 1e-6
        assert near(layer(x, into.clone()), wanted + into) < 1e-6
        assert near(layer.gelu(x), F.gelu(wanted)) < 1e-6
        assert near(finish(*layer.unfinished(x)), wanted) < 1e-6
        total, rest = layer.accumulate(x, into.clone())
        assert near(total if rest is None else total + rest, wanted + into) < 1e-6
    assert pack(w, b, rows=64).form == "transposed"  # one layout unless many rows are announced
    assert pack(w, b, rows=600, most=1600).form == "plain"


def test_a_long_race_is_cut_short() -> None:
    calls = []

    def rival(x: Tensor) -> Tensor:
        calls.append(len(x))
        return wait(20 if len(x) > 8 else 0, torch.ones(99))(x)

    plain = ("plain", lambda x: wait(20 if len(x) > 8 else 0, torch.ones(99))(x))
    assert probe.race(plain, {"alike": rival}, torch.zeros(99), budget=0.05) == "plain"
    assert calls.count(99) == 3
