# The CUDA kernels, compiled by nvcc as custom commands: a toolkit that is missing, too old or at
# odds with the C++ compiler is a reason in FASTRES_CUDA_WHY, never an error of the whole build.
#
# In, from the environment: FASTRES_SKIP_CUDA=1; FASTRES_CUDA_ARCHS="80;90a" (default: the GPUs of
# this machine, otherwise 80, 90a and 100a); CUDACXX, CUDA_HOME or CUDA_PATH (default: nvcc on PATH);
# FASTRES_CUTLASS_DIR (default: the nvidia-cutlass package of the Python that builds).
# Out: FASTRES_CUDA_OBJECTS, FASTRES_CUDA_RUNTIME (the static library), FASTRES_CUDA_INFO (JSON),
# FASTRES_TMA_MAPS (a test's program), and FASTRES_CUDA_WHY, empty when all is well;
# FASTRES_CONV_WHY the same of the convolutions, which need sm_90a and CUTLASS: conv.cu, and
# *_sm90.cu, compiled for sm_90a alone.

set(FASTRES_CUDA_OBJECTS "")
set(FASTRES_CUDA_RUNTIME "")
set(FASTRES_CUDA_INFO "null")
set(FASTRES_TMA_MAPS "")
set(FASTRES_CUDA_WHY "")
set(FASTRES_CONV_WHY "")
set(FASTRES_CUDA_OLDEST 12.0)  # sm_90a
set(FASTRES_CUDA_100A 12.8)
set(FASTRES_CUDA_LEAST 80)  # bf16 conversions in hardware
set(FASTRES_CUTLASS_OLDEST 4.2)

function(fastres_cuda_archs version result)
  string(REGEX REPLACE "[ ,]+" ";" asked "$ENV{FASTRES_CUDA_ARCHS}")
  set(served "")
  if(asked STREQUAL "")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE here ERROR_QUIET RESULT_VARIABLE failed)
    if(failed STREQUAL "0")
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" here "${here}")
      foreach(capability ${here})
        string(REPLACE "." "" number "${capability}")
        set(arch ${number})
        if(number STREQUAL "90" OR number STREQUAL "100")
          string(APPEND arch "a")
        endif()
        list(APPEND asked ${arch})
        if(NOT number LESS FASTRES_CUDA_LEAST)
          list(APPEND served ${arch})
        endif()
      endforeach()
      if(served)  # beside a newer one, a GPU that is too old goes without
        set(asked ${served})
      endif()
      list(REMOVE_DUPLICATES asked)
    endif()
  endif()
  if(asked STREQUAL "")
    set(asked 80 90a)
    if(version VERSION_GREATER_EQUAL FASTRES_CUDA_100A)
      list(APPEND asked 100a)
    endif()
  endif()
  set(${result} ${asked} PARENT_SCOPE)
endfunction()

# CUTLASS's source tree into `result`, or the reason why there is none into `why`.
function(fastres_find_cutlass archs result why)
  set(${why} "" PARENT_SCOPE)
  if(NOT "90a" IN_LIST archs)
    string(JOIN " " shown ${archs})
    set(${why} "they are for sm_90a, this build is for ${shown}" PARENT_SCOPE)
    return()
  endif()
  set(folder "$ENV{FASTRES_CUTLASS_DIR}")
  set(package FALSE)
  if(NOT folder)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
              "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
      OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed STREQUAL "0")
      set(${why} "no CUTLASS: pip install nvidia-cutlass, or set FASTRES_CUTLASS_DIR" PARENT_SCOPE)
      return()
    endif()
    set(folder "${folder}/source")
    set(package TRUE)
  endif()
  set(header "${folder}/include/cutlass/version.h")
  if(NOT EXISTS "${header}")
    set(${why} "no CUTLASS: ${header} does not exist" PARENT_SCOPE)
    return()
  endif()
  file(READ "${header}" text)
  string(REGEX MATCH "CUTLASS_MAJOR +([0-9]+)" found "${text}")
  set(version "${CMAKE_MATCH_1}")
  string(REGEX MATCH "CUTLASS_MINOR +([0-9]+)" found "${text}")
  string(APPEND version ".${CMAKE_MATCH_1}")
  if(version VERSION_LESS FASTRES_CUTLASS_OLDEST)
    set(${why} "${folder} is CUTLASS ${version}, too old: ${FASTRES_CUTLASS_OLDEST} or newer is needed"
        PARENT_SCOPE)
    return()
  endif()
  if(package)
    set(copy "${CMAKE_BINARY_DIR}/headers/cutlass-${version}")
    foreach(part include tools/util/include)
      fastres_copy_headers("${folder}/${part}" "${copy}/${part}")
    endforeach()
    set(folder "${copy}")
  endif()
  set(${result} "${folder}" PARENT_SCOPE)
  set(${result}_VERSION "${version}" PARENT_SCOPE)
endfunction()

# A source and what it includes of ours. Not by a DEPFILE: to that command CMake adds one of its own,
# with its path, which is new in each of pip's isolated environments.
function(fastres_includes source result)
  set(found "")
  set(left ${source})
  while(left)
    list(POP_FRONT left file)
    list(APPEND found ${file})
    get_filename_component(folder ${file} DIRECTORY)
    file(STRINGS ${file} lines REGEX "^ *#include \"")
    foreach(line ${lines})
      string(REGEX REPLACE ".*\"(.*)\".*" "\\1" name "${line}")
      foreach(where ${folder} ${CMAKE_SOURCE_DIR}/csrc/cuda)
        get_filename_component(path ${where}/${name} ABSOLUTE)
        if(EXISTS ${path})
          if(NOT path IN_LIST found AND NOT path IN_LIST left)
            list(APPEND left ${path})
          endif()
          break()
        endif()
      endforeach()
    endforeach()
  endwhile()
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${found})
  set(${result} ${found} PARENT_SCOPE)
endfunction()

function(fastres_find_cuda)
  if(NOT "$ENV{FASTRES_SKIP_CUDA}" MATCHES "^(|0)$")
    set(FASTRES_CUDA_WHY "FASTRES_SKIP_CUDA is set" PARENT_SCOPE)
    return()
  endif()
  # 1. the compiler: looked for anew in every build, the environment may have changed
  unset(found CACHE)
  set(named "$ENV{CUDACXX}")
  foreach(home "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
    if(home AND NOT named)
      set(named "${home}/bin/nvcc")
    endif()
  endforeach()
  if(named)
    find_program(found NAMES "${named}" NO_DEFAULT_PATH)
  else()
    find_program(found NAMES nvcc HINTS /usr/local/cuda/bin)
  endif()
  set(nvcc "${found}")
  unset(found CACHE)
  if(NOT nvcc AND named)
    set(FASTRES_CUDA_WHY "no CUDA toolkit: ${named} does not exist" PARENT_SCOPE)
    return()
  elseif(NOT nvcc)
    set(FASTRES_CUDA_WHY "no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set" PARENT_SCOPE)
    return()
  endif()
  # 2. its version
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(FASTRES_CUDA_WHY "${nvcc} --version tells no version" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS FASTRES_CUDA_OLDEST)
    set(FASTRES_CUDA_WHY
        "${nvcc} is CUDA ${version}, too old: ${FASTRES_CUDA_OLDEST} or newer is needed" PARENT_SCOPE)
    return()
  endif()
  # 3. the static runtime, so that fastres._C loads where there is no CUDA at all
  execute_process(COMMAND ${nvcc} -dryrun -x cu -c /dev/null -o /dev/null ERROR_VARIABLE text
                  OUTPUT_QUIET)
  string(REGEX MATCHALL "-L[^\" \n]+" folders "${text}")
  list(TRANSFORM folders REPLACE "^-L" "")
  unset(found CACHE)
  find_library(found NAMES libcudart_static.a PATHS ${folders} NO_DEFAULT_PATH)
  set(runtime "${found}")
  unset(found CACHE)
  if(NOT runtime)
    set(FASTRES_CUDA_WHY "${nvcc} has no libcudart_static.a" PARENT_SCOPE)
    return()
  endif()
  # 4. code for which GPUs: PTX of the oldest for all later ones
  fastres_cuda_archs(${version} archs)
  foreach(arch ${archs})
    string(REGEX MATCH "^[0-9]+" number "${arch}")
    if(NOT number GREATER_EQUAL FASTRES_CUDA_LEAST)
      set(FASTRES_CUDA_WHY
          "no kernels for sm_${arch}: they need sm_${FASTRES_CUDA_LEAST} or newer (FASTRES_CUDA_ARCHS chooses)"
          PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(gencode "")
  foreach(arch ${archs})
    list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
  endforeach()
  list(APPEND gencode -gencode arch=compute_80,code=compute_80)
  # -fmad=false: an fma only where the source says fmaf (device.cuh)
  set(flags -std=c++17 -O3 -fmad=false -ccbin ${CMAKE_CXX_COMPILER}
      -Xcompiler -fPIC,-fvisibility=hidden,-Wall ${gencode})
  # 5. does it compile at all with this C++ compiler? Remembered as long as nothing changes
  set(key "${nvcc} ${version} ${flags}")
  if(NOT "${FASTRES_CUDA_PROBED}" STREQUAL "${key}")
    set(probe ${CMAKE_BINARY_DIR}/cuda_probe)
    file(WRITE ${probe}.cu "#include <string>\n__global__ void probe(int* p) { *p = 1; }\n")
    execute_process(COMMAND ${nvcc} ${flags} -c ${probe}.cu -o ${probe}.o RESULT_VARIABLE failed
                    OUTPUT_VARIABLE text ERROR_VARIABLE text)
    if(NOT failed STREQUAL "0")
      string(REGEX MATCH "[^\n]*([Ee]rror|fatal|[Uu]nsupported|not defined)[^\n]*" line "${text}")
      string(REGEX REPLACE "[\"\\\\;]" "'" line "${line}")
      string(JOIN " " shown ${archs})
      set(FASTRES_CUDA_WHY
          "${nvcc} (CUDA ${version}) does not compile for ${shown} with ${CMAKE_CXX_COMPILER}: ${line}"
          PARENT_SCOPE)
      return()
    endif()
    set(FASTRES_CUDA_PROBED "${key}" CACHE INTERNAL "nvcc and flags that compiled a probe")
  endif()
  # 6. the convolutions' headers
  fastres_find_cutlass("${archs}" cutlass conv_why)
  set(FASTRES_CONV_WHY "${conv_why}" PARENT_SCOPE)
  # -DNDEBUG: CUTLASS asserts what the driver returns; conv_driver.h raises it
  set(conv_flags -std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -DNDEBUG -ccbin ${CMAKE_CXX_COMPILER}
      -Xcompiler -fPIC,-fvisibility=hidden,-Wall -gencode arch=compute_90a,code=sm_90a)
  # 7. the objects
  string(JOIN " " code ${archs} ptx80)
  string(JOIN " " shown ${flags})
  # CUTLASS's: one file a pass, since with one a dtype, parsing it and what the dtypes share cost
  # twice: 300 s of CPU, and about 140 now. (Ninja does not keep the order of the list.)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)
  set(objects "")
  set(pool "")
  if(CMAKE_JOB_POOL_COMPILE)
    set(pool JOB_POOL ${CMAKE_JOB_POOL_COMPILE})
  endif()
  set(headers "")
  if(NOT conv_why)
    file(GLOB_RECURSE headers ${cutlass}/include/* ${cutlass}/tools/util/include/*)
  endif()
  foreach(source ${sources})
    fastres_includes(${source} needed)
    get_filename_component(name ${source} NAME_WE)
    set(options ${flags})
    set(what ${code})
    if(name STREQUAL "conv" OR name MATCHES "_sm90$")
      if(conv_why)
        continue()
      endif()
      if(name MATCHES "_sm90$")
        set(options ${conv_flags} -isystem ${cutlass}/include -isystem ${cutlass}/tools/util/include)
        set(what 90a)
        list(APPEND needed ${headers})
      endif()
    endif()
    set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${nvcc} ${options} "-DFASTRES_CUDA_ARCHS=\"${code}\"" -c ${source} -o ${object}
      DEPENDS ${needed} ${nvcc}
      ${pool}
      COMMENT "nvcc ${name}.cu for ${what}"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  # 8. a test's program: the convolutions' copies on the host, on the launchers' own objects
  if(NOT conv_why)
    set(tma_maps ${CMAKE_BINARY_DIR}/cuda/tma_maps)
    set(source ${CMAKE_SOURCE_DIR}/tests/cuda_host/tma_maps.cu)
    fastres_includes(${source} needed)
    set(others ${objects})
    list(FILTER others EXCLUDE REGEX "/conv(_plan|_driver_sm90)?\\.o$")
    list(TRANSFORM conv_flags REPLACE "^-O3$" "-O1" OUTPUT_VARIABLE quick)
    add_custom_command(
      OUTPUT ${tma_maps}
      COMMAND ${nvcc} ${quick} -isystem ${cutlass}/include -isystem ${cutlass}/tools/util/include
              -I${CMAKE_SOURCE_DIR}/csrc/cuda "-DFASTRES_CUDA_ARCHS=\"${code}\"" -c ${source}
              -o ${tma_maps}.o
      COMMAND ${nvcc} ${tma_maps}.o ${others} -o ${tma_maps}
      DEPENDS ${needed} ${headers} ${nvcc} ${others}
      ${pool}
      COMMENT "nvcc tma_maps.cu"
      VERBATIM)
    add_custom_target(tma_maps DEPENDS ${tma_maps})
    set(FASTRES_TMA_MAPS ${tma_maps} PARENT_SCOPE)
  endif()
  set(FASTRES_CUDA_OBJECTS ${objects} PARENT_SCOPE)
  set(FASTRES_CUDA_RUNTIME ${runtime} PARENT_SCOPE)
  set(convolutions "null")
  if(NOT conv_why)
    set(convolutions "\"CUTLASS ${cutlass_VERSION}\"")
  endif()
  set(FASTRES_CUDA_INFO
      "{\"nvcc\": \"${version}\", \"code\": \"${code}\", \"flags\": \"${shown}\", \"convolutions\": ${convolutions}}"
      PARENT_SCOPE)
endfunction()

fastres_find_cuda()
