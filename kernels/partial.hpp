#pragma once

#include <span>

#include "kernels/view.hpp"

namespace dattn {

/// A Partial is attention over some of the keys, possibly none: per row and head one *record* of
/// d_v + 2 numbers
///   m = max of the scores,   l = sum of exp(score - m),   a = sum of exp(score - m) * value
/// (natural exponent; a has d_v numbers). It stands for (O, LSE) = (a / l, m + ln l), but keeps
/// sums, so that merging loses nothing to repeated division. Over no key: (-inf, 0, anything), for
/// nothing that merges or finishes records looks at `a` where l is 0.
/// Source: the running state of FlashAttention-2 (Dao 2023).
inline Index record_length(Index d_v) { return d_v + 2; }

/// Makes every record of `partial`, which is dense, stand for no key at all, on so many threads, as
/// what follows; no bit depends on their number. Writes m and l alone, one of a record's eight or
/// more lines of memory.
template <class T>
void start(View<T> partial, int threads = 1);

/// The same, with `a` = 0: for who compares records.
template <class T>
void clear(View<T> partial, int threads = 1);

/// into <- from merged with into, record by record; commutative to the bit, and the identity is
/// the record of no key. Records hold `length` = d_v + 2 numbers.
template <class T>
void merge(const T* from, T* into, Index records, Index length, int threads = 1);

/// Merges an attention sink into every record: a key of score logits[head] whose value is 0
/// (gpt-oss). Once per row, after all its keys or before. `partial` [rows, heads, d_v + 2], one
/// logit a head.
template <class T>
void add_sink(View<T> partial, std::span<const float> logits);

/// O = a / l and LSE = m + ln l for `partial` [rows, heads, d_v + 2], of any stride; rows without
/// keys give O = 0 and LSE = -inf. `o` is [rows, heads, d_v], `lse` [rows, heads], both dense. Of
/// sigmoid attention nothing is divided: O = a e^m, and LSE is the logarithm of the weights' sum.
template <class T>
void finish(View<const T> partial, std::span<T> o, std::span<T> lse, int threads = 1,
            bool sigmoid = false);

}  // namespace dattn
