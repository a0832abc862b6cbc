#include "parallel/sums.hpp"

#include "kernels/partial.hpp"

namespace dattn {
namespace {

/// MPI hands over records of the size of its datatype, at no better alignment than their numbers'.
template <class E>
void merge_records(const std::byte* in, std::byte* inout, std::int64_t records,
                   std::int64_t record_bytes) {
  merge(reinterpret_cast<const E*>(in), reinterpret_cast<E*>(inout), records,
        record_bytes / static_cast<std::int64_t>(sizeof(E)));
}

/// Likewise, of gradients.
template <class E>
void add_records(const std::byte* in, std::byte* inout, std::int64_t records,
                 std::int64_t record_bytes) {
  add_numbers(reinterpret_cast<const E*>(in), reinterpret_cast<E*>(inout),
              records * record_bytes / static_cast<std::int64_t>(sizeof(E)));
}

template <class E>
comm::Operation rule_of(Kind kind) {
  return kind == Kind::O ? comm::operation<merge_records<E>>() : comm::operation<add_records<E>>();
}

}  // namespace

comm::Operation sum_rule(Kind kind, Type type) {
  return type == Type::f8 ? rule_of<double>(kind) : rule_of<float>(kind);
}

}  // namespace dattn
