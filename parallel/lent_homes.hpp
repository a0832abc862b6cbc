#pragma once

// Homes of a Program that slots have in turn: for who writes plans.

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "parallel/moves.hpp"

namespace dattn {

/// Homes that are handed out one after the other, again after restart().
class HomesInTurn {
 public:
  explicit HomesInTurn(Writer& me) : me_(&me) {}
  void restart() { used_ = 0; }
  int next() {
    if (used_ == homes_.size()) homes_.push_back(me_->home());
    return homes_[used_++];
  }

 private:
  Writer* me_;
  std::vector<int> homes_;
  std::size_t used_ = 0;
};

/// Sets of homes, one for each of some kinds, that are lent until a time.
class Shelves {
 public:
  Shelves(Writer& me, std::span<const Kind> kinds) : me_(&me), kinds_(kinds) {}
  /// A set that nobody uses at `from` or later.
  const std::vector<int>& lend(int from, int until) {
    const auto free =
        std::find_if(sets_.begin(), sets_.end(), [&](const Set& s) { return s.until < from; });
    if (free != sets_.end()) {
      free->until = until;
      return free->homes;
    }
    Set& set = sets_.emplace_back();
    set.until = until;
    for (std::size_t i = 0; i < kinds_.size(); ++i) set.homes.push_back(me_->home());
    return set.homes;
  }

 private:
  struct Set {
    std::vector<int> homes;
    int until = 0;
  };
  Writer* me_;
  std::span<const Kind> kinds_;
  std::vector<Set> sets_;
};

}  // namespace dattn
