"""What contrast with many keys sums, without the matrix of all products."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

# Keys taken at once: their products with 1024 queries are 32 MiB.
CHUNK = 8192


def log_sum_exp_of_products(queries: Tensor, keys: Tensor) -> Tensor:
    """
    log(sum over j of exp(<q_r, k_j>)). The (R, K) products are made chunk by chunk and never kept:
    the gradient of the queries, the mean of the keys weighted by their softmax, is summed in the
    same pass.

    Args:
        queries: (R, D)
        keys: (K, D), K >= 1, which get no gradient

    Returns:
        (R,)
    """
    return _LogSumExpOfProducts.apply(queries, keys)


class _LogSumExpOfProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        # For the keys so far: the largest product, the sum of exp(product - largest), and the keys
        # weighted by the same.
        largest = queries.new_full((len(queries), 1), -torch.inf)
        total = torch.zeros_like(largest)
        mean = torch.zeros_like(queries)
        for chunk in keys.split(CHUNK):
            products = queries @ chunk.T
            before, largest = largest, torch.maximum(largest, products.amax(1, keepdim=True))
            weights = products.sub_(largest).exp_()
            faded = (before - largest).exp()
            total = total * faded + weights.sum(1, keepdim=True)
            mean = mean.mul_(faded).addmm_(weights, chunk)
        ctx.save_for_backward(mean / total)
        return (largest + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        (mean,) = ctx.saved_tensors
        return gradient[:, None] * mean, None
