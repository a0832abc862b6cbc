#pragma once

#include <utility>
#include <vector>

#include "kernels/view.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// The means of dropped keys and of their values: of all that a head drops together, or of each
/// rank's; for a check, by other sums than those of a run. Keys come by in pieces.
class Means {
 public:
  struct Mean {
    Range query_heads;
    double count = 0;
    std::vector<double> key, value;
  };

  explicit Means(const Problem& problem)
      : problem_(problem),
        parts_(problem.compensate() == Compensate::off    ? 0
               : problem.compensate() == Compensate::head ? 1
                                                          : problem.ranks()) {
    const Shape& shape = problem.shape();
    for (Index n = 0; parts_ > 0 && n < std::ssize(problem.dropped()) * parts_; ++n) {
      means_.push_back({problem.dropped()[static_cast<std::size_t>(n / parts_)].query_heads, 0,
                        std::vector<double>(static_cast<std::size_t>(shape.d_qk)),
                        std::vector<double>(static_cast<std::size_t>(shape.d_v))});
    }
  }

  template <class T>
  void add(const Run& piece, View<const T> k, View<const T> v) {
    if (means_.empty()) return;
    const std::vector<Index> parts = parts_of(piece);
    const auto add_to = [](std::vector<double>& sum, const T* numbers) {
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(numbers[i]);
    };
    Index first = 0;  // of the entry's means
    for (const Dropped& entry : problem_.dropped()) {
      for (const Range range : intersect(entry.keys, {piece.bounds()})) {
        for (Index j = range.begin - piece.first; j < range.end - piece.first; ++j) {
          const Index n = first + parts[static_cast<std::size_t>(j)];
          Mean& mean = means_[static_cast<std::size_t>(n)];
          ++mean.count;
          add_to(mean.key, k.at(j, entry.key_head));
          add_to(mean.value, v.at(j, entry.value_head));
        }
      }
      first += parts_;
    }
  }

  /// Those of all keys that came by; none of no key.
  std::vector<Mean> finish() && {
    std::erase_if(means_, [](const Mean& mean) { return mean.count == 0; });
    for (Mean& mean : means_) {
      for (double& x : mean.key) x /= mean.count;
      for (double& x : mean.value) x /= mean.count;
    }
    return std::move(means_);
  }

 private:
  /// The part that each key of the piece belongs to: its owner, where each rank has a mean.
  std::vector<Index> parts_of(const Run& piece) const {
    std::vector<Index> parts(static_cast<std::size_t>(piece.count), 0);
    const Partition& keys = problem_.keys();
    for (int r = 0; parts_ > 1 && r < problem_.ranks(); ++r) {
      for (const Run& run : keys.positions(keys.rows_at(r, {piece.bounds()}))) {
        for (Index i = 0; i < run.count; ++i) {
          parts[static_cast<std::size_t>(run.at(i) - piece.first)] = r;
        }
      }
    }
    return parts;
  }

  const Problem& problem_;
  Index parts_;
  std::vector<Mean> means_;  ///< sums until finish(); by entry of dropped() and part
};

}  // namespace dattn
