#include "comm/handles.hpp"

#include <fmt/format.h>

#include <limits>
#include <stdexcept>

#include "comm/error.hpp"

namespace dattn::comm {

int to_int(std::int64_t value, const char* what) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    throw std::length_error(fmt::format("{}: {} does not fit MPI's int", what, value));
  }
  return static_cast<int>(value);
}

bool finalized() noexcept {
  int flag = 0;
  MPI_Finalized(&flag);
  return flag != 0;
}

Datatype::Datatype(const Strips& strips) {
  std::vector<int> lengths;
  std::vector<MPI_Aint> places;
  std::vector<MPI_Datatype> types;
  std::vector<MPI_Datatype> vectors;
  int code = MPI_SUCCESS;
  for (const Strip& strip : strips) {
    if (code != MPI_SUCCESS) break;
    MPI_Aint place = 0;
    code = MPI_Get_address(strip.data, &place);
    places.push_back(place);
    const int length = to_int(strip.length, "strip length");
    if (strip.count == 1) {
      lengths.push_back(length);
      types.push_back(MPI_BYTE);
    } else if (code == MPI_SUCCESS) {
      MPI_Datatype vector = MPI_DATATYPE_NULL;
      code = MPI_Type_create_hvector(to_int(strip.count, "strip count"), length, strip.stride,
                                     MPI_BYTE, &vector);
      lengths.push_back(1);
      types.push_back(vector);
      vectors.push_back(vector);
    }
  }
  if (code == MPI_SUCCESS) {
    code = MPI_Type_create_struct(to_int(std::ssize(types), "strips"), lengths.data(),
                                  places.data(), types.data(), &handle_);
  }
  for (MPI_Datatype& vector : vectors) {
    if (vector != MPI_DATATYPE_NULL) MPI_Type_free(&vector);
  }
  if (code == MPI_SUCCESS) code = MPI_Type_commit(&handle_);
  check(code);
}

Datatype::Datatype(std::int64_t bytes) {
  check(MPI_Type_contiguous(to_int(bytes, "record"), MPI_BYTE, &handle_));
  check(MPI_Type_commit(&handle_));
}

Datatype::~Datatype() {
  if (handle_ != MPI_DATATYPE_NULL && !finalized()) MPI_Type_free(&handle_);
}

Op::Op(const Operation& operation) {
  check(MPI_Op_create(operation.function, operation.commutative ? 1 : 0, &handle_));
}

Op::~Op() {
  if (handle_ != MPI_OP_NULL && !finalized()) MPI_Op_free(&handle_);
}

}  // namespace dattn::comm
