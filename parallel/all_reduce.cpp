#include "parallel/all_reduce.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/check.hpp"

namespace dattn {
namespace {

/// One message between this rank and `peer`, a member of the group.
struct Exchanged {
  int peer;
  Ranges records;
};

comm::Strips strips_at(std::byte* begin, const Ranges& records, Index record_bytes) {
  comm::Strips strips;
  for (const Range r : records) {
    const Index bytes = r.size() * record_bytes;
    strips.push_back({begin + r.begin * record_bytes, 1, bytes, bytes});
  }
  return strips;
}

}  // namespace

template <comm::Transport T>
AllReduce<T>::AllReduce(T& transport, std::vector<int> group, const Hosts& hosts)
    : transport_(&transport), group_(std::move(group)), hosts_(hosts) {
  const auto found = std::find(group_.begin(), group_.end(), transport.rank());
  CHECK(found != group_.end(), transport.rank());
  CHECK(hosts.count() == 1 || hosts.size() == transport.size(), hosts.size(), transport.size());
  here_ = static_cast<int>(found - group_.begin());
  // Whatever the group: all ranks split together.
  if (hosts.count() > 1) channel_.emplace(transport.split(0, transport.rank()));
  const bool all = static_cast<int>(group_.size()) == transport.size();
  if (!all) part_.emplace(transport.split(group_.front(), here_));
}

template <comm::Transport T>
Hosts AllReduce<T>::hosts() const {
  std::vector<int> by_member;
  for (const int rank : group_) by_member.push_back(hosts_.of(rank));
  return Hosts(by_member);
}

template <comm::Transport T>
void AllReduce<T>::reserve(Index records, Index record_bytes) {
  const auto bytes =
      static_cast<std::size_t>(Reduction(group_, hosts_, records).scratch(here_) * record_bytes);
  if (scratch_.size() < bytes) scratch_.resize(bytes);
}

template <comm::Transport T>
typename AllReduce<T>::Sent AllReduce<T>::operator()(std::span<std::byte> records,
                                                     Index record_bytes,
                                                     const comm::Operation& operation) {
  const Index count = std::ssize(records) / record_bytes;
  CHECK(count * record_bytes == std::ssize(records), records.size(), record_bytes);
  if (group_.size() == 1 || count == 0) return {};
  const Reduction how(group_, hosts_, count);
  if (how.across()) {
    CHECK(operation.commutative);
    over_hosts(how, records, record_bytes, operation);
  } else {
    transport().all_reduce(records, record_bytes, operation);
  }
  const Index sent = how.sent_by(here_);
  return {sent * record_bytes, (sent - how.sent_to(here_, how.host_of(here_))) * record_bytes};
}

template <comm::Transport T>
void AllReduce<T>::over_hosts(const Reduction& how, std::span<std::byte> records,
                              Index record_bytes, const comm::Operation& operation) {
  using Round = Reduction::Round;
  const int members = static_cast<int>(group_.size());
  reserve(std::ssize(records) / record_bytes, record_bytes);

  /// Exchanges the messages of a round; `into` says where what a member sends goes.
  const auto exchange = [&](Round round, const auto& into) {
    std::vector<typename T::Request> requests;
    const auto rank = [&](int member) { return group_[static_cast<std::size_t>(member)]; };
    for (int i = 1; i < members; ++i) {  // everybody starts with another peer
      const int from = (here_ + members - i) % members;
      const Ranges some = how.sent(round, from, here_);
      if (!some.empty()) requests.push_back(channel_->recv(into(from, some), rank(from)));
    }
    for (int i = 1; i < members; ++i) {
      const int to = (here_ + i) % members;
      const Ranges some = how.sent(round, here_, to);
      if (some.empty()) continue;
      requests.push_back(channel_->send(strips_at(records.data(), some, record_bytes), rank(to)));
    }
    for (auto& request : requests) request.wait();
  };
  /// Sums up `own` over some holders of it, of which this rank is number `self` and the others have
  /// theirs in the scratch memory, one behind the other, each dense.
  const auto sum_up = [&](const Ranges& own, Index holders, Index self) {
    const Index bytes = size(own) * record_bytes;
    Index before = 0;  // bytes of `own`
    for (const Range some : own) {
      std::byte* const here = records.data() + some.begin * record_bytes;
      const auto of = [&](Index holder) {
        if (holder == self) return here;
        return scratch_.data() + (holder < self ? holder : holder - 1) * bytes + before;
      };
      std::byte* sum = of(holders - 1);
      for (Index holder = holders - 1; holder-- > 0;) {
        operation.combine(of(holder), sum, some.size(), record_bytes);
      }
      if (sum != here) {
        std::memcpy(here, sum, static_cast<std::size_t>(some.size() * record_bytes));
      }
      before += some.size() * record_bytes;
    }
  };
  /// Where in the scratch memory records of `own` lie that holder `holder` has.
  const auto beside = [&](const Ranges& own, Index holder, Index self, const Ranges& some) {
    comm::Strips strips;
    const Index first = (holder < self ? holder : holder - 1) * size(own);
    for (const Range r : some) {
      const Index bytes = r.size() * record_bytes;
      strips.push_back(
          {scratch_.data() + (first + *place_of(own, r.begin)) * record_bytes, 1, bytes, bytes});
    }
    return strips;
  };
  const auto in_place = [&](int, const Ranges& some) {
    return strips_at(records.data(), some, record_bytes);
  };

  const int host = how.host_of(here_);
  const std::vector<int>& together = how.by_host()[static_cast<std::size_t>(host)];
  const auto place = [&](int member) {
    return std::find(together.begin(), together.end(), member) - together.begin();
  };
  const Ranges slice = how.slice(here_);
  exchange(Round::sum_inside, [&](int from, const Ranges& some) {
    return beside(slice, place(from), place(here_), some);
  });
  sum_up(slice, std::ssize(together), place(here_));
  const Ranges part = how.part(here_);
  exchange(Round::sum_between, [&](int from, const Ranges& some) {
    return beside(part, how.host_of(from), host, some);
  });
  sum_up(part, std::ssize(how.by_host()), host);
  exchange(Round::share_between, in_place);
  exchange(Round::share_inside, in_place);
}

std::vector<int> all_ranks(int ranks) {
  std::vector<int> all(static_cast<std::size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

template class AllReduce<comm::Communicator>;
template class AllReduce<comm::Windows>;
template class AllReduce<comm::Loopback::Endpoint>;

}  // namespace dattn
