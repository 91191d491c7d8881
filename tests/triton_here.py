"""Triton as the tests run it: natively on a GPU, else through its interpreter on the CPU.

The interpreter is chosen when Triton is first imported, so this module comes before anything that imports Triton.
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton is not installed")

from perception.kernels.triton import language  # noqa: E402

if DEVICE == "cpu" and not language.INTERPRETED:
    pytest.fail("Triton was imported before its interpreter could be chosen; set TRITON_INTERPRET=1", pytrace=False)

DTYPES = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (2e-3, 2e-3)}  # rtol, atol


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to what rounding once more or less can do in their dtype."""
    rtol, atol = DTYPES[wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
