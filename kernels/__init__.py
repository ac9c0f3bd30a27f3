"""Triton kernels, one file per operator; installed as `bti_fast.kernels`.

Nothing here imports the rest of the package or decides whether a kernel is used: `bti_fast.ops` does.
"""
