#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// What was found out about rows of queries and rows of keys, kept for the rehearsals to come,
/// which ask the same of other programs, as far as there is room. May be asked by several threads.
template <class Answer>
class KnownCounts {
 public:
  /// Keeps answers about so many Ranges in all.
  explicit KnownCounts(std::size_t room) : room_(room) {}

  /// What find() says, or has said; `about` is whatever else that depends on, as the variant of the
  /// mask.
  template <class Find>
  Answer of(std::vector<Index> about, const Ranges& query_rows, const Ranges& key_rows,
            const Find& find) {
    const std::size_t ranges = query_rows.size() + key_rows.size();
    if (ranges > room_) return find();
    std::tuple key(std::move(about), query_rows, key_rows);
    {
      const std::lock_guard lock(mutex_);
      const auto known = known_.find(key);
      if (known != known_.end()) return known->second;
    }
    const Answer found = find();
    const std::lock_guard lock(mutex_);
    if (kept_ + ranges <= room_ && known_.try_emplace(std::move(key), found).second) {
      kept_ += ranges;
    }
    return found;
  }

 private:
  std::size_t room_;
  std::size_t kept_ = 0;  ///< Ranges
  std::mutex mutex_;
  std::map<std::tuple<std::vector<Index>, Ranges, Ranges>, Answer> known_;
};

}  // namespace dattn
