"""Triton kernels; installed as `bti_fast.kernels`.

An operator has a file of its name with its launchers, and one for its gradient where both would be long.
Between task_interaction's two passes over x stands the algebra of its gates (`gate_algebra`, `batch_norm`,
`gate_weight_gradient`). Shared are where elements of a map lie (`tiles`), launch shapes (`launch`,
`autotune`), and helpers named after what they compute.

Nothing here imports the rest of the package or decides whether a kernel is used: `bti_fast.ops` does.

The kernels stand behind operators that torch.compile and torch.export keep as one node each, not behind
`torch.library.triton_op`. Traced through they would gain little inside a compiled program: the operations
around them do not get into them, and backend, alignments and launch shapes, which every call chooses, would
be fixed, or guarded on, while it traces. What it costs: a package of AOTInductor needs `bti_fast` imported in
the process that runs it, and cannot be run from C++ alone.
"""
