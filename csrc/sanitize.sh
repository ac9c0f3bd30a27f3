#!/bin/sh
# Tests of the CPU operators with AddressSanitizer and UndefinedBehaviorSanitizer in the compiled library; the first
# finding ends the run. Usage: csrc/sanitize.sh [arguments of pytest]; PYTHON names the interpreter (python3).
# Builds in build/sanitize and tests a copy of the package there, so an installed library stays as it is.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
build=$root/build/sanitize
copy=$build/package
"$python" -c "import torch, pybind11, pytest" || { echo "sanitize: $python needs torch, pybind11 and pytest" >&2; exit 2; }

cmake -S "$root" -B "$build" -G Ninja -DBTI_FAST_SANITIZE=ON -DBTI_FAST_PYTHON=ON \
  -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')"
cmake --build "$build" --parallel "${MAX_JOBS:-2}"

rm -rf "$copy"
mkdir -p "$copy"
cp -R "$root/bti_fast" "$root/tests" "$root/pyproject.toml" "$copy"
rm -rf "$copy/bti_fast/lib" "$copy"/bti_fast/_native*
cmake --install "$build" --prefix "$copy/bti_fast"

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
cd "$copy"
# opcheck tests the registration in Python, at length.
[ $# -gt 0 ] || set -- tests/ops tests/nn/test_dilated_depthwise.py tests/nn/test_normalised_silu.py tests/nn/test_dual_path.py tests/nn/test_separable_product.py tests/nn/test_up_conv.py tests/nn/test_headed_fusion.py tests/nn/test_mobile_block.py -k "(cpu or instruction_set or a_matrix_for_each_sample or many_positions or test_properties) and not opcheck"
# The interpreter is not instrumented: the runtimes come first, and its own leaks are not ours.
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$copy" OMP_NUM_THREADS=2 \
  "$python" -m pytest -q -x -p no:cacheprovider "$@"
