# Installs this build into a fresh prefix, then builds and runs consumer/ against it.
set(prefix ${scratch}/prefix)
file(REMOVE_RECURSE ${scratch})

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

run(${CMAKE_COMMAND} --install ${build} --config ${config} --prefix ${prefix})

# A path of the build tree in an installed package works on this machine only.
file(GLOB_RECURSE package ${prefix}/*/dattn*.cmake)
foreach(file IN LISTS package)
  file(READ ${file} text)
  string(REPLACE "${prefix}" "" text "${text}")
  string(FIND "${text}" "${source}/" leak)
  if(NOT leak EQUAL -1)
    message(FATAL_ERROR "${file} names the source tree ${source}")
  endif()
endforeach()

run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/consumer -B ${scratch}/consumer -G ${generator}
    -D CMAKE_BUILD_TYPE=${config} -D CMAKE_PREFIX_PATH=${prefix}
    -D CMAKE_C_COMPILER=${c_compiler} -D CMAKE_CXX_COMPILER=${cxx_compiler}
    -D CMAKE_CXX_FLAGS=${cxx_flags} -D CMAKE_RUNTIME_OUTPUT_DIRECTORY=${scratch}/bin)
run(${CMAKE_COMMAND} --build ${scratch}/consumer --config ${config})
run(${scratch}/bin/consumer)
run(${prefix}/bin/dattn --help)
