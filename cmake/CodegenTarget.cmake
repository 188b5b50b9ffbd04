# Compiles every kernel variant of the Python library and holds it to its budgets:
#
#   cmake --build build --target codegen     # writes build/codegen.json
#   ctest --test-dir build -L codegen        # fails where a budget is broken

# With commas, since an argument with semicolons is taken apart on its way to the script.
list(JOIN FUSEDOPT_CODEGEN_TARGETS "," targets)
set(codegen
    "${CMAKE_COMMAND}"
    "-DPYTHON=${Python3_EXECUTABLE}"
    "-DSOURCE_DIR=${CMAKE_CURRENT_SOURCE_DIR}"
    "-DTARGETS=${targets}")
set(script -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/Codegen.cmake")

add_custom_target(codegen
    COMMAND ${codegen} "-DOUTPUT=${CMAKE_CURRENT_BINARY_DIR}/codegen.json" ${script}
    COMMENT "Compiling the kernels for ${targets}"
    USES_TERMINAL
    VERBATIM)

add_test(NAME codegen
    COMMAND ${codegen} "-DOUTPUT=${CMAKE_CURRENT_BINARY_DIR}/codegen-test.json" ${script})
set_tests_properties(codegen PROPERTIES LABELS codegen)
