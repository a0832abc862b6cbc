#include "parallel/all_reduce.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/check.hpp"
#include "parallel/sealed.hpp"

namespace dattn {
namespace {

comm::Strips strips_at(std::byte* begin, const Ranges& records, Index record_bytes) {
  comm::Strips strips;
  for (const Range r : records) {
    const Index bytes = r.size() * record_bytes;
    strips.push_back({begin + r.begin * record_bytes, 1, bytes, bytes});
  }
  return strips;
}

/// As complaints say it.
std::string words_of(Reduction::Round round) {
  switch (round) {
    case Reduction::Round::sum_inside:
      return "addend of an all-reduce inside the host";
    case Reduction::Round::sum_between:
      return "addend of an all-reduce between hosts";
    case Reduction::Round::share_between:
      return "sum of an all-reduce between hosts";
    case Reduction::Round::share_inside:
      break;
  }
  return "sum of an all-reduce inside the host";
}

}  // namespace

template <comm::Transport T>
AllReduce<T>::AllReduce(T& transport, std::vector<int> group, const Hosts& hosts, bool verifies)
    : transport_(&transport), group_(std::move(group)), hosts_(hosts), verifies_(verifies) {
  const auto found = std::find(group_.begin(), group_.end(), transport.rank());
  CHECK(found != group_.end(), transport.rank());
  CHECK(hosts.count() == 1 || hosts.size() == transport.size(), hosts.size(), transport.size());
  here_ = static_cast<int>(found - group_.begin());
  // Whatever the group: all ranks split together.
  if (hosts.count() > 1 || verifies) channel_.emplace(transport.split(0, transport.rank()));
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
  const auto bytes = static_cast<std::size_t>(
      Reduction(group_, hosts_, records, verifies_).scratch(here_) * record_bytes);
  if (scratch_.size() < bytes) scratch_.resize(bytes);
}

template <comm::Transport T>
typename AllReduce<T>::Sent AllReduce<T>::operator()(std::span<std::byte> records,
                                                     Index record_bytes,
                                                     const comm::Operation& operation) {
  const Index count = std::ssize(records) / record_bytes;
  CHECK(count * record_bytes == std::ssize(records), records.size(), record_bytes);
  if (group_.size() == 1 || count == 0) return {};
  const Reduction how(group_, hosts_, count, verifies_);
  CHECK(operation.commutative || !how.across());
  Index envelopes = 0;
  if (how.by_messages()) {
    envelopes = by_messages(how, records, record_bytes, operation);
  } else {
    transport().all_reduce(records, record_bytes, operation);
  }
  if (verifies_) require_same_bytes(transport(), transport_->rank(), records);
  const Index sent = how.sent_by(here_);
  return {sent * record_bytes, (sent - how.sent_to(here_, how.host_of(here_))) * record_bytes,
          envelopes};
}

template <comm::Transport T>
Index AllReduce<T>::by_messages(const Reduction& how, std::span<std::byte> records,
                                Index record_bytes, const comm::Operation& operation) {
  using Round = Reduction::Round;
  const int members = static_cast<int>(group_.size());
  reserve(std::ssize(records) / record_bytes, record_bytes);

  Index envelopes = 0;
  /// Exchanges the messages of a round; `into` says where what a member sends goes.
  const auto exchange = [&](Round round, const auto& into) {
    SealedMessages<T> messages(*channel_, words_of(round), verifies_);
    const auto rank = [&](int member) { return group_[static_cast<std::size_t>(member)]; };
    for (int i = 1; i < members; ++i) {  // everybody starts with another peer
      const int from = (here_ + members - i) % members;
      const Ranges some = how.sent(round, from, here_);
      if (!some.empty()) messages.recv(into(from, some), rank(from));
    }
    for (int i = 1; i < members; ++i) {
      const int to = (here_ + i) % members;
      const Ranges some = how.sent(round, here_, to);
      if (some.empty()) continue;
      messages.send(comm::read_only(strips_at(records.data(), some, record_bytes)), rank(to));
    }
    messages.wait();
    envelopes += messages.envelopes();
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
  return envelopes;
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
