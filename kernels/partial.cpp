#include "kernels/partial.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/check.hpp"
#include "kernels/in_parts.hpp"

namespace dattn {

namespace {

template <class T>
Index bytes_of_records(Index length) {
  return length * static_cast<Index>(sizeof(T));
}

/// Records of no key; of each so many numbers are written.
template <class T>
void start_some(View<T> partial, Index numbers, int threads) {
  in_parts(threads, partial.rows * partial.heads, bytes_of_records<T>(partial.dim),
           [&](Range some) {
             for (Index i = some.begin; i < some.end; ++i) {
               T* record = partial.data + i * partial.dim;
               record[0] = -std::numeric_limits<T>::infinity();
               std::fill(record + 1, record + numbers, T{0});
             }
           });
}

template <class T>
void merge_some(const T* from, T* into, Index records, Index length) {
  for (Index i = 0; i < records; ++i, from += length, into += length) {
    // A side over no key is passed over, not weighted by zero: that keeps -inf - -inf away, and the
    // sign of zeros. The test is on l alone: a NaN score leaves m at -inf and l at NaN.
    if (from[1] == 0) continue;
    if (into[1] == 0) {
      std::copy(from, from + length, into);
      continue;
    }
    const T m = std::max(from[0], into[0]) + T{0};  // + 0: the maximum of 0 and -0 is 0 both ways
    const T wf = std::exp(from[0] - m);
    const T wi = std::exp(into[0] - m);
    into[0] = m;
    // Two products and a sum, each rounded: this file is compiled without contraction to FMA,
    // which would make merge(a, b) and merge(b, a) differ in the last bit.
    for (Index j = 1; j < length; ++j) into[j] = from[j] * wf + into[j] * wi;
  }
}

/// O and LSE of a record.
template <class T>
T finish_one(const T* record, Index d_v, bool sigmoid, T* out) {
  const T l = record[1];
  if (l == 0) {
    std::fill(out, out + d_v, T{0});
    return -std::numeric_limits<T>::infinity();
  }
  const T divisor = sigmoid ? std::exp(-record[0]) : l;
  for (Index j = 0; j < d_v; ++j) out[j] = record[2 + j] / divisor;
  // In double: ln l can be as large as m, and one rounding is enough.
  return static_cast<T>(static_cast<double>(record[0]) + std::log(static_cast<double>(l)));
}

}  // namespace

template <class T>
void start(View<T> partial, int threads) {
  start_some(partial, 2, threads);
}

template <class T>
void clear(View<T> partial, int threads) {
  start_some(partial, partial.dim, threads);
}

template <class T>
void merge(const T* from, T* into, Index records, Index length, int threads) {
  in_parts(threads, records, bytes_of_records<T>(length), [&](Range some) {
    merge_some(from + some.begin * length, into + some.begin * length, some.size(), length);
  });
}

template <class T>
void add_sink(View<T> partial, std::span<const float> logits) {
  CHECK(static_cast<Index>(logits.size()) == partial.heads, logits.size(), partial.heads);
  std::vector<T> record(static_cast<std::size_t>(partial.dim), T{0});
  record[1] = 1;
  for (Index row = 0; row < partial.rows; ++row) {
    for (Index h = 0; h < partial.heads; ++h) {
      record[0] = static_cast<T>(logits[static_cast<std::size_t>(h)]);
      merge<T>(record.data(), partial.at(row, h), 1, partial.dim);
    }
  }
}

template <class T>
void finish(View<const T> partial, std::span<T> o, std::span<T> lse, int threads, bool sigmoid) {
  const Index d_v = partial.dim - 2;
  const Index records = partial.rows * partial.heads;
  CHECK(static_cast<Index>(o.size()) == records * d_v && static_cast<Index>(lse.size()) == records,
        o.size(), lse.size(), records, d_v);
  in_parts(threads, records, bytes_of_records<T>(partial.dim), [&](Range some) {
    for (Index i = some.begin; i < some.end; ++i) {
      lse[static_cast<std::size_t>(i)] = finish_one(
          partial.at(i / partial.heads, i % partial.heads), d_v, sigmoid, o.data() + i * d_v);
    }
  });
}

template void start(View<float>, int);
template void start(View<double>, int);
template void clear(View<float>, int);
template void clear(View<double>, int);
template void merge(const float*, float*, Index, Index, int);
template void merge(const double*, double*, Index, Index, int);
template void add_sink(View<float>, std::span<const float>);
template void add_sink(View<double>, std::span<const float>);
template void finish(View<const float>, std::span<float>, std::span<float>, int, bool);
template void finish(View<const double>, std::span<double>, std::span<double>, int, bool);

}  // namespace dattn
