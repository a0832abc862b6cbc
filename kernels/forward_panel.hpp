#pragma once

// What drivers of forward do with a panel beside its steps: the folder's own, not for others to
// include.

#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "kernels/check.hpp"
#include "kernels/panel.hpp"

namespace dattn {

/// Merges what the lanes of a panel found into their records; null: no lane.
inline void merge_panel(const Kernel& kernel, const float* m, const double* l, const float* o,
                        Index d_v, std::span<float* const> records) {
  constexpr std::size_t kMost = 32;  // the bits of a word (Lanes)
  CHECK(records.size() <= kMost, records.size());
  std::array<float, kMost> keep{};
  std::array<float, kMost> add{};
  std::array<float*, kMost> row{};
  for (std::size_t lane = 0; lane < records.size(); ++lane) {
    if (records[lane] == nullptr) continue;
    const MergeWeights w = merge_head(kernel.nats * m[lane], l[lane], records[lane], d_v);
    if (w.add == 0) continue;
    keep[lane] = w.keep;
    add[lane] = w.add;
    row[lane] = records[lane] + 2;
  }
  kernel.give(o, static_cast<int>(d_v), keep.data(), add.data(), row.data());
}

/// A step under a mask where some value is not finite. A lane that may not see a key weighs its
/// value with 0, which does not keep NaN or infinity out. So lanes that see the same keys are taken
/// by themselves, the other keys' values being 0; the weights, and the bits of everything finite,
/// are those of the ordinary step. Lanes of one row see the same, and `row_of_lane` is negative
/// where there is none; `mark(lane, sees)` sets what the lane's row sees of the keys, `value(key)`
/// is where a value lies.
template <class T, class Mark, class Value>
void forward_apart(const Kernel& kernel, ForwardStep s, std::span<const Index> row_of_lane,
                   Index keys, const Mark& mark, const Value& value) {
  const Index d_v = s.d_v;
  const std::size_t lanes = row_of_lane.size();
  const std::vector<float> m(s.m, s.m + lanes);
  const std::vector<double> l(s.l, s.l + lanes);
  const std::vector<float> o(s.o, s.o + static_cast<Index>(lanes) * d_v);
  std::vector<float> result(o);
  std::vector<float> m_after(m);
  std::vector<double> l_after(l);
  std::vector<T> values(static_cast<std::size_t>(keys * d_v));
  std::vector<unsigned> sees(static_cast<std::size_t>(keys));
  Buffer<std::byte> pack(aligned(kernel.v_size(static_cast<int>(d_v))));
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    if (row_of_lane[lane] < 0) continue;
    if (lane == 0 || row_of_lane[lane] != row_of_lane[lane - 1]) {
      std::fill(sees.begin(), sees.end(), 0u);
      mark(lane, sees);
      std::fill(values.begin(), values.end(), T{});
      for (Index j = 0; j < keys; ++j) {
        if (sees[static_cast<std::size_t>(j)] == 0) continue;
        std::copy_n(value(j), d_v, values.begin() + j * d_v);
      }
      kernel.pack_v({values.data(), d_v, static_cast<int>(keys), s.d_v, element_of<T>()},
                    pack.get());
      std::copy(m.begin(), m.end(), s.m);
      std::copy(l.begin(), l.end(), s.l);
      std::copy(o.begin(), o.end(), s.o);
      s.v = pack.get();
      kernel.forward(s);
    }
    m_after[lane] = s.m[lane];
    l_after[lane] = s.l[lane];
    for (Index i = 0; i < d_v; ++i) {
      const auto at = static_cast<std::size_t>(i) * lanes + lane;
      result[at] = s.o[at];
    }
  }
  std::copy(m_after.begin(), m_after.end(), s.m);
  std::copy(l_after.begin(), l_after.end(), s.l);
  std::copy(result.begin(), result.end(), s.o);
}

}  // namespace dattn
