#include "parallel/problem.hpp"

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>

#include "kernels/area.hpp"
#include "kernels/check.hpp"
#include "parallel/plan.hpp"
#include "parallel/ring_rows.hpp"
#include "parallel/schedule.hpp"

namespace dattn {
namespace {

const PartitionKind& kind_of(std::string_view name) {
  const auto kinds = partition_kinds();
  const auto found = std::find_if(kinds.begin(), kinds.end(),
                                  [&](const PartitionKind& kind) { return kind.name == name; });
  CHECK(found != kinds.end(), name);
  return *found;
}

Partition deal_queries(std::string_view partition, const Shape& shape, const Mask& mask, int ranks,
                       const Speeds& speeds) {
  return Partition(kind_of(partition).deal(shape.queries, ranks, shape, mask, speeds),
                   shape.first_query());
}

Partition deal_keys(std::string_view partition, const Shape& shape, const Mask& mask, int ranks,
                    const Speeds& speeds) {
  // Area belongs to queries. In self-attention keys stay with the query of their token; other keys
  // have no such place, and pieces as long as ranks are fast are as good as any.
  const PartitionKind& kind = kind_of(partition);
  const bool follow = shape.queries == shape.keys || !kind.by_area;
  return Partition(follow ? kind.deal(shape.keys, ranks, shape, mask, speeds)
                          : pieces_by_speed(shape.keys, ranks, speeds));
}

std::vector<Range> group_heads(const Shape& shape, const Mask& mask) {
  // Heads that share a key head or a value head cannot be cut apart without sending it twice.
  const Index unit =
      std::lcm(shape.query_heads / shape.key_heads, shape.query_heads / shape.value_heads);
  std::vector<Range> groups;
  std::vector<Index> last;
  for (Index h = 0; h < shape.query_heads; h += unit) {
    std::vector<Index> seen;
    for (Index i = h; i < std::min(h + unit, shape.query_heads); ++i) {
      seen.push_back(mask.variant(i));
    }
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    if (groups.empty() || seen != last) {
      groups.push_back({h, h});
      last = seen;
    }
    groups.back().end = std::min(h + unit, shape.query_heads);
  }
  return groups;
}

}  // namespace

struct Problem::Readers {
  std::vector<std::vector<std::vector<int>>> of;  ///< [owner][group]
  std::vector<std::vector<int>> distances;        ///< [reader]
};

struct Problem::Found {
  explicit Found(int ranks)
      : counts{KnownCounts<Index>(room(ranks)), KnownCounts<Index>(room(ranks)),
               KnownCounts<Extra>(room(ranks))} {}
  /// The blocks of many ranks are too many to keep.
  static std::size_t room(int ranks) { return ranks > 64 ? 0 : std::size_t{1} << 20; }  // 16 MiB

  std::once_flag needs_once;
  std::vector<std::vector<Ranges>> needs;  ///< [rank][group] positions
  std::once_flag seers_once;
  std::vector<std::vector<Ranges>> seers;  ///< likewise, of queries
  std::once_flag key_readers_once;
  Readers key_readers;
  std::once_flag query_readers_once;
  Readers query_readers;
  std::mutex rings_mutex;
  std::map<RingMembers, const RingRows> rings;
  std::mutex partners_mutex;
  std::map<std::tuple<bool, Index, Range>, std::shared_ptr<const Ranges>> partners;  ///< by variant
  std::size_t partner_ranges = 0;
  Counts counts;
  std::once_flag dropped_once;
  std::vector<Dropped> dropped;
  std::vector<std::vector<Index>> dropped_of;  ///< [rank][entry of dropped]
  std::once_flag sparse_once;
  std::vector<bool> sparse;  ///< by group
  std::once_flag fetched_once;
  Fetched fetched;
  std::once_flag schedule_once[2];
  std::optional<const Schedule> schedule[2];  ///< of each pass
  std::once_flag split_once;
  HeadSplit split;
  std::mutex placements_mutex;
  /// By speeds of members or, if these are equal, their number.
  std::map<std::vector<Index>, const Placement> placements;
};

Problem::Problem(const Shape& shape, MaskPtr mask, Mesh mesh, std::string_view partition, Type type,
                 Wire wire, Speeds speeds)
    : shape_(shape),
      mask_(std::move(mask)),
      mesh_(std::move(mesh)),
      type_(type),
      wire_(wire),
      speeds_(std::move(speeds)),
      partition_(partition),
      queries_(deal_queries(partition, shape_, *mask_, mesh_.ranks(), speeds_)),
      keys_(deal_keys(partition, shape_, *mask_, mesh_.ranks(), speeds_)),
      head_groups_(group_heads(shape_, *mask_)),
      found_(std::make_shared<Found>(mesh_.ranks())) {
  CHECK(type != Type::f8 || wire == Wire::exact, name_of(type), name_of(wire));
  CHECK(speeds_.equal() || speeds_.size() == ranks(), speeds_.text(), ranks());
}

Problem Problem::on(Mesh mesh) const {
  CHECK(mesh.ranks() == ranks(), mesh.text(), ranks());
  Problem other = *this;
  other.mesh_ = std::move(mesh);
  return other;
}

Problem Problem::keeping(bool keeps) const {
  Problem other = *this;
  other.keeps_ = keeps;
  return other;
}

Problem Problem::caching(bool cached) const {
  Problem other = *this;
  other.cached_ = cached;
  other.queries_ =
      deal_queries(cached ? "contiguous" : partition_, shape_, *mask_, mesh_.ranks(), speeds_);
  return other;
}

Problem Problem::with_keys_by(const Speeds& speeds) const {
  Problem other = *this;
  other.keys_ = Partition(turns_by_speed(shape_.keys, ranks(), speeds));
  other.found_ = std::make_shared<Found>(other.ranks());
  return other;
}

Problem Problem::with_values_in_keys() const {
  CHECK(shape_.key_heads == shape_.value_heads, shape_.key_heads, shape_.value_heads);
  Problem other = *this;
  other.values_in_keys_ = true;
  return other;
}

Problem Problem::dealt(const Partition& tokens) const {
  CHECK(
      shape_.queries == shape_.keys && tokens.tokens() == shape_.keys && tokens.ranks() == ranks(),
      shape_.queries, shape_.keys, tokens.tokens(), tokens.ranks());
  Problem other = *this;
  other.queries_ = tokens;
  other.keys_ = tokens;
  other.found_ = std::make_shared<Found>(other.ranks());
  return other;
}

Problem Problem::prefetching(int stages) const {
  CHECK(stages > 0, stages);
  Problem other = *this;
  other.prefetch_ = stages;
  return other;
}

Problem Problem::compensating(Compensate how) const {
  Problem other = *this;
  other.compensate_ = how;
  return other;
}

Problem Problem::across(Hosts hosts) const {
  CHECK(hosts.count() == 1 || hosts.size() == ranks(), hosts.text(), ranks());
  Problem other = *this;
  other.hosts_ = std::move(hosts);
  return other;
}

Problem Problem::relaying(bool relays) const {
  Problem other = *this;
  other.relays_ = relays;
  return other;
}

template <class See>
std::vector<std::vector<Ranges>> Problem::by_rank_and_group(const See& see) const {
  std::vector<std::vector<Ranges>> found(static_cast<std::size_t>(ranks()));
  for (int r = 0; r < ranks(); ++r) {
    for (const Range heads : head_groups_) {
      std::vector<Range> all;
      for (const auto& [head, count] : variants(*mask_, heads)) {
        const Ranges seen = see(r, head);
        all.insert(all.end(), seen.begin(), seen.end());
      }
      found[static_cast<std::size_t>(r)].push_back(union_of(std::move(all)));
    }
  }
  return found;
}

const Ranges& Problem::keys_needed(int rank, std::size_t group) const {
  std::call_once(found_->needs_once, [&] {
    found_->needs = by_rank_and_group([&](int r, Index head) {
      return keys_seen(*mask_, head, queries_.positions({queries_.rows(r)}), shape_.keys);
    });
  });
  return found_->needs[static_cast<std::size_t>(rank)][group];
}

const Ranges& Problem::queries_needed(int rank, std::size_t group) const {
  std::call_once(found_->seers_once, [&] {
    const Range queries{shape_.first_query(), shape_.first_query() + shape_.queries};
    found_->seers = by_rank_and_group([&](int r, Index head) {
      return queries_seeing(*mask_, head, queries, keys_.positions({keys_.rows(r)}));
    });
  });
  return found_->seers[static_cast<std::size_t>(rank)][group];
}

template <class Needed>
Problem::Readers Problem::readers_of(const Partition& tokens, const Needed& needed) const {
  Readers found;
  found.of.resize(static_cast<std::size_t>(ranks()),
                  std::vector<std::vector<int>>(head_groups_.size()));
  for (int reader = 0; reader < ranks(); ++reader) {
    std::vector<bool> near(static_cast<std::size_t>(ranks()), false);
    near[0] = true;
    for (std::size_t g = 0; g < head_groups_.size(); ++g) {
      const Ranges& some = needed(reader, g);
      if (some.empty()) continue;
      for (int owner = 0; owner < ranks(); ++owner) {
        if (!tokens.has_at(owner, some)) continue;
        found.of[static_cast<std::size_t>(owner)][g].push_back(reader);
        near[static_cast<std::size_t>((reader - owner + ranks()) % ranks())] = true;
      }
    }
    std::vector<int>& distances = found.distances.emplace_back();
    for (int d = 0; d < ranks(); ++d) {
      if (near[static_cast<std::size_t>(d)]) distances.push_back(d);
    }
  }
  return found;
}

const Problem::Readers& Problem::key_readers() const {
  std::call_once(found_->key_readers_once, [&] {
    found_->key_readers =
        readers_of(keys_, [&](int r, std::size_t g) -> const Ranges& { return keys_needed(r, g); });
  });
  return found_->key_readers;
}

const Problem::Readers& Problem::query_readers() const {
  std::call_once(found_->query_readers_once, [&] {
    found_->query_readers = readers_of(
        queries_, [&](int r, std::size_t g) -> const Ranges& { return queries_needed(r, g); });
  });
  return found_->query_readers;
}

const std::vector<int>& Problem::key_readers(int owner, std::size_t group) const {
  return key_readers().of[static_cast<std::size_t>(owner)][group];
}
const std::vector<int>& Problem::query_readers(int owner, std::size_t group) const {
  return query_readers().of[static_cast<std::size_t>(owner)][group];
}
const std::vector<int>& Problem::key_distances(int reader) const {
  return key_readers().distances[static_cast<std::size_t>(reader)];
}
const std::vector<int>& Problem::query_distances(int reader) const {
  return query_readers().distances[static_cast<std::size_t>(reader)];
}

const RingRows& Problem::ring_rows(const RingMembers& ring) const {
  const std::lock_guard lock(found_->rings_mutex);
  const auto found = found_->rings.find(ring);
  if (found != found_->rings.end()) return found->second;
  return found_->rings.emplace(ring, RingRows(*this, ring)).first->second;
}

std::shared_ptr<const Ranges> Problem::partners(bool of_queries, Index head, Range rows) const {
  constexpr std::size_t kMostRanges = std::size_t{4} << 20;  // 64 MiB
  const std::tuple key(of_queries, mask_->variant(head), rows);
  {
    const std::lock_guard lock(found_->partners_mutex);
    const auto known = found_->partners.find(key);
    if (known != found_->partners.end()) return known->second;
  }
  const Range queries{shape_.first_query(), shape_.first_query() + shape_.queries};
  const Runs at = (of_queries ? queries_ : keys_).positions({rows});
  const Ranges positions = of_queries ? keys_seen(*mask_, head, at, shape_.keys)
                                      : queries_seeing(*mask_, head, queries, at);
  auto found = std::make_shared<Ranges>();
  for (int r = 0; r < ranks(); ++r) {
    for (const Range some : (of_queries ? keys_ : queries_).rows_at(r, positions)) {
      append(*found, some);
    }
  }
  const std::lock_guard lock(found_->partners_mutex);
  if (found_->partner_ranges + found->size() <= kMostRanges &&
      found_->partners.try_emplace(key, found).second) {
    found_->partner_ranges += found->size();
  }
  return found;
}

Problem::Counts& Problem::counts() const { return found_->counts; }

void Problem::find_dropped() const {
  std::call_once(found_->dropped_once, [&] {
    Found& found = *found_;
    found.dropped = dropped_keys(*mask_, shape_, {shape_.first_query(), shape_.queries, 1});
    found.dropped_of.resize(static_cast<std::size_t>(ranks()));
    for (int r = 0; r < ranks(); ++r) {
      std::vector<Index>& counts = found.dropped_of[static_cast<std::size_t>(r)];
      for (std::size_t i = 0; i < found.dropped.size(); ++i) {
        // Heads under one mask drop the same keys.
        const bool same = i > 0 && found.dropped[i].keys == found.dropped[i - 1].keys;
        counts.push_back(same ? counts.back() : size(keys_.rows_at(r, found.dropped[i].keys)));
      }
    }
  });
}

const std::vector<Dropped>& Problem::dropped() const {
  find_dropped();
  return found_->dropped;
}

const std::vector<Index>& Problem::dropped_of(int rank) const {
  find_dropped();
  return found_->dropped_of[static_cast<std::size_t>(rank)];
}

bool Problem::is_sparse(std::size_t group) const {
  std::call_once(found_->sparse_once, [&] {
    const Runs queries{{shape_.first_query(), shape_.queries, 1}};
    const Runs keys{{0, shape_.keys, 1}};
    // Queries before the first key see nothing.
    const Index rows = std::min(shape_.queries, shape_.keys);
    const Index causal = rows * (shape_.keys - rows) + rows * (rows + 1) / 2;
    std::map<Index, bool> known;  // by variant
    for (const Range heads : head_groups_) {
      const auto all = variants(*mask_, heads);
      found_->sparse.push_back(std::all_of(all.begin(), all.end(), [&](const auto& variant) {
        const Index head = variant.first;
        const auto [at, is_new] = known.try_emplace(mask_->variant(head));
        if (is_new) at->second = area(*mask_, head, queries, keys) < causal;
        return at->second;
      }));
    }
  });
  return found_->sparse[group];
}

Problem::Fetched Problem::backward_fetched() const {
  std::call_once(found_->fetched_once, [&] {
    const auto bytes_of_row = [&](const Side& side, Range heads) {
      Index bytes = 0;
      for (const auto kinds : {side.inputs, side.sums}) {
        for (const Kind kind : kinds) {
          bytes += wire_bytes({kind, heads_touched(kind, heads, shape_), {{0, 1}}}, *this);
        }
      }
      return bytes;
    };
    for (std::size_t g = 0; g < head_groups_.size(); ++g) {
      Fetched rows;
      for (int owner = 0; owner < ranks(); ++owner) {
        for (const int reader : key_readers(owner, g)) {
          if (reader != owner) rows.keys += size(keys_.rows_at(owner, keys_needed(reader, g)));
        }
        for (const int reader : query_readers(owner, g)) {
          if (reader == owner) continue;
          rows.queries += size(queries_.rows_at(owner, queries_needed(reader, g)));
        }
      }
      Fetched& sum = found_->fetched;
      sum.keys += rows.keys * bytes_of_row(key_side(Pass::backward), head_groups_[g]);
      sum.queries += rows.queries * bytes_of_row(query_side(Pass::backward), head_groups_[g]);
    }
  });
  return found_->fetched;
}

const Schedule& Problem::schedule(Pass pass) const {
  const auto p = static_cast<std::size_t>(pass);
  std::call_once(found_->schedule_once[p],
                 [&] { found_->schedule[p].emplace(even_schedule(*this, pass)); });
  return *found_->schedule[p];
}

const HeadSplit& Problem::head_split() const {
  std::call_once(found_->split_once, [&] {
    std::vector<int> group(static_cast<std::size_t>(ranks()));
    std::iota(group.begin(), group.end(), 0);
    std::vector<Index> speeds;
    for (const int rank : hosts_.side_by_side(group)) speeds.push_back(speeds_.parts(rank));
    found_->split = split_heads(shape_, *mask_, ranks(), speeds);
  });
  return found_->split;
}

const Placement& Problem::placement(int members) const { return placement(members, {}); }

const Placement& Problem::placement(const std::vector<int>& group) const {
  const auto members = static_cast<int>(group.size());
  if (members < 2 || speeds_.equal()) return placement(members, {});
  int axis = 0;
  while (mesh_.group(group.front(), axis) != group) ++axis;
  std::vector<Index> speeds(group.size(), 0);
  for (int r = 0; r < ranks(); ++r) {
    speeds[static_cast<std::size_t>(mesh_.coordinate(r, axis))] += speeds_.parts(r);
  }
  return placement(members, speeds);
}

const Placement& Problem::placement(int members, const std::vector<Index>& speeds) const {
  const std::vector<Index> key = speeds.empty() ? std::vector<Index>{members} : speeds;
  const std::lock_guard lock(found_->placements_mutex);
  const auto found = found_->placements.find(key);
  if (found != found_->placements.end()) return found->second;
  return found_->placements.emplace(key, place_heads(shape_, *mask_, members, speeds))
      .first->second;
}

}  // namespace dattn
