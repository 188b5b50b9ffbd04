# Library, header, manifest, and what find_package(fusedopt) reads; it can be moved once installed.
include(CMakePackageConfigHelpers)

set(package_directory "${CMAKE_INSTALL_LIBDIR}/cmake/fusedopt")
install(TARGETS fusedopt EXPORT fusedopt
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES include/fusedopt.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(FILES "${generated}/manifest.json" DESTINATION "${CMAKE_INSTALL_DATADIR}/fusedopt")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DATADIR}/fusedopt")
install(EXPORT fusedopt NAMESPACE fusedopt:: FILE fusedopt-targets.cmake
    DESTINATION "${package_directory}")

configure_package_config_file(cmake/fusedopt-config.cmake.in
    "${CMAKE_CURRENT_BINARY_DIR}/fusedopt-config.cmake"
    INSTALL_DESTINATION "${package_directory}"
    NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/fusedopt-config-version.cmake"
    COMPATIBILITY SameMinorVersion)
install(FILES
    "${CMAKE_CURRENT_BINARY_DIR}/fusedopt-config.cmake"
    "${CMAKE_CURRENT_BINARY_DIR}/fusedopt-config-version.cmake"
    DESTINATION "${package_directory}")
