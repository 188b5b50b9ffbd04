# Asks the Python for its Triton, and whether that compiles for FUSEDOPT_TARGETS. Sets:
#
#   triton_stamp      a file that changes with Triton's version and the targets
#   triton_include    where Triton keeps the driver's header, cuda.h
#   target_arguments  the targets as arguments of native/generate

set(target_arguments "")
foreach(target IN LISTS FUSEDOPT_TARGETS)
  list(APPEND target_arguments --target "${target}")
endforeach()
if(NOT target_arguments)
  message(FATAL_ERROR "FUSEDOPT_TARGETS is empty: name a target, such as cuda:90")
endif()

# TRITON_INTERPRET replaces the compiler.
set(without_interpreter "${CMAKE_COMMAND}" -E env --unset=TRITON_INTERPRET)

execute_process(
    COMMAND ${without_interpreter} "${Python3_EXECUTABLE}" -c
        "import pathlib, triton; print(triton.__version__, end=';'); \
print(pathlib.Path(triton.__file__).parent / 'backends' / 'nvidia' / 'include', end='')"
    OUTPUT_VARIABLE found
    ERROR_QUIET
    RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${Python3_EXECUTABLE} cannot import Triton: run `make env`, or pass -DPython3_EXECUTABLE=...")
endif()
list(GET found 0 triton_version)
list(GET found 1 triton_include)
if(NOT EXISTS "${triton_include}/cuda.h")
  message(FATAL_ERROR "Triton ${triton_version} has no ${triton_include}/cuda.h")
endif()

execute_process(
    COMMAND ${without_interpreter} "${Python3_EXECUTABLE}" -m native.generate
        --check ${target_arguments}
    WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
    ERROR_VARIABLE problem
    ERROR_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "FUSEDOPT_TARGETS: ${problem}")
endif()

# Written only where its content differs, so that configuring anew compiles nothing anew.
set(triton_stamp "${CMAKE_CURRENT_BINARY_DIR}/triton-and-targets.txt")
file(CONFIGURE OUTPUT "${triton_stamp}" CONTENT "${triton_version} ${FUSEDOPT_TARGETS}\n")
