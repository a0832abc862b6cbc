execute_process(COMMAND ldd ${binary} OUTPUT_VARIABLE libraries COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]*(libmpi|libopen-rte|libopen-pal|blas|libgomp|libomp)[^\n]*" found
       "${libraries}")
if(found)
  message(FATAL_ERROR "the plan half must not link:\n${found}")
endif()
