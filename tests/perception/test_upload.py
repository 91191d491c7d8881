"""Parts of a batch on their way to a device."""

import pytest
import torch

from perception.kernels.upload import parts_on


@pytest.mark.parametrize(("size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (9, [5]), (None, [5])])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parts(size: int | None, sizes: list[int], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(5, 3)
    like = torch.zeros(1, dtype=torch.bfloat16, device=device)
    parts = list(parts_on(x, size, like))
    assert [len(part) for part in parts] == sizes
    assert {(part.dtype, part.device.type) for part in parts} == {(torch.bfloat16, device)}
    assert torch.equal(torch.cat(parts).cpu(), x.bfloat16())


def test_nothing_to_send() -> None:
    assert torch.cat(list(parts_on(torch.zeros(0, 3), 4, torch.zeros(1)))).shape == (0, 3)
