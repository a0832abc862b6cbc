#include "parallel/couriers.hpp"

#include <algorithm>

namespace dattn {
namespace {

/// The heads of `all` that `some` has not.
Ranges without(const Ranges& all, const Ranges& some) {
  Ranges rest;
  for (const Range heads : all) {
    Index from = heads.begin;
    for (const Range gone : some) {
      const Range both = intersect(heads, gone);
      if (both.empty()) continue;
      append(rest, {from, both.begin});
      from = both.end;
    }
    append(rest, {from, heads.end});
  }
  return rest;
}

}  // namespace

Couriers::Couriers(const Problem& problem, const std::vector<int>& group,
                   const std::vector<Block>& owned, const std::vector<Block>& worked_on)
    : problem_(problem), group_(group), owned_(owned), worked_on_(worked_on) {
  for (std::size_t member = 0; member < group.size() && problem.relays(); ++member) {
    members_[host_of(member)].push_back(member);
  }
}

const Block& Couriers::straight(std::size_t owner, std::size_t member) {
  static const Block kNone;
  if (owned_[owner].empty() || worked_on_[member].empty()) return kNone;
  if (relayed(owner, member)) return between(owner, member).straight.at(member);
  const auto [found, fresh] = alone_.try_emplace({owner, member});
  if (fresh) found->second = intersect(owned_[owner], worked_on_[member]);
  return found->second;
}

const std::vector<Couriers::Hop>& Couriers::hops(std::size_t owner, std::size_t member) {
  static const std::vector<Hop> kNone;
  if (owned_[owner].empty() || worked_on_[member].empty()) return kNone;
  return relayed(owner, member) ? between(owner, member).hops : kNone;
}

bool Couriers::relayed(std::size_t owner, std::size_t member) const {
  return problem_.relays() && host_of(owner) != host_of(member);
}

bool Couriers::stands_for_others(std::size_t owner, std::size_t member) {
  const std::vector<Hop>& all = hops(owner, member);
  return std::any_of(all.begin(), all.end(), [&](const Hop& h) { return h.courier == member; });
}

Couriers::Host& Couriers::between(std::size_t owner, std::size_t member) {
  const int where = host_of(member);
  const auto [found, fresh] = found_.try_emplace({owner, where});
  Host& host = found->second;
  if (!fresh) return host;
  for (const std::size_t one : members_.at(where)) {
    host.straight[one] = intersect(owned_[owner], worked_on_[one]);
    if (!host.straight[one].empty()) host.members.push_back(one);
  }
  share(owner, host);
  return host;
}

void Couriers::share(std::size_t owner, Host& host) const {
  if (host.members.size() < 2) return;
  // Blocks are rectangles: what has other rows is not the same.
  const Ranges rows = host.straight.at(host.members.front()).rows;
  for (const std::size_t one : host.members) {
    if (host.straight.at(one).rows != rows) return;
  }
  std::map<std::vector<std::size_t>, Ranges> heads_of;  // by the members that have them
  for (const Range heads : owned_[owner].heads) {
    for (Index head = heads.begin; head < heads.end; ++head) {
      std::vector<std::size_t> who;
      for (const std::size_t one : host.members) {
        if (place_of(host.straight.at(one).heads, head)) who.push_back(one);
      }
      if (who.size() > 1) append(heads_of[who], {head, head + 1});
    }
  }
  const auto& neighbours = members_.at(host_of(owner));
  auto turn = static_cast<std::size_t>(std::find(neighbours.begin(), neighbours.end(), owner) -
                                       neighbours.begin());
  for (const auto& [who, heads] : heads_of) {
    const std::size_t courier = who[turn++ % who.size()];
    for (const std::size_t one : who) {
      if (one == courier) continue;
      Block& block = host.straight.at(one);
      host.hops.push_back({courier, one, {block.kind, heads, rows}});
      block.heads = without(block.heads, heads);
    }
  }
}

}  // namespace dattn
