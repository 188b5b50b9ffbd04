# Runs `python -m fusedopt codegen --json` in the checkout and keeps what it prints.
#
#   cmake -DPYTHON=... -DSOURCE_DIR=... -DTARGETS=cuda:90,hip:gfx942 -DOUTPUT=... -P Codegen.cmake
#
# A script of its own because neither a custom target nor a test can redirect output portably, and
# because output that is not JSON must fail here, not in the program that reads the file.
cmake_minimum_required(VERSION 3.20)

string(REPLACE "," ";" targets "${TARGETS}")
set(arguments "")
foreach(target IN LISTS targets)
  list(APPEND arguments --target "${target}")
endforeach()

execute_process(
    COMMAND "${PYTHON}" -m fusedopt codegen ${arguments} --json
    WORKING_DIRECTORY "${SOURCE_DIR}"
    OUTPUT_VARIABLE report
    RESULT_VARIABLE status)
file(WRITE "${OUTPUT}" "${report}")
if(NOT status EQUAL 0)
  message(FATAL_ERROR "python -m fusedopt codegen: exit status ${status}; its report is ${OUTPUT}")
endif()

string(JSON type ERROR_VARIABLE error TYPE "${report}")
if(error)
  message(FATAL_ERROR "python -m fusedopt codegen: not JSON (${error}); see ${OUTPUT}")
endif()
message(STATUS "${OUTPUT}")
