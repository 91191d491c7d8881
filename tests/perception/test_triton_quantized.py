"""Linear maps in eight and four bits: the kernels equal their twins, the product the formula, and the gate holds."""

import pytest
import torch
from triton_here import DEVICE, DTYPES, randn, same

from perception.errors import ConfigError
from perception.kernels.matvec import round4, unround
from perception.kernels.triton import int4, language, quantized
from perception.kernels.triton.int4 import Product4
from perception.kernels.triton.quantized import Code, Product

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


@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_the_gate_of_a_model(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that pass one by one and not together: those that lose most go back first, an eighth at a time."""
    monkeypatch.setattr(language, "INTERPRETED", False)  # the kernels' plain twins
    g = torch.Generator().manual_seed(0)
    maps = [torch.linalg.qr(torch.randn(64, 64, generator=g))[0].to(DEVICE) for _ in range(48)]
    products = [Product(weight) for weight in maps]
    x = randn(20, 64, seed=1)

    def run() -> torch.Tensor:
        y = x
        for product in products:
            y = product(y)
        return y

    wanted, each = run(), quantized.settle(products, run, code)
    assert min(each) > quantized.GATE
    left = [cosine for cosine, product in zip(each, products, strict=True) if product.code]
    assert 0 < len(left) < len(products)
    assert max(set(each) - set(left)) <= min(left)
    assert quantized.similarity(run(), wanted) >= quantized.WHOLE[code]
    assert not any(product.watching or product.sample is not None for product in products)
    for product in products:
        product.restore()
    assert torch.equal(run(), wanted)
    del products[2:]
    quantized.settle(products, run, code)
    assert [product.code for product in products] == [code, code]  # two together do no harm


def test_sizes_the_units_do_not_take() -> None:
    product = Product(randn(7, 48))
    product.watching = True
    product(randn(3, 48))
    assert product.settle("int8") == 0
    assert product.code is None


def test_an_unknown_code() -> None:
    with pytest.raises(ConfigError, match="no code 'int5' of eight bits; there are: int8, fp8"):
        quantized.check_code("int5", torch.device("cpu"))


# --- Four bits --------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("N", "K"), [(5, 32), (20, 96), (16, 320)])
def test_four_bits_are_what_every_device_rounds_to(dtype: torch.dtype, N: int, K: int) -> None:
    weight = randn(N, K, dtype=dtype)
    packed = int4.pack(weight)
    wanted = unround(*round4(weight, 64 if K % 64 == 0 else 32))
    assert packed[0].shape == (N, K // 2)
    same(int4.unpack(*packed, dtype), wanted.to(dtype))
    same(int4.unpack_plain(*packed, torch.float32), wanted)


@dtypes
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("N", "K"), [(5, 32), (20, 96), (33, 320)])
def test_a_few_rows_by_four_bits(dtype: torch.dtype, rows: int, N: int, K: int) -> None:
    """Groups of 64 and of 32, outputs that fill no program, inputs that end inside a step of it."""
    x, packed = randn(rows, K, dtype=dtype, seed=1), int4.pack(randn(N, K, dtype=dtype))
    got = int4.few_rows(x, *packed)
    assert got.dtype == dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # the interpreter cuts bits off
    numbers = unround(*round4(randn(N, K, dtype=dtype), 64 if K % 64 == 0 else 32))
    for wanted in (int4.few_rows_plain(x, *packed), x.double() @ numbers.double().T):
        assert torch.linalg.vector_norm(got - wanted) <= rounding * torch.linalg.vector_norm(wanted)


def test_a_product_in_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many give the same, each its own way; views of x are read as they mean."""
    read, sizes = int4.few_rows, list[int]()
    monkeypatch.setattr(int4, "few_rows", lambda x, *packed: (sizes.append(len(x)), read(x, *packed))[1])
    weight = randn(24, 64)
    product = Product4(weight)
    x = randn(4, 9, 128, seed=2)[..., :64]
    many = product(x)
    assert not sizes
    few = torch.cat([product(row) for row in x])
    assert sizes == [9] * 4
    assert many.shape == (4, 9, 24)
    assert torch.linalg.vector_norm(few - many.flatten(0, 1)) < 1e-6 * torch.linalg.vector_norm(many)
    assert torch.nn.functional.cosine_similarity(many.flatten(), (x @ weight.T).flatten(), dim=0) > 0.98
    assert product(x[:0]).shape == (0, 9, 24)


def test_what_four_bits_refuse() -> None:
    assert not int4.takes(randn(8, 48))
    with pytest.raises(ValueError, match=r"K a multiple of 32; given weight \(8, 48\)"):
        int4.pack(randn(8, 48))
    packed = int4.pack(randn(8, 64))
    with pytest.raises(ValueError, match="x is M K, codes N K/2"):
        int4.few_rows(randn(2, 32), *packed)
    with pytest.raises(ValueError, match="x is M K, codes N K/2"):
        int4.unpack(packed[0], packed[1][:4], packed[2], torch.float32)
