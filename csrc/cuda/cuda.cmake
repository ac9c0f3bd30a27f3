# The CUDA library; included where BTI_FAST_CUDA is on.

# TORCH_CUDA_ARCH_LIST as PyTorch reads it ("8.0 9.0+PTX", "9.0a;10.0") -> CMake's architectures.
set(requested "$ENV{TORCH_CUDA_ARCH_LIST}")
set(default_targets OFF)
if(NOT requested)
  set(requested "8.0;9.0;10.0+PTX")
  set(default_targets ON)
endif()
string(REGEX REPLACE "[ ,]+" ";" requested "${requested}")
set(architectures "")
set(BTI_FAST_CUDA_TARGETS "")
foreach(item IN LISTS requested)
  if(NOT item)
    continue()
  endif()
  if(NOT item MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${item}' is not understood; expected items such as 8.0, 9.0a or 10.0+PTX")
  endif()
  list(APPEND BTI_FAST_CUDA_TARGETS "${item}")
  if(CMAKE_MATCH_3)
    list(APPEND architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  else()
    list(APPEND architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
enable_language(CUDA)
if(default_targets AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  # sm_100 came with 12.8; PTX of 9.0 serves newer chips instead.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  set(BTI_FAST_CUDA_TARGETS "8.0;9.0+PTX")
endif()
list(JOIN BTI_FAST_CUDA_TARGETS "," BTI_FAST_CUDA_TARGETS)
message(STATUS "CUDA targets: ${BTI_FAST_CUDA_TARGETS} (nvcc ${CMAKE_CUDA_COMPILER_VERSION})")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
add_library(bti_fast_cuda SHARED ${CUDA_SOURCES})
target_include_directories(bti_fast_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# The static runtime: the library serves torch builds of other CUDA versions than this nvcc's.
set_target_properties(bti_fast_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(bti_fast_cuda PRIVATE torch_stable)
target_compile_definitions(bti_fast_cuda PRIVATE USE_CUDA)  # shows the CUDA part of torch's C interface

find_library(BTI_FAST_TORCH_CUDA torch_cuda PATHS "${BTI_FAST_TORCH}/lib" NO_DEFAULT_PATH)
if(BTI_FAST_TORCH_CUDA)
  target_link_libraries(bti_fast_cuda PRIVATE "${BTI_FAST_TORCH_CUDA}")
else()
  # Compiled against a CPU torch, for another machine: an empty library of the right name stands in at link time, so
  # that the loader asks for the real one (and says so where there is none).
  file(WRITE "${CMAKE_BINARY_DIR}/stand_in.cpp" "")
  add_library(torch_cuda_stand_in SHARED "${CMAKE_BINARY_DIR}/stand_in.cpp")
  set_target_properties(torch_cuda_stand_in PROPERTIES OUTPUT_NAME torch_cuda
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stand_in")
  target_link_options(bti_fast_cuda PRIVATE LINKER:--no-as-needed)
  target_link_libraries(bti_fast_cuda PRIVATE torch_cuda_stand_in)
  set_target_properties(bti_fast_cuda PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
endif()

install(TARGETS bti_fast_cuda LIBRARY DESTINATION lib)
