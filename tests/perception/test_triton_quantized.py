"""Linear maps in eight bits: the kernels equal their twins, the product equals the formula, and the gate holds."""

import pytest
import torch
from triton_here import DEVICE, DTYPES, randn, same

from perception.errors import ConfigError
from perception.kernels.triton import quantized
from perception.kernels.triton.quantized import Product

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("width", [16, 99])
def test_rows_to_codes(dtype: torch.dtype, width: int) -> None:
    x = randn(5, width, dtype=dtype) * torch.tensor([1e-3, 1, 0, 50, 1], device=DEVICE, dtype=dtype)[:, None]
    codes, scale = quantized.quantize_rows(x, "int8")
    wanted, wanted_scale = quantized.quantize_rows_plain(x, "int8")
    assert (codes.int() - wanted.int()).abs().max() <= 1  # a tie may fall either way
    assert (codes == wanted).float().mean() > 0.98
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    assert codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    torch.testing.assert_close(codes * scale[:, None], x.float(), rtol=0, atol=float(scale.max()) * 0.51)


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_int8_product(dtype: torch.dtype, bias: bool, rows: int) -> None:
    x, weight = randn(rows, 48, dtype=dtype), randn(32, 48, dtype=dtype, seed=1)
    added = randn(32, dtype=dtype, seed=2) if bias else None
    codes, weights = (quantized.quantize_rows_plain(t, "int8") for t in (x, weight))
    got = quantized.int8_product(codes[0], weights[0], codes[1], weights[1], added, dtype)
    total = codes[0].double() @ weights[0].double().T
    same(got, quantized.rescale_plain(total.int(), codes[1], weights[1], added, dtype))
    assert got.dtype == dtype
    near = torch.nn.functional.linear(x, weight, added).float()
    assert torch.nn.functional.cosine_similarity(got.float(), near, dim=-1).min() > 0.999


@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_a_product_settles(code: str) -> None:
    if code == "fp8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no fp8")
    product = Product(randn(32, 48, dtype=torch.bfloat16), randn(32, dtype=torch.bfloat16, seed=1))
    x = randn(2, 9, 48, dtype=torch.bfloat16, seed=2)
    wanted = product(x)
    product.watching = True
    product(x)
    assert product.settle(code) >= 0.999
    assert product.code == code
    assert product.sample is None
    got = product(x)
    assert got.shape == wanted.shape
    assert not torch.equal(got, wanted)
    assert torch.nn.functional.cosine_similarity(got.float(), wanted.float(), dim=-1).min() > 0.998
    product.release()
    torch.testing.assert_close(product(x), got)


def test_the_gate() -> None:
    """One channel a thousand times the others takes all of the range; a map that needs the others stays."""
    weight = randn(32, 48)
    weight[:, 0] = 0
    product = Product(weight)
    x = randn(9, 48, seed=1)
    x[:, 0] = 1e4
    product.watching = True
    wanted = product(x)
    assert product.settle("int8") < 0.999
    assert product.code is None
    assert torch.equal(product(x), wanted)
    product.release()
    assert torch.equal(product(x), wanted)


def test_sizes_the_units_do_not_take() -> None:
    product = Product(randn(7, 48))
    product.watching = True
    product(randn(3, 48))
    assert product.settle("int8") == 0
    assert product.code is None


def test_an_unknown_code() -> None:
    with pytest.raises(ConfigError, match="no code 'int5' of eight bits; there are: int8, fp8"):
        quantized.check_code("int5", torch.device("cpu"))
