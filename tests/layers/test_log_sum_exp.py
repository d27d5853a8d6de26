"""The log of summed exponentials is PyTorch's over the whole matrix, however it is cut."""

import pytest
import torch

from d2kd.layers import log_sum_exp, log_sum_exp_of_products
from tests.helpers.toys import noise


@pytest.mark.parametrize("chunk", [1, 4, 7, 8])
@pytest.mark.parametrize("length", [1.0, 40.0])
def test_value_and_gradient_are_those_of_the_whole_matrix(
    chunk: int, length: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_sum_exp, "CHUNK", chunk)
    queries, keys = length * noise(3, 5, seed=1), noise(7, 5, seed=2)
    queries.requires_grad_()
    found, wanted = log_sum_exp_of_products(queries, keys), (queries @ keys.T).logsumexp(1)
    torch.testing.assert_close(found, wanted)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=queries.dtype)
    gradients = [torch.autograd.grad((x * weights).sum(), queries)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_products_beyond_the_range_of_exp_are_summed() -> None:
    """exp(1000) overflows; log(exp(1000) + exp(1000)) = 1000 + log 2."""
    queries, keys = torch.tensor([[1000.0]]), torch.tensor([[1.0], [1.0], [-1.0]])
    wanted = 1000 + torch.tensor([2.0]).log()
    torch.testing.assert_close(log_sum_exp_of_products(queries, keys), wanted)
