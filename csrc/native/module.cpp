// bti_fast._native: what was built, and which instruction set the CPU operators use. No tensors pass here.
#include <pybind11/pybind11.h>

#include <string>

#include "common/isa.h"

namespace py = pybind11;
using bti_fast::Isa;

namespace {

py::tuple supported_isas() {
  py::list names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (bti_fast::isa_supported(isa)) names.append(bti_fast::isa_name(isa));
  return py::tuple(names);
}

py::dict build_info() {
  py::dict info;
  info["torch"] = BTI_FAST_TORCH_VERSION;
  info["compiler"] = BTI_FAST_COMPILER;
#ifdef BTI_FAST_X86
  info["instruction_sets"] = py::make_tuple("portable", "avx2", "avx512");
#else
  info["instruction_sets"] = py::make_tuple("portable");
#endif
  const std::string cuda = BTI_FAST_CUDA_TARGETS;
  info["cuda_compiler"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(BTI_FAST_CUDA_COMPILER));
  info["cuda_targets"] = cuda.empty() ? py::object(py::tuple()) : py::object(py::tuple(py::str(cuda).attr("split")(",")));
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information, and the instruction set of the CPU operators.";
  m.def("build_info", &build_info, "What this build holds: torch, compilers, instruction sets, CUDA targets.");
  m.def("supported_isas", &supported_isas, "Instruction sets that this processor and build have, worst first.");
  m.def("isa", [] { return bti_fast::isa_name(bti_fast::isa_in_use()); }, "The instruction set in use.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        try {
          bti_fast::isa_force(name.c_str());
        } catch (const std::invalid_argument& error) {
          throw py::value_error(error.what());
        }
      },
      py::arg("name"),
      "Use 'portable', 'avx2' or 'avx512' from now on, or 'auto'; RuntimeError where it is not available.");
}
