#pragma once

// Who of a pull needs what of whom, and when: for who writes its Programs.

#include <algorithm>
#include <compare>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "parallel/moves.hpp"
#include "parallel/problem.hpp"

namespace dattn {

/// When something is done, by a clock that all ranks share: at time t a rank computes its stage t,
/// that of the rank t places before it. Whatever an action waits for has an earlier Moment, so
/// nothing deadlocks; and the messages of two ranks have the same order at both ends.
struct Moment {
  int time = 0;
  enum Phase { kSend, kRelay, kFetch, kCompute, kAdd, kReturn } phase = kSend;
  /// Of a send of inputs: in which phase they are received. Of what goes back: in which it is sent.
  Phase met_in = kSend;
  int owner = 0;
  std::size_t group = 0;
  auto operator<=>(const Moment&) const = default;
};

inline constexpr Moment kNever{std::numeric_limits<int>::max()};

/// The same on all ranks: what is sent of one side of a pass's blocks, to whom, and at which
/// Moment.
class PullClock {
 public:
  /// The ranks of a host that need anything of a rank, heads of one group.
  struct Parcel {
    std::vector<int> readers;
    int courier = -1;  ///< none: each fetches for itself
  };

  PullClock(const Problem& problem, const Side& side)
      : problem_(problem), side_(side), ranks_(problem.ranks()), ahead_(problem.prefetch()) {
    if (problem_.relays()) {
      for (int h = 0; h < problem_.hosts().count(); ++h) {
        hosts_.push_back(problem_.hosts().ranks(h));
      }
    } else {
      hosts_.emplace_back(static_cast<std::size_t>(ranks_));
      std::iota(hosts_[0].begin(), hosts_[0].end(), 0);
    }
  }

  // ---- who needs what --------------------------------------------------------------------------

  int host_of(int rank) const { return hosts_.size() == 1 ? 0 : problem_.hosts().of(rank); }
  const std::vector<int>& ranks_of(int host) const {
    return hosts_[static_cast<std::size_t>(host)];
  }
  int distance(int reader, int owner) const { return (reader - owner + ranks_) % ranks_; }
  std::size_t groups() const { return problem_.head_groups().size(); }
  Kind first_input() const { return side_.inputs.front(); }

  const Partition& rows_of(Kind kind) const {
    return of_queries(kind) ? problem_.queries() : problem_.keys();
  }
  const Ranges& needed(std::size_t group, int reader) const {
    return of_queries(first_input()) ? problem_.queries_needed(reader, group)
                                     : problem_.keys_needed(reader, group);
  }
  /// Ranks that need anything of the owner's rows, ascending.
  const std::vector<int>& readers(int owner, std::size_t group) const {
    return of_queries(first_input()) ? problem_.query_readers(owner, group)
                                     : problem_.key_readers(owner, group);
  }
  bool needs(int reader, int owner, std::size_t group) const {
    const std::vector<int>& all = readers(owner, group);
    return std::binary_search(all.begin(), all.end(), reader);
  }
  Block block(Kind kind, std::size_t group, Ranges rows) const {
    return {kind, heads_touched(kind, problem_.head_groups()[group], problem_.shape()),
            std::move(rows)};
  }
  /// The owner's rows that the reader wants, or all of these readers together.
  Ranges rows(std::size_t group, int reader, int owner) const {
    return rows_of(first_input()).rows_at(owner, needed(group, reader));
  }
  Ranges rows(std::size_t group, const std::vector<int>& readers, int owner) const {
    std::vector<Range> all;
    for (const int reader : readers) {
      const Ranges some = rows(group, reader, owner);
      all.insert(all.end(), some.begin(), some.end());
    }
    return union_of(std::move(all));
  }

  Parcel parcel(int owner, std::size_t group, int host) const {
    Parcel p;
    const std::vector<int>& all = readers(owner, group);
    const int last = ranks_of(host).back();
    for (auto reader = std::lower_bound(all.begin(), all.end(), ranks_of(host).front());
         reader != all.end() && *reader <= last; ++reader) {
      if (*reader != owner && host_of(*reader) == host) p.readers.push_back(*reader);
    }
    if (host_of(owner) != host && p.readers.size() > 1) {
      const auto turn = static_cast<std::size_t>(place_in(ranks_of(host_of(owner)), owner)) + group;
      p.courier = p.readers[turn % p.readers.size()];
    }
    return p;
  }

  // ---- when ------------------------------------------------------------------------------------

  /// The stages of a rank at which it computes anything.
  const std::vector<int>& stages_of(int reader) const {
    return of_queries(first_input()) ? problem_.query_distances(reader)
                                     : problem_.key_distances(reader);
  }
  bool computes_at(int reader, int d) const {
    const std::vector<int>& stages = stages_of(reader);
    return std::binary_search(stages.begin(), stages.end(), d);
  }
  /// A reader asks for its stage so many of them before.
  Moment fetching(int reader, int owner, std::size_t group) const {
    const std::vector<int>& stages = stages_of(reader);
    const int d = distance(reader, owner);
    const auto before =
        static_cast<int>(std::lower_bound(stages.begin(), stages.end(), d) - stages.begin()) -
        ahead_;
    const int time = before < 0 ? before : stages[static_cast<std::size_t>(before)];
    return {time, Moment::kFetch, Moment::kFetch, owner, group};
  }
  /// The courier as long before the first reader asks.
  Moment relaying(const Parcel& p, int owner, std::size_t group) const {
    int first = ranks_;
    for (const int reader : p.readers) first = std::min(first, fetching(reader, owner, 0).time);
    return {first - ahead_, Moment::kRelay, Moment::kRelay, owner, group};
  }
  /// The sender of what is received at `met`.
  static Moment sending(Moment met) {
    met.phase = Moment::kSend;
    return met;
  }
  /// A rank gives back what it has just computed, a courier what it has added up.
  static Moment returning(int time, int owner, std::size_t group, bool added_up) {
    return {time, Moment::kReturn, added_up ? Moment::kReturn : Moment::kCompute, owner, group};
  }
  /// When the courier has added up everything that the host gives back.
  int complete(const Parcel& p, int owner) const {
    int time = 0;
    for (const int reader : p.readers) {
      time = std::max(time, distance(reader, owner) + (reader == p.courier ? 0 : 1));
    }
    return time;
  }

 protected:
  const Problem& problem_;
  const Side side_;
  const int ranks_;
  const int ahead_;
  std::vector<std::vector<int>> hosts_;  ///< ranks of each; one of all where nothing is relayed
};

}  // namespace dattn
