#pragma once

#include <cstddef>
#include <cstdint>

struct ompi_datatype_t;

namespace dattn::comm {

/// inout[i] = in[i] op inout[i] for each of `records` records of `record_bytes` bytes, where `in`
/// comes from the lower ranks. Must not throw. Must be associative.
/// Records lie at multiples of record_bytes from an aligned address, no more.
using Combine = void (*)(const std::byte* in, std::byte* inout, std::int64_t records,
                         std::int64_t record_bytes);

/// MPI_User_function, spelt without mpi.h; collectives.cpp asserts that the two are the same.
using MpiFunction = void(void* in, void* inout, int* count, ompi_datatype_t** record);

/// How all_reduce and reduce_scatter combine records; made by operation<combine>().
struct Operation {
  Combine combine;
  MpiFunction* function;
  bool commutative;
};

/// The size in bytes of one record of an MPI datatype.
std::int64_t record_bytes_of(ompi_datatype_t* record);

/// The operation that calls `combine`. A template parameter, because MPI hands its functions no
/// closure.
template <Combine combine>
Operation operation(bool commutative = true) {
  return {combine,
          [](void* in, void* inout, int* count, ompi_datatype_t** record) {
            combine(static_cast<const std::byte*>(in), static_cast<std::byte*>(inout), *count,
                    record_bytes_of(*record));
          },
          commutative};
}

}  // namespace dattn::comm
