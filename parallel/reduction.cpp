#include "parallel/reduction.hpp"

#include <algorithm>
#include <cmath>
#include <map>

namespace dattn {

Reduction::Reduction(const std::vector<int>& group, const Hosts& hosts, Index records,
                     bool own_messages)
    : records_(records), own_messages_(own_messages && group.size() > 1) {
  std::map<int, int> numbers;
  for (int member = 0; member < static_cast<int>(group.size()); ++member) {
    const int host = hosts.of(group[static_cast<std::size_t>(member)]);
    const auto [found, fresh] = numbers.try_emplace(host, static_cast<int>(by_host_.size()));
    if (fresh) by_host_.emplace_back();
    auto& there = by_host_[static_cast<std::size_t>(found->second)];
    host_of_.push_back(found->second);
    place_.push_back(static_cast<int>(there.size()));
    there.push_back(member);
  }
  for (const auto& some : by_host_) sizes_.push_back(std::ssize(some));
}

/// The records that a host sums up for all.
Range Reduction::part_of(int host) const {
  return exchanges() ? Range{0, records_} : even_part(records_, std::ssize(sizes_), host);
}

/// What the member has of them among the ranks of its host.
Range Reduction::cut(Range records, int member) const {
  const Range own =
      even_part(records.size(), size_of(host_of(member)), place_[static_cast<std::size_t>(member)]);
  return {records.begin + own.begin, records.begin + own.end};
}

Ranges Reduction::slice(int member) const {
  Ranges all;
  const int parts = exchanges() ? 1 : static_cast<int>(sizes_.size());
  for (int host = 0; host < parts; ++host) append(all, cut(part_of(host), member));
  return all;
}

Ranges Reduction::part(int member) const {
  Ranges own;
  append(own, cut(part_of(host_of(member)), member));
  return own;
}

Ranges Reduction::sent(Round round, int from, int to) const {
  if (from == to) return {};
  if (host_of(from) == host_of(to)) {
    if (round == Round::sum_inside) return slice(to);
    if (round == Round::share_inside) return slice(from);
    return {};
  }
  // Of the part of one of the two hosts, what both have in their slices.
  const auto common = [&](int host) {
    Ranges both;
    append(both, intersect(cut(part_of(host), from), cut(part_of(host), to)));
    return both;
  };
  if (round == Round::sum_between) return common(host_of(to));
  if (round == Round::share_between && !exchanges()) return common(host_of(from));
  return {};
}

Index Reduction::sent_by(int member) const {
  Index sum = 0;
  for (int host = 0; host < std::ssize(sizes_); ++host) sum += sent_to(member, host);
  return sum;
}

Index Reduction::sent_to(int member, int host) const {
  if (host == host_of(member)) {
    const Index own = size(slice(member));
    return records_ - own + (size_of(host) - 1) * own;
  }
  const Index summed = cut(part_of(host), member).size();
  return exchanges() ? summed : summed + size(part(member));
}

Index Reduction::scratch(int member) const {
  if (!by_messages()) return 0;
  return std::max((size_of(host_of(member)) - 1) * size(slice(member)),
                  (std::ssize(sizes_) - 1) * size(part(member)));
}

Index Reduction::messages(int member) const {
  Index most = 0;
  if (!by_messages()) return most;
  for (const Round round : kRounds) {
    Index count = 0;
    for (int other = 0; other < members(); ++other) {
      count += sent(round, member, other).empty() ? 0 : 1;
      count += sent(round, other, member).empty() ? 0 : 1;
    }
    most = std::max(most, count);
  }
  return most;
}

double Reduction::seconds(const Machine& machine, Index record_bytes) const {
  if (members() < 2) return 0;
  const auto wire = [&](Index records, const Link& link) {
    return static_cast<double>(records * record_bytes) / link.bandwidth;
  };
  const auto posting = [&](Index peers) {
    return static_cast<double>(2 * peers) * machine.overhead;
  };
  if (!across()) {
    const Link link = machine.inside();
    Index most = 0;
    for (int m = 0; m < members(); ++m) most = std::max(most, sent_by(m));
    return 2 * std::ceil(std::log2(static_cast<double>(members()))) * link.latency +
           wire(most, link);
  }
  // The first and the last round are mirror images, and so are those between hosts: what is sent in
  // one is received in the other. An end sends and receives at once.
  double inside = 0;
  double between = 0;
  const auto hosts = std::ssize(sizes_);
  for (int host = 0; host < hosts; ++host) {
    const Index others = size_of(host) - 1;
    for (const int m : by_host_[static_cast<std::size_t>(host)]) {
      const Index own = size(slice(m));
      if (others == 0) break;
      inside = std::max(inside, machine.inside().latency + posting(others) +
                                    wire(std::max(records_ - own, others * own), machine.inside()));
    }
    // All ranks of a host share its link.
    const Index own = part_of(host).size();
    const Index moved = exchanges() ? own : std::max(records_ - own, (hosts - 1) * own);
    between = std::max(
        between, machine.between().latency + posting(hosts - 1) + wire(moved, machine.between()));
  }
  return 2 * inside + (exchanges() ? 1 : 2) * between;
}

}  // namespace dattn
