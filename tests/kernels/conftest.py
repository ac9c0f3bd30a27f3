"""The kernels run in Triton's interpreter here: the choice is read when a kernel file is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
