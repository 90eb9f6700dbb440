import pytest
import torch

from training.layers.gather import sum_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_and_their_gradient_equal_plain_indexing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    index, weight = torch.randint(7, (50, 3), generator=generator), torch.rand(50, 3, generator=generator).to(dtype)
    index[index == 4] = 5  # a row that nobody takes
    told = torch.randn(50, 6, generator=generator).to(dtype)
    tables = [torch.randn(9, 6, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        tables[1].copy_(tables[0])
    said = sum_rows(tables[0], index, weight), (tables[1][index] * weight[..., None]).sum(1)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(*said, **near)
    for one in said:
        one.backward(told)
    torch.testing.assert_close(tables[0].grad, tables[1].grad, **near)
    assert tables[0].grad is not None
    assert not tables[0].grad[[4, 7, 8]].any()
