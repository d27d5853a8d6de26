"""
Emulate CUDA's float16 mixed precision on CPU tensors.

torch.autocast("cpu") has different operator lists from torch.autocast("cuda"). Here they are
replaced by CUDA's, so that the same tensors are float16 as on a GPU, rounded after each operator,
with gradients in float16.
"""

import functools
import warnings
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Set, Tuple

import torch
from torch import Tensor

# Operator lists of ATen/autocast_mode.h, as <operator> or <operator>.<overload>.
HALF = """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum
    mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    scaled_dot_product_attention
"""
FLOAT = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp norm.Scalar norm.ScalarOpt_dim upsample_nearest1d _upsample_nearest_exact1d
    upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
"""
FLOAT_RESULT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
WIDEST = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
"""
REFUSED = "binary_cross_entropy"


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """
    torch.autocast("cuda") for CPU tensors. `torch.autocast("cpu", enabled=False)` inside it
    disables it, which heads write as torch.autocast(x.device.type, enabled=False).
    """
    # The dtype is ignored; older PyTorch only supports bfloat16 on CPUs.
    with cuda_lists("AutocastCPU"), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def cuda_lists(key: str) -> Iterator["Casts"]:
    """CUDA's operator lists in place of those of another dispatch key, such as AutocastCPU."""
    casts = Casts(key)
    library = torch.library.Library("aten", "IMPL")
    ours = {name: kernel for names, kernel in casts.kernels() for name in names.split()}
    ours = {name: kernel for name, kernel in ours.items() if _operator(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for name in _registered(key) - set(ours):
            library.impl(name, torch.library.fallthrough_kernel, key)
        for name, kernel in ours.items():
            library.impl(name, functools.partial(kernel, _operator(name)), key)
    try:
        yield casts
    finally:
        del library  # restores PyTorch's own lists


class Casts:
    """Casts the arguments of operators; caches the casts of parameters."""

    def __init__(self, key: str) -> None:
        self.key = getattr(torch._C.DispatchKey, key)
        self.parameters: Dict[int, Tuple[Tensor, Tensor]] = {}

    def kernels(self) -> Tuple[Tuple[str, Callable[..., Any]], ...]:
        return (
            (HALF, self.half),
            (FLOAT, self.float),
            (FLOAT_RESULT, self.float_result),
            (WIDEST, self.widest),
            (REFUSED, self.refused),
        )

    def half(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._call(operator, torch.float16, args, kwargs)

    def float(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._call(operator, torch.float32, args, kwargs)

    def float_result(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        position = [x.name for x in operator._schema.arguments].index("dtype")
        if not _eligible(args[0]):
            return self._call(operator, None, args, kwargs)
        if position < len(args):
            args = (*args[:position], args[position] or torch.float32, *args[position + 1 :])
        elif kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return self._call(operator, None, args, kwargs)

    def widest(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = [x.dtype for x in _tensors(args) if _eligible(x)]
        dtype = torch.float32 if torch.float32 in found else torch.float16
        return self._call(operator, dtype, args, kwargs)

    def refused(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "F.binary_cross_entropy and nn.BCELoss are unsafe to autocast; use "
            "F.binary_cross_entropy_with_logits."
        )

    def _call(self, operator: Callable[..., Any], dtype: Any, args: Any, kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(self.key)):
            if dtype is not None:
                args = [self._cast(x, dtype) for x in args]
                kwargs = {k: self._cast(x, dtype) for k, x in kwargs.items()}
            return operator(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._cast(y, dtype) for y in x]
        if not _eligible(x) or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad and dtype == torch.float16):
            return x.to(dtype)
        # A layer shared by several levels has one cast, whose gradient is summed in float16.
        if id(x) not in self.parameters:
            self.parameters[id(x)] = x, x.to(dtype)
        return self.parameters[id(x)][1]


def _eligible(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _tensors(args: Any) -> Iterator[Any]:
    for x in args:
        if isinstance(x, (list, tuple)):
            yield from _tensors(x)
        elif isinstance(x, Tensor):
            yield x


def _registered(key: str) -> Set[str]:
    """Operators in PyTorch's own lists."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name[len("aten::") :] for name in names if name.startswith("aten::")}


def _operator(name: str) -> Any:
    """The operator; None if this PyTorch does not have it."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
