from torch import Tensor


def unit_vectors(x: Tensor) -> Tensor:
    """
    (N, C, ...) with vectors of length 1 along C, float32.

    A vector of zeros, where all of a ReLU is dead, stays one and gets no gradient: 1 / length would
    overflow half precision, and with it the whole step.
    """
    x = x.float()
    length = x.norm(dim=1, keepdim=True)
    return x / length.clamp(min=1e-6) * (length > 1e-6)
