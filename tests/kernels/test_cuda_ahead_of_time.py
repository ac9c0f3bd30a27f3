"""The CUDA kernels compiled for real chips, without one: no spills, tensor cores, memory.

cross_attention with 64 and 128 channels for one target a dtype; `make kernel-report` compiles everything for
all targets.
"""

import pytest

pytest.importorskip("triton")

from benchmarks import cuda_report, kernel_compile

pytestmark = [
    pytest.mark.skipif(cuda_report.nvcc() is None, reason="no nvcc (PATH, /usr/local/cuda, CUDACXX)"),
    pytest.mark.timeout(900),  # ten seconds each on an idle core
]


@pytest.mark.parametrize(
    ("dtype", "target"), (("bfloat16", "sm_90"), ("float16", "sm_80"), ("float32", "sm_80")), ids=str
)
def test_no_spills_and_tensor_cores(dtype, target):
    made = cuda_report.kernels(dtype, target, channels=(64, 128))
    assert {kernel.sweep for kernel in made} == {"forward", "backward", "forward combine", "backward combine"}
    sweeps = [kernel for kernel in made if kernel.class_tokens]
    # Two orders of the dense side; variants by class tokens, of which all but 16-bit at 64 channels has one.
    assert len(sweeps) == 4 + (4 if dtype == "float32" else 2 * (2 + 3))
    assert all(kernel.spills == 0 and 0 < kernel.registers <= 255 for kernel in made)
    limit = kernel_compile.SHARED_LIMIT[target]
    fits = [kernel for kernel in sweeps if kernel.shared <= limit]
    assert all(kernel.tensor_cores >= 16 and kernel.wide_loads >= 2 for kernel in sweeps)
    if target == "sm_80":  # beyond 64 class tokens the launcher takes the variant that fits
        assert {(k.sweep, k.class_tokens) for k in sweeps} - {(k.sweep, k.class_tokens) for k in fits} <= {
            ("backward", 128)
        }
    else:
        assert fits == sweeps


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_no_spills_in_entropy_uncertainty(target):
    usage, _ = cuda_report.compiled("entropy_uncertainty.cu", target)
    # Forward and backward, one class or more, dtypes, packs of one and more, 64-bit indices.
    assert len(usage) == 2 * 2 * 4 * 3
    assert {name: found for name, found in usage.items() if found[1]} == {}


def test_names_of_kernels_are_understood():
    name = (
        "_ZN8bti_fast20cross_forward_kernelINS_12ForwardShapeI13__nv_bfloat16Li64ELb1ELi4ELi1ELi2ELi3EEELi56064EEE"
        "vNS_12CrossForwardE"
    )
    kernel = cuda_report._kernel(
        name, (168, 0), "LDGSTS.E.BYPASS.128 [R1] ; HMMA.16816.F32.BF16 R4 ; HMMA.1688 R2"
    )
    assert (kernel.sweep, kernel.variant) == ("forward", "d=64 maps, 64 class tokens")
    assert (kernel.warps, kernel.shared, kernel.registers) == (4, 56064, 168)
    assert (kernel.wide_loads, kernel.tensor_cores) == (1, 2)


def test_occupancy_of_a_kernel_by_hand():
    # 168 registers x 128 threads: 3 blocks of 4 warps; 100 KiB of shared memory each: 2 on sm_90, 1 on sm_80.
    assert kernel_compile.occupancy("sm_90", 4, 168, 1024) == 12 / 64
    assert kernel_compile.occupancy("sm_90", 4, 168, 100 * 1024) == 8 / 64
    assert kernel_compile.occupancy("sm_80", 4, 168, 100 * 1024) == 4 / 64
