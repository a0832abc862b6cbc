#include "launcher/culprit.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <set>
#include <tuple>

namespace dattn {
namespace {

using Event = comm::Progress::Event;
using Records = std::map<int, FlightRecord>;
using Lines = std::vector<std::string>;

bool waits(const FlightRecord& r) {
  return r.at() != nullptr && r.at()->kind == comm::Progress::Kind::wait && r.at()->end < 0;
}

std::string name(const FlightRecord& r) {
  return fmt::format("rank {} ({}, pid {})", r.rank, r.host, r.pid);
}

std::string list(const std::vector<int>& ranks) {
  constexpr std::size_t kMost = 16;
  const std::vector<int> first(
      ranks.begin(), ranks.begin() + static_cast<std::ptrdiff_t>(std::min(kMost, ranks.size())));
  return fmt::format("{} {}{}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(first, ", "),
                     ranks.size() > kMost ? fmt::format(" and {} more", ranks.size() - kMost) : "");
}

/// Ranks that wait for a message from or to `rank`.
std::string awaited_by(const Records& records, int rank) {
  std::vector<int> others;
  for (const auto& [r, record] : records) {
    if (waits(record) && record.at()->peer == rank) others.push_back(r);
  }
  if (others.empty()) return "";
  return fmt::format("; {} {} for it", list(others), others.size() == 1 ? "waits" : "wait");
}

Lines who_failed(const Records& records) {
  Lines lines;
  for (const auto& [r, record] : records) {
    if (record.cause == Cause::failed) {
      lines.push_back(fmt::format("{} failed: {}", name(record), record.line));
    }
  }
  return lines;
}

Lines who_is_missing(const FlightRecords& all) {
  Lines lines;
  for (int r = 0; r < all.ranks.begin()->second.ranks; ++r) {
    if (all.ranks.contains(r)) continue;
    const std::string file = fmt::format("rank-{:05}.json", r);
    const bool cut =
        std::find(all.unreadable.begin(), all.unreadable.end(), file) != all.unreadable.end();
    lines.push_back(
        cut ? fmt::format(
                  "rank {} left a record that is cut off: it died while it wrote, or the disk "
                  "is full{}",
                  r, awaited_by(all.ranks, r))
            : fmt::format(
                  "rank {} left no record: it died, stood still, or its host writes to another "
                  "disk{}",
                  r, awaited_by(all.ranks, r)));
  }
  return lines;
}

Lines who_stood_still(const Records& records) {
  Lines lines;
  for (const auto& [r, record] : records) {
    if (record.paused <= 0) continue;
    lines.push_back(
        fmt::format("{} stood still for {:.1f} s: stopped by a signal or a debugger, or its host "
                    "was suspended{}",
                    name(record), record.paused, awaited_by(records, r)));
  }
  return lines;
}

/// Two ranks live and do not hear each other.
Lines which_link(const Records& records) {
  std::set<std::pair<std::string, std::string>> links;
  for (const auto& [r, record] : records) {
    for (const int other : record.silent) {
      const auto found = records.find(other);
      if (found == records.end() || found->second.host == record.host) continue;
      links.insert(std::minmax(record.host, found->second.host));
    }
  }
  Lines lines;
  for (const auto& [a, b] : links) {
    lines.push_back(fmt::format(
        "the link between {} and {}: ranks on both live, and do not hear each other", a, b));
  }
  return lines;
}

Lines who_hangs(const Records& records) {
  Lines lines;
  for (const auto& [r, record] : records) {
    if (record.told && record.seconds <= 0) continue;  // it still moved
    if (!waits(record)) {
      lines.push_back(fmt::format("{} waits for nobody and does not move: {}{}", name(record),
                                  record.place(), awaited_by(records, r)));
    }
  }
  return lines;
}

/// The ranks whose key is not that of most; none if no key is that of most.
template <class Key, class F>
std::vector<int> odd_ones(const std::vector<const FlightRecord*>& some, const F& key_of) {
  std::map<Key, std::vector<int>> groups;
  for (const FlightRecord* r : some) groups[key_of(*r)].push_back(r->rank);
  const auto most = std::max_element(
      groups.begin(), groups.end(),
      [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
  std::vector<int> odd;
  for (auto group = groups.begin(); group != groups.end(); ++group) {
    if (group == most) continue;
    if (group->second.size() == most->second.size()) return {};
    odd.insert(odd.end(), group->second.begin(), group->second.end());
  }
  return odd;
}

/// Ranks that wait for all ranks, at different places.
Lines who_is_at_another_collective(const Records& records) {
  std::vector<const FlightRecord*> some;
  for (const auto& [r, record] : records) {
    if (waits(record) && record.at()->peer < 0) some.push_back(&record);
  }
  using Key = std::tuple<std::string, std::int64_t>;
  const auto key = [](const FlightRecord& r) { return Key(r.at()->what, r.at()->sequence); };
  Lines lines;
  for (const int r : odd_ones<Key>(some, key)) {
    const FlightRecord& record = records.at(r);
    const auto other = std::find_if(some.begin(), some.end(),
                                    [&](const FlightRecord* o) { return key(*o) != key(record); });
    lines.push_back(fmt::format(
        "{} is at another collective than the others: its number {}, {}, where {} is at number {}, "
        "{}: it left one out or did one too many",
        name(record), record.at()->sequence, record.at()->what, name(**other),
        (*other)->at()->sequence, (*other)->at()->what));
  }
  for (const auto& [r, record] : records) {
    const auto beyond =
        std::find_if(record.events.begin(), record.events.end(), [&](const Event& e) {
          return e.kind == comm::Progress::Kind::wait && e.peer < 0 && e.end >= 0 &&
                 std::any_of(some.begin(), some.end(), [&](const FlightRecord* o) {
                   return o->at()->what == e.what && o->at()->sequence == e.sequence;
                 });
        });
    if (beyond == record.events.end() || (waits(record) && record.at()->peer < 0)) continue;
    lines.push_back(
        fmt::format("{} is beyond collective number {}, {}, in which others wait for all "
                    "ranks: it left that out, or one before: {}",
                    name(record), beyond->sequence, beyond->what, record.place()));
  }
  if (lines.empty() && some.size() > 1) {  // no majority
    const FlightRecord& a = *some.front();
    for (const FlightRecord* b : some) {
      if (key(a) == key(*b)) continue;
      lines.push_back(fmt::format(
          "{} is at collective number {}, {}, and {} at number {}, {}: one of "
          "them left one out or did one too many",
          name(a), a.at()->sequence, a.at()->what, name(*b), b->at()->sequence, b->at()->what));
      break;
    }
  }
  return lines;
}

Lines who_is_elsewhere(const Records& records) {
  std::vector<const FlightRecord*> all;
  for (const auto& [r, record] : records) {
    if (record.at() != nullptr) all.push_back(&record);
  }
  Lines lines;
  const auto phase = [](const FlightRecord& r) { return r.at()->phase; };
  for (const int r : odd_ones<std::string>(all, phase)) {
    lines.push_back(fmt::format("{} is in another phase than most: {}{}", name(records.at(r)),
                                records.at(r).place(), awaited_by(records, r)));
  }
  if (!lines.empty()) return lines;
  // All in one phase: some wait for all ranks, where others wait for them.
  for (const FlightRecord* r : all) {
    if (waits(*r) && r->at()->peer < 0 && !awaited_by(records, r->rank).empty()) {
      lines.push_back(fmt::format("{} is beyond what others wait for: {}{}", name(*r), r->place(),
                                  awaited_by(records, r->rank)));
    }
  }
  return lines;
}

/// Whom most wait for; nobody in a circle.
Lines who_is_waited_for(const Records& records) {
  std::map<int, int> waiting;
  for (const auto& [r, record] : records) {
    if (waits(record) && record.at()->peer >= 0) ++waiting[record.at()->peer];
  }
  Lines lines;
  if (waiting.empty()) return lines;
  const int most =
      std::max_element(waiting.begin(), waiting.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;
      })->second;
  for (const auto& [r, count] : waiting) {
    if (count != most) continue;
    const auto record = records.find(r);
    lines.push_back(fmt::format("perhaps rank {}{}{}: a message was lost, or a link is down", r,
                                record == records.end() ? "" : ", " + record->second.place(),
                                awaited_by(records, r)));
  }
  return lines;
}

}  // namespace

std::vector<std::string> culprits(const FlightRecords& records) {
  const Records& ranks = records.ranks;
  const std::function<Lines()> signs[] = {
      [&] { return who_failed(ranks); },       [&] { return who_is_missing(records); },
      [&] { return who_stood_still(ranks); },  [&] { return which_link(ranks); },
      [&] { return who_hangs(ranks); },        [&] { return who_is_at_another_collective(ranks); },
      [&] { return who_is_elsewhere(ranks); }, [&] { return who_is_waited_for(ranks); },
  };
  for (const auto& sign : signs) {
    if (Lines lines = sign(); !lines.empty()) return lines;
  }
  return {
      "no culprit: all ranks wait at the same place for all ranks; see the network, or mpirun's "
      "own messages"};
}

}  // namespace dattn
