"""Every instruction set that this processor has, in turn, for the kernels of the layers."""

from __future__ import annotations

import pytest

from bti_fast import _library

NATIVE = _library.native()[0]


@pytest.fixture(params=NATIVE.supported_isas() if NATIVE else ())
def isa(request):
    NATIVE.force_isa(request.param)
    yield request.param
    NATIVE.force_isa("auto")
