"""The operations as Triton kernels, one a file; imported when first used, since not every platform has Triton.

They trust their caller, `shiftkv_kernels.ops`, to have checked the arguments.
"""
