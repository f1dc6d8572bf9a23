# A package's headers, copied into the build tree and compiled from there: pip's build isolation
# unpacks the packages into another folder at every install, and with it each command line and each
# dependency would be new. By content, so that an object stays newer than what it was made of.
function(fastres_copy_headers source folder)
  file(GLOB_RECURSE files RELATIVE "${source}" "${source}/*")
  foreach(file ${files})
    get_filename_component(parent "${folder}/${file}" DIRECTORY)
    file(MAKE_DIRECTORY "${parent}")
    file(COPY_FILE "${source}/${file}" "${folder}/${file}" ONLY_IF_DIFFERENT)
  endforeach()
endfunction()

# pybind11_DIR: the copy of the building Python's package; another folder that is given and exists, as
# it is. (What older builds left in the cache is the package's own folder, or one that has vanished.)
function(fastres_find_pybind11)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import pybind11 as p; print(p.__version__, p.get_cmake_dir(), sep=';')"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed STREQUAL "0")  # one of the system's, perhaps
    return()
  endif()
  list(GET found 0 version)
  list(GET found 1 folder)
  set(copies "${CMAKE_BINARY_DIR}/headers")
  cmake_path(IS_PREFIX copies "${pybind11_DIR}" copied)
  if(EXISTS "${pybind11_DIR}" AND NOT copied)
    file(REAL_PATH "${pybind11_DIR}" given)
    file(REAL_PATH "${folder}" own)
    if(NOT given STREQUAL own)
      return()
    endif()
  endif()
  if(folder MATCHES "^(.*/pybind11)/share/cmake/pybind11$")
    set(package "${CMAKE_MATCH_1}")
    set(copy "${copies}/pybind11-${version}")
    fastres_copy_headers("${package}/include" "${copy}/include")
    fastres_copy_headers("${package}/share/cmake" "${copy}/share/cmake")
    set(folder "${copy}/share/cmake/pybind11")
  endif()
  set(pybind11_DIR "${folder}" CACHE PATH "pybind11's CMake folder" FORCE)
endfunction()
