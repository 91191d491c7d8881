"""Products with few rows: every form gives what the rounded weights give, compiled or not."""

import pytest
import torch
import torch.nn.functional as F

from perception.errors import ConfigError
from perception.kernels import matvec
from perception.kernels.cpp import kernels
from perception.kernels.matvec import (
    Panels4,
    Panels8,
    Rounded,
    Rows,
    Torch4,
    Torch8,
    TorchRows,
    round4,
    round8,
    round_rows,
    stream,
    together,
    unround,
)

needs_compiler = pytest.mark.skipif(kernels() is None, reason="no C++ compiler here")
SHAPES = [(48, 64), (37, 40), (200, 96), (33, 1088)]  # outputs and inputs that fill neither panel, group nor vector


def sample(n: int, k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n + k + rows)
    return torch.randn(n, k, generator=g) * k**-0.5, torch.randn(rows, k, generator=g)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weights_in_rows(n: int, k: int, rows: int) -> None:
    weight, x = sample(n, k, rows)
    close(Rows(weight).few(x), F.linear(x, weight))
    half = weight.bfloat16()
    close(Rows(half).few(x), F.linear(x, half.float()))
    assert Rows(half).weight.data_ptr() == half.data_ptr()  # the model's own memory


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_panels_of_8_bits(n: int, k: int, rows: int) -> None:
    weight, x = sample(n, k, rows)
    exact, layer = unround(*round8(weight)), Panels8(weight)
    close(layer.few(x), round_rows(x) @ exact.t())
    assert torch.equal(layer.dense(0, n), exact)
    assert torch.equal(layer.dense(16, n), exact[16:])


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 4, 6])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("n", [16, 37])
def test_panels_of_4_bits(n: int, group: int, rows: int) -> None:
    weight, x = sample(n, 384, rows)
    exact, layer = unround(*round4(weight, group)), Panels4(weight, group)
    close(layer.few(x), round_rows(x) @ exact.t())
    assert torch.equal(layer.dense(0, n), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_compiler
def test_many_rows_give_what_few_rows_give(dtype: torch.dtype) -> None:
    weight, x = sample(96, 128, 64)
    layer = Rows(weight.to(dtype))
    assert len(x) > matvec.FEW
    # where the processor computes in bfloat16 the inputs are rounded, too
    close(layer(x), layer.few(x), 1e-5 if dtype == torch.float32 else 1e-2)
    for made in (Panels8(weight), Panels4(weight, 64)):
        close(super(type(made), made).many(x), x @ made.dense(0, 96).t())
        close(made(x), x @ made.dense(0, 96).t(), 1e-2)


def test_blocks_cover_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matvec, "BLOCK", 40 * 64)  # two panels and a half: blocks of 32 outputs
    weight, x = sample(100, 64, 50)
    close(matvec.Streamed.many(TorchRows(weight), x), x @ weight.t())


@pytest.mark.parametrize("group", [32, 64])
def test_without_a_compiler(group: int) -> None:
    weight, x = sample(64, 128, 3)
    close(Torch8(weight).few(x), x @ unround(*round8(weight)).t(), 1e-5)
    close(Torch8(weight).many(x), x @ unround(*round8(weight)).t(), 1e-5)
    close(Torch4(weight, group).few(x), x @ unround(*round4(weight, group)).t(), 1e-2)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_choice_without_a_compiler(quantize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matvec, "kernels", lambda build: None)
    weight, x = sample(64, 128, 3)
    layer = stream(weight, quantize)
    assert not isinstance(layer, Panels8 | Panels4)
    assert type(layer) is not Rows
    rounded = {None: weight, "int8": unround(*round8(weight)), "int4": unround(*round4(weight, 64))}[quantize]
    close(layer(x), x @ rounded.t(), 1e-2)
    monkeypatch.setattr(matvec, "_torch_runs", lambda name, group: False)  # nor torch's own kernels
    if quantize:
        assert isinstance(stream(weight, quantize), Rounded)
        close(stream(weight, quantize)(x), x @ rounded.t())


def test_maps_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """One map where torch's operators copy the weights; else each its own. What comes out is what each gives alone."""
    weights = [sample(n, 64, 3)[0] for n in (37, 16, 20)]
    x = sample(37, 64, 3)[1]
    monkeypatch.setattr(matvec, "kernels", lambda build: None)
    for quantize in ("int8", "int4"):
        (one,) = together(weights, quantize)
        close(one(x), torch.cat([stream(weight, quantize)(x) for weight in weights], dim=1), 1e-6)
    for form, count in (("onednn", 1), ("plain", 3)):
        monkeypatch.setattr(matvec, "choose", lambda *a, form=form, **b: form)
        maps = together(weights)
        assert len(maps) == count
        close(torch.cat([part(x) for part in maps], dim=1), F.linear(x, torch.cat(weights)))
    assert maps[1].weight.data_ptr() == weights[1].data_ptr()
    monkeypatch.setattr(matvec, "compiled", lambda kind, build: True)
    assert [[type(part) for part in together(weights, quantize)] for quantize in (None, "int8", "int4")] == [
        [Rows] * 3,
        [Panels8] * 3,
        [Panels4] * 3,
    ]


@needs_compiler
def test_the_choice_with_a_compiler() -> None:
    weight = sample(64, 96, 1)[0]
    assert isinstance(stream(weight, "int8"), Panels8 | Torch8)
    found = stream(weight, "int4")
    assert not isinstance(found, Panels4) or found.scale.shape[1] == 3  # 64 does not divide 96, 32 does
    assert isinstance(stream(weight[:, :40], "int4"), Panels8 | Torch8)  # no group divides 40


def test_rounding_is_within_half_a_step() -> None:
    weight = sample(24, 128, 1)[0]
    rounded, scale = round8(weight)
    assert float((unround(rounded, scale) - weight).abs().div(scale[:, None]).max()) <= 0.5001
    rounded, scale, offset = round4(weight, 32)
    steps = (unround(rounded, scale, offset) - weight).unflatten(1, (-1, 32)).abs() / scale.float()[..., None]
    # ends may be a little off, as scale and offset are bfloat16: by 15 steps of 2**-9, and of the offset's own
    assert float(steps.max()) < 0.56
    assert torch.equal(unround(*round8(torch.zeros(3, 32))), torch.zeros(3, 32))
    assert torch.equal(unround(*round4(torch.zeros(3, 32), 32)), torch.zeros(3, 32))


@needs_compiler
@pytest.mark.parametrize("form", [Rows, Panels8, lambda w: Panels4(w, 32)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(form, bad: float) -> None:
    weight, x = sample(32, 64, 2)
    x[1, 40] = bad
    y = form(weight).few(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_weights_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="quantised already"):
        stream(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(ConfigError, match="a matrix on a CPU"):
        stream(torch.zeros(4))


@needs_compiler
def test_the_kernel_refuses_what_does_not_fit() -> None:
    product = torch.ops.perception.matvec
    with pytest.raises(RuntimeError, match="for 8 inputs"):
        product(torch.zeros(1, 8), torch.zeros(4, 9), torch.empty(0), 0)
    with pytest.raises(RuntimeError, match="no int8 panels"):
        product(torch.zeros(1, 64), torch.zeros(1, 8, 64, dtype=torch.int8), torch.zeros(16), 16)
    with pytest.raises(RuntimeError, match="float32"):
        product(torch.zeros(1, 8).double(), torch.zeros(4, 8), torch.empty(0), 0)
