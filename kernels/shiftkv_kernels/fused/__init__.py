"""The operations as Triton kernels, one a file; imported when first used, since not every platform has Triton.

They trust their callers, `shiftkv_kernels.ops` and `decoding_ops`, to have checked the arguments.
"""
