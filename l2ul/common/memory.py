"""What to do when memory runs out: go on with smaller batches."""

import traceback

import torch

from l2ul.common.errors import is_out_of_memory


def smaller_batch(size: int, error: BaseException) -> int:
    """Return the next smaller batch size after an error, and release the memory of the failed computation.

    To be called where the error is handled. Raises the error itself if it is not about memory or the size is 1.
    """
    if size <= 1 or not is_out_of_memory(error):
        raise error
    traceback.clear_frames(error.__traceback__)  # which refer to the tensors of the failed computation
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # cuDNN and cuBLAS allocate memory of their own
    return multiple_of_eight((size + 1) // 2)


def multiple_of_eight(size: int) -> int:
    """Return the size rounded down to a multiple of eight; sizes below eight stay as they are.

    CPU kernels round results of a batch alike if its size is a multiple of eight, except size eight itself in
    linear layers with AVX-512. With such sizes a result does not depend on how many others are computed with it.
    """
    return size - size % 8 if size >= 8 else size
