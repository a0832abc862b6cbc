#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "kernels/dropped.hpp"
#include "parallel/block.hpp"
#include "parallel/hosts.hpp"
#include "parallel/kernel_work.hpp"
#include "parallel/known_counts.hpp"
#include "parallel/mesh.hpp"
#include "parallel/partition.hpp"
#include "parallel/placement.hpp"

namespace dattn {

class RingRows;
class Schedule;
struct RingMembers;

/// How sums travel from rank to rank: in the type that they are added up in, or rounded to
/// bfloat16, where m and l of a Partial stay float32. Either way they are added up, and
/// all-reduced, as before.
enum class Wire { exact, bf16 };

inline const char* name_of(Wire wire) { return wire == Wire::bf16 ? "bf16" : "exact"; }

/// What stands for the dropped keys of a head (kernels/dropped.hpp), which no query sees: nothing;
/// one pseudo-key, the mean of all of them and of their values; or one for each rank, the mean of
/// those that the rank owns. Every query of the head sees pseudo-keys, each weighted by the number
/// of keys that it stands for:
///   O = (N exp(q.kc) vc + sum exp(q.k) v) / (N exp(q.kc) + sum exp(q.k)),
/// where the sums are over the keys that the mask allows. A query that sees no key sees pseudo-keys
/// alone. The means take all that is dropped, also what a mask hides because it is another
/// document's. Source: RazorAttention (Tang et al. 2024), whose formula `head` is.
enum class Compensate { off, head, rank };

inline const char* name_of(Compensate how) {
  return how == Compensate::head ? "head" : how == Compensate::rank ? "rank" : "off";
}

/// One attention computation and the ranks it is split over: all that a Strategy may look at.
class Problem {
 public:
  /// @pre complaint(shape) is empty; `partition` is one of partition_kinds(); sums of f8 travel
  /// exactly; `speeds` are of as many ranks, or equal
  Problem(const Shape& shape, MaskPtr mask, Mesh mesh, std::string_view partition,
          Type type = Type::f4, Wire wire = Wire::exact, Speeds speeds = {});

  /// The same problem on another mesh of as many ranks; who owns what stays.
  Problem on(Mesh mesh) const;
  /// The same problem with keeps() as given.
  Problem keeping(bool keeps) const;
  /// The same problem with cached() as given.
  Problem caching(bool cached) const;
  /// The same problem with its keys dealt in turn, by these speeds of ranks.
  Problem with_keys_by(const Speeds& speeds) const;
  /// The same problem with values_in_keys().
  Problem with_values_in_keys() const;
  /// The same problem of as many queries as keys, whose tokens are dealt so.
  Problem dealt(const Partition& tokens) const;
  /// The same problem with prefetch() as given. @pre it is positive
  Problem prefetching(int stages) const;
  /// The same problem with compensate() as given. There is no backward pass of what compensates.
  Problem compensating(Compensate how) const;
  /// The same problem with its ranks on these hosts. @pre one host, or as many ranks
  Problem across(Hosts hosts) const;
  /// The same problem with relays() as given, if there are several hosts.
  Problem relaying(bool relays) const;

  const Shape& shape() const { return shape_; }
  const Mask& mask() const { return *mask_; }
  const MaskPtr& mask_ptr() const { return mask_; }
  const Mesh& mesh() const { return mesh_; }
  int ranks() const { return mesh_.ranks(); }
  Type type() const { return type_; }
  Wire wire() const { return wire_; }
  /// Whether the backward pass starts with what the forward pass redistributed and has kept
  /// (Program::kept), rather than have it sent again.
  bool keeps() const { return keeps_; }
  /// Whether K and V lie wherever Programs start with them: a KV cache, which is written as these
  /// say. Else a rank starts with what it owns. Rows of queries are then in the order of positions.
  bool cached() const { return cached_; }
  /// Whether V lies in K, or is made of it where K is read: an Attend names the slot of K for both,
  /// and the V that Programs start with is empty.
  bool values_in_keys() const { return values_in_keys_; }
  /// How many stages before it is computed the inputs of a stage may arrive: so many have slots
  /// beside the one that is computed.
  int prefetch() const { return prefetch_; }
  Compensate compensate() const { return compensate_; }
  /// How fast ranks compute: what `balanced` deals rows by, what heads are placed by, and what
  /// even_schedule() evens out.
  const Speeds& speeds() const { return speeds_; }
  /// Which rank is on which host; one, if nobody has said.
  const Hosts& hosts() const { return hosts_; }
  /// Whether what several ranks of a host fetch of one elsewhere goes there once, and on from rank
  /// to rank: by default where there are several hosts.
  bool relays() const { return relays_ && hosts_.count() > 1; }
  const std::string& partition() const { return partition_; }
  /// Who owns which rows of Q and O, and which of K and V. The same partition where there are as
  /// many queries as keys.
  const Partition& queries() const { return queries_; }
  const Partition& keys() const { return keys_; }

  /// Key positions that any query of `rank` sees with any of the query heads that are served by
  /// the head group `group` of head_groups(). Found once for all ranks.
  const Ranges& keys_needed(int rank, std::size_t group) const;

  /// Query positions that see any key of `rank`, likewise.
  const Ranges& queries_needed(int rank, std::size_t group) const;

  /// The ranks, `owner` too, whose keys_needed() has any of the keys of `owner`; and those whose
  /// queries_needed() has any of its queries. Ascending; found once for all ranks.
  const std::vector<int>& key_readers(int owner, std::size_t group) const;
  const std::vector<int>& query_readers(int owner, std::size_t group) const;
  /// How many places before `reader`, around the ring of all ranks, those are whose keys (queries)
  /// it needs, of any group; itself, 0, always. Ascending; found with the readers.
  const std::vector<int>& key_distances(int reader) const;
  const std::vector<int>& query_distances(int reader) const;

  /// What of the rows of each member of such a ring is needed how far around it. Found once for all
  /// ranks.
  const RingRows& ring_rows(const RingMembers& ring) const;

  /// The dropped keys of each head that has any, before the first query. Found once for all ranks,
  /// whether they are compensated for or not.
  const std::vector<Dropped>& dropped() const;
  /// How many of those of each entry `rank` owns.
  const std::vector<Index>& dropped_of(int rank) const;

  /// The key rows that some of the query rows `rows` see with this head; or, of key rows, the query
  /// rows that see some of them. Kept for the rehearsals to come, which ask the same of other
  /// programs, as far as there is room.
  std::shared_ptr<const Ranges> partners(bool of_queries, Index head, Range rows) const;

  /// What rehearsals count between rows of queries and of keys, of one head. Kept likewise, of few
  /// ranks.
  struct Counts {
    KnownCounts<Index> pairs;  ///< that are allowed
    KnownCounts<Index> rows;   ///< of queries that see a key
    KnownCounts<Extra> extra;  ///< extra_pairs()
  };
  Counts& counts() const;

  /// Bytes that all ranks together send in a backward pass where each fetches just what it needs of
  /// the others: keys_needed() and values, their gradients going back; or queries_needed(), dO and
  /// Stats, dQ going back. Found once for all ranks.
  struct Fetched {
    Index keys = 0;
    Index queries = 0;
  };
  Fetched backward_fetched() const;

  /// Who computes which pairs where work is evened out between ranks; even_schedule(), found once
  /// for all ranks and each pass.
  const Schedule& schedule(Pass pass) const;

  /// The query heads of each member of a group that splits heads among `members` ranks, which are
  /// equally fast; place_heads(), found once for all ranks.
  const Placement& placement(int members) const;
  /// The same of the ranks `group`, which lie along one axis of the mesh. All ranks at one place of
  /// that axis have the same heads, so what counts is how fast they are together.
  const Placement& placement(const std::vector<int>& group) const;

  /// Heads that all ranks share and heads that one rank each computes; split_heads(), likewise.
  const HeadSplit& head_split() const;

  /// Runs of neighbouring query heads, each as small as K and V can be cut and joined to the next
  /// where both see the same pairs: what a rank fetches is decided per group.
  const std::vector<Range>& head_groups() const { return head_groups_; }

  /// Whether every head of this group of head_groups() sees fewer pairs than it would under a
  /// causal mask. Found once for all ranks.
  bool is_sparse(std::size_t group) const;

 private:
  struct Found;

  void find_dropped() const;

  struct Readers;
  /// Of ranks whose `needed` has any of what others own.
  template <class Needed>
  Readers readers_of(const Partition& tokens, const Needed& needed) const;
  const Readers& key_readers() const;
  const Readers& query_readers() const;

  /// For each rank and head group the union of what `see(rank, head)` finds for its heads.
  template <class See>
  std::vector<std::vector<Ranges>> by_rank_and_group(const See& see) const;

  const Placement& placement(int members, const std::vector<Index>& speeds) const;

  Shape shape_;
  MaskPtr mask_;
  Mesh mesh_;
  Type type_;
  Wire wire_;
  bool keeps_ = false;
  bool cached_ = false;
  bool values_in_keys_ = false;
  int prefetch_ = 1;
  Compensate compensate_ = Compensate::off;
  Hosts hosts_;
  bool relays_ = true;
  Speeds speeds_;
  std::string partition_;
  Partition queries_;
  Partition keys_;
  std::vector<Range> head_groups_;
  std::shared_ptr<Found> found_;  ///< what all ranks ask for; shared by copies
};

}  // namespace dattn
