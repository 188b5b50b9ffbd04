# Installs the build in BUILD, moves what was installed, and builds the example against it in SCRATCH.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}: exit status ${status}")
  endif()
endfunction()

file(REMOVE_RECURSE "${SCRATCH}")
# As the documentation says it; only a generator of several configurations must be told which.
set(which "")
if(GENERATOR MATCHES "Multi-Config")
  set(which --config "${CONFIG}")
endif()
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${SCRATCH}/first" ${which})
file(RENAME "${SCRATCH}/first" "${SCRATCH}/moved")
foreach(file IN ITEMS include/fusedopt.h share/fusedopt/manifest.json)
  if(NOT EXISTS "${SCRATCH}/moved/${file}")
    message(FATAL_ERROR "${file} was not installed")
  endif()
endforeach()
run("${CMAKE_COMMAND}" -S "${EXAMPLE}" -B "${SCRATCH}/example" -G "${GENERATOR}"
    "-DCMAKE_PREFIX_PATH=${SCRATCH}/moved" "-DCMAKE_BUILD_TYPE=Release"
    "-DEXAMPLE_VERSION=${VERSION}")
run("${CMAKE_COMMAND}" --build "${SCRATCH}/example" --config Release)
