"""Why an operator is refused for some samples, or for all: what `test_opinfo.py` demands of every `r`, and the support page prints."""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Whose limit it is; only `GAP` counts against the coverage."""

    TRACT = "tract"
    DATA = "data"
    RANDOM = "random"
    TORCH = "torch"
    GAP = "gap"


MEANING = {
    Kind.TRACT: "tract has no operators to say it, or computes it differently",
    Kind.DATA: "the size of the result depends on the values",
    Kind.RANDOM: "an archive gives the same output every time: make the numbers an input",
    Kind.TORCH: "torch.export cannot capture it, or it is no computation of an inference graph",
    Kind.GAP: "tract could; not done yet",
}


@dataclass(frozen=True)
class Limit:
    """`what` is refused and why, in one line."""

    kind: Kind
    what: str


# limit -> operators of OpInfo, or `prefix*`
_LIMITS: dict[Limit, str] = {
    Limit(Kind.TRACT, "matrices are factorized by no operator of tract; det, inv and solve go up to 3 rows"): """
        cholesky_inverse cholesky_solve geqrf linalg.cholesky* linalg.cond linalg.det linalg.eig* linalg.householder_product
        linalg.inv linalg.ldl* linalg.lu* linalg.matrix_norm linalg.matrix_rank* linalg.norm* linalg.matrix_sqrth linalg.pinv*
        linalg.polar linalg.qr linalg.slogdet linalg.solve linalg.solve_triangular linalg.svd* linalg.tensor* logdet lu lu_solve
        lu_unpack norm.nuc ormqr pinverse svd triangular_solve
    """,
    Limit(Kind.TRACT, "no powers below 0, nor functions, of matrices"): """
        linalg.matrix_power matrix_exp
    """,
    Limit(Kind.TRACT, "integers: tract averages them as floats"): """
        nn.functional.avg_pool* nn.functional.local_response_norm
    """,
    Limit(Kind.TRACT, "integers: tract convolves floats, or 8 bits"): """
        nn.functional.conv1d nn.functional.conv2d nn.functional.conv3d nn.functional.conv_transpose1d
        nn.functional.conv_transpose2d nn.functional.unfold
    """,
    Limit(Kind.TRACT, "no operator reads the bits of a float"): """
        hash_tensor nextafter
    """,
    Limit(Kind.TRACT, "as many steps as the values say"): """
        igamma igammac special.zeta special.chebyshev* special.hermite* special.laguerre* special.legendre* special.shifted*
    """,
    Limit(Kind.TRACT, "no bfloat16"): """
        bfloat16
    """,
    Limit(Kind.TRACT, "a product of booleans"): """
        addr
    """,
    Limit(Kind.TRACT, "booleans without elements are not read"): """
        block_diag eye
    """,
    Limit(Kind.TRACT, "sparse tensors"): """
        sparse.* to_sparse
    """,
    Limit(Kind.DATA, "a boolean mask"): """
        masked_select
    """,
    Limit(Kind.DATA, "as many results as the values say"): """
        argwhere bincount nonzero unique unique_consecutive
    """,
    Limit(Kind.DATA, "repeats or sections in a tensor"): """
        repeat_interleave tensor_split _segment_reduce*
    """,
    Limit(Kind.DATA, "num_classes left to the values"): """
        nn.functional.one_hot
    """,
    Limit(Kind.RANDOM, "numbers are drawn"): """
        bernoulli cauchy exponential geometric log_normal multinomial normal normal.* rand_like randint randint_like randn
        randn_like uniform nn.functional.fractional_max_pool* pca_lowrank svd_lowrank
    """,
    Limit(Kind.RANDOM, "active dropout; eval mode passes"): """
        nn.functional.dropout* nn.functional.feature_alpha_dropout* nn.functional.rrelu
        nn.functional.scaled_dot_product_attention
    """,
    Limit(Kind.RANDOM, "memory as it is found"): """
        empty empty_like empty_permuted empty_strided new_empty new_empty_strided
    """,
    Limit(Kind.TORCH, "a value is read while tracing"): """
        allclose corrcoef cov equal item nn.functional.ctc_loss nn.functional.gaussian_nll_loss linalg.lstsq*
    """,
    Limit(Kind.TORCH, "the result is no tensor"): """
        broadcast_shapes
    """,
    Limit(Kind.TORCH, "its statistics are written (training)"): """
        _batch_norm_with_update _native_batch_norm_legit native_batch_norm nn.functional.batch_norm*
    """,
    Limit(Kind.TORCH, "its weight is renormed in place (max_norm)"): """
        nn.functional.embedding nn.functional.embedding_bag
    """,
    Limit(Kind.TORCH, "the backward pass"): """
        max_pool2d_with_indices_backward torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    """,
    Limit(Kind.TORCH, "error codes of the factorization"): """
        linalg.inv_ex linalg.solve_ex
    """,
    Limit(Kind.TORCH, "which of equal elements comes first is not defined; values pass, and stable=True"): """
        argsort kthvalue sort topk
    """,
    Limit(Kind.TORCH, "strides over the storage of a view"): """
        as_strided.partial_views
    """,
    Limit(Kind.TORCH, "an input is resized in place"): """
        resize_ resize_as_
    """,
    Limit(Kind.TORCH, "GPUs only"): """
        jiterator*
    """,
    Limit(Kind.TORCH, "a start in a tensor"): """
        narrow
    """,
    Limit(Kind.TORCH, "torch's own operator, without decomposition"): """
        nn.functional.linear_cross_entropy.chunked*
    """,
    Limit(Kind.TORCH, "f16: torch sums it in f16; integers: tract convolves floats"): """
        nn.functional.conv_transpose3d
    """,
    Limit(Kind.TORCH, "f16: torch overflows to inf, the archive does not"): """
        nn.functional.soft_margin_loss
    """,
    Limit(Kind.GAP, "no handler"): """
        histogram histogramdd special.airy_ai
    """,
    Limit(Kind.GAP, "coordinates of rank 0"): """
        nonzero_static
    """,
}
LIMITS: dict[str, Limit] = {name: limit for limit, names in _LIMITS.items() for name in names.split()}
