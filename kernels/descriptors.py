"""Matrices as the copy engine (TMA) of sm90 and newer takes them: a descriptor on the host, blocks in the kernel."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from torchtune_lce.kernels.tuning import Config


def has_blocks(config: Config, *matrices: Tensor) -> bool:
    """Whether the copy engine can read all of them: it wants rows of whole 16 bytes, and at least one."""
    return config.tma and all(
        matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(1) == 1
        and matrix.data_ptr() % 16 == 0
        and matrix.shape[0]
        for matrix in matrices
    )


def in_blocks(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``matrix`` whose loads are ``rows`` x ``columns``, zero past its edges."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
