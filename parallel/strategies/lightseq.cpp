// LightSeq / DistFlashAttn (Li et al. 2023): keys and values go straight from their owners to those
// who need them, one step ahead, and ranks that a causal mask leaves idle attend to their own keys
// for the queries of others, whose owners merge the Partials that come back. Its published schedule
// leaves pairs out where the ranks are odd in number and half a step idle where they are even;
// parallel/schedule does neither, and takes any mask and partition.
#include "parallel/strategies/lightseq.hpp"

#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "parallel/moves.hpp"
#include "parallel/schedule.hpp"

namespace dattn {
namespace {

/// What a piece reads besides the input slots of the rank that computes it; the rest is empty.
struct Operands {
  Block q, k, v;
};

/// A piece of whole rows adds to the result of its rank; all others have a Partial of their own.
bool adds_to_result(const Problem& problem, const Piece& piece) {
  return piece.at == piece.queries && piece.rows == problem.queries().rows(piece.queries);
}

Operands operands(const Problem& problem, const Piece& piece) {
  const Shape& shape = problem.shape();
  Operands need;
  const bool whole_rows = adds_to_result(problem, piece);
  if (!whole_rows) need.q = {Kind::Q, piece.heads, {piece.rows}};
  // Either the queries or the keys name the heads: an input slot holds all of them.
  const bool heads_are_named = !whole_rows || piece.heads == Range{0, shape.query_heads};
  if (piece.at != piece.keys || !heads_are_named) {
    const Ranges rows = keys_of(problem, piece);
    need.k = {Kind::K, shape.key_heads_of(piece.heads), rows};
    need.v = {Kind::V, shape.value_heads_of(piece.heads), rows};
  }
  return need;
}

/// One rank's part in a Schedule. Both ends of a message post it at the last boundary between two
/// of their own pieces that is not past the message's time, in the order of those times. So what a
/// rank waits for was posted, by the schedule's clock, before it waits, and nothing deadlocks.
class Part {
 public:
  Part(const Schedule& schedule, Writer& me, const Inputs& in, SlotId out)
      : me_(me), problem_(me.problem()), schedule_(schedule), in_(in), out_(out) {}

  void write() {
    const auto own = schedule_.at(me_.rank());
    const std::vector<Message> messages = messages_in_order();
    auto next = messages.begin();
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (i > 0) merge_results(own[i - 1].begin);  // one piece after they were due
      while (next != messages.end() && next->time < own[i].end()) post(*next++);
      attend(own[i]);
    }
    while (next != messages.end()) post(*next++);
    while (!due_.empty()) merge_result();
  }

 private:
  /// The operands of a piece, which travel before it, or its result.
  struct Message {
    Index time;
    bool is_result;
    std::size_t piece;  ///< number in the schedule
    auto key() const { return std::tie(time, is_result, piece); }
  };
  struct Result {
    SlotId slot;
    Index end;
  };

  const Piece& piece(const Message& m) const { return schedule_.pieces()[m.piece]; }

  std::vector<Message> messages_in_order() const {
    const auto own = schedule_.at(me_.rank());
    std::vector<Message> all;
    const auto add = [&](std::size_t number) {
      const Piece& p = schedule_.pieces()[number];
      all.push_back({p.posted, false, number});
      const bool travels = p.at != p.queries;
      const bool here = p.at == me_.rank() || p.queries == me_.rank();
      if (travels && here) all.push_back({p.end(), true, number});
    };
    const auto first = static_cast<std::size_t>(own.data() - schedule_.pieces().data());
    for (std::size_t i = 0; i < own.size(); ++i) add(first + i);
    for (const std::size_t number : schedule_.elsewhere(me_.rank())) add(number);
    std::sort(all.begin(), all.end(),
              [](const Message& a, const Message& b) { return a.key() < b.key(); });
    return all;
  }

  void post(const Message& m) { m.is_result ? post_result(m) : post_operands(piece(m)); }

  void post_operands(const Piece& p) {
    const Operands need = operands(problem_, p);
    if (p.at == me_.rank()) {
      // Two pieces have operands at a time: one is computed while those of the next arrive.
      std::vector<int>& homes = homes_[posted_++ % 2];
      std::size_t used = 0;
      const auto fetch = [&](const Block& block, SlotId input, int owner) {
        if (block.empty()) return input;
        if (used == homes.size()) homes.push_back(me_.home());
        const SlotId slot = me_.slot(block, homes[used++]);
        me_.recv(slot, block, owner);
        return slot;
      };
      const SlotId q = fetch(need.q, in_.q, p.queries);
      const SlotId k = fetch(need.k, in_.k, p.keys);
      ready_.push_back({q, k, fetch(need.v, in_.v, p.keys)});
    }
    if (p.queries == me_.rank()) me_.send(in_.q, need.q, p.at);
    if (p.keys == me_.rank()) {
      me_.send(in_.k, need.k, p.at);
      me_.send(in_.v, need.v, p.at);
    }
  }

  void post_result(const Message& m) {
    const Piece& p = piece(m);
    if (p.at == me_.rank()) {
      me_.send(helped_.at(&p), me_.block(helped_.at(&p)), p.queries);
      return;
    }
    if (free_.empty()) free_.push_back(me_.home());
    const SlotId slot = me_.slot({Kind::O, p.heads, {p.rows}}, free_.back());
    free_.pop_back();
    me_.recv(slot, me_.block(slot), p.at);
    due_.push_back({slot, p.end()});
  }

  void attend(const Piece& p) {
    const Inputs from = ready_.front();
    ready_.pop_front();
    if (adds_to_result(problem_, p)) {
      me_.attend(from.q, from.k, from.v, out_);
      return;
    }
    if (partials_.size() < 2) partials_.push_back(me_.home());
    const SlotId slot = me_.fresh({Kind::O, p.heads, {p.rows}}, partials_[begun_++ % 2]);
    me_.attend(from.q, from.k, from.v, slot);
    if (p.at == p.queries) {
      me_.merge(slot, out_);
    } else {
      helped_[&p] = slot;
    }
  }

  void merge_results(Index time) {
    while (!due_.empty() && due_.front().end <= time) merge_result();
  }
  void merge_result() {
    const SlotId slot = due_.front().slot;
    due_.pop_front();
    me_.merge(slot, out_);
    free_.push_back(me_.home_of(slot));
  }

  Writer& me_;
  const Problem& problem_;
  const Schedule& schedule_;
  const Inputs in_;
  const SlotId out_;
  std::vector<int> homes_[2];  ///< of operands, for every other piece
  std::size_t posted_ = 0;
  std::deque<Inputs> ready_;   ///< slots of the pieces whose operands are posted
  std::vector<int> partials_;  ///< homes of Partials begun here
  std::size_t begun_ = 0;
  std::map<const Piece*, SlotId> helped_;  ///< Partials begun here for others
  std::vector<int> free_;                  ///< homes of Partials that others have sent
  std::deque<Result> due_;                 ///< those that are not merged yet
};

Program program(const Problem& problem, int rank) {
  return follow(problem, problem.schedule(), rank);
}

}  // namespace

Program follow(const Problem& problem, const Schedule& schedule, int rank) {
  return by_token(problem, rank, [&](Writer& me, const Inputs& in, SlotId out) {
    Part(schedule, me, in, out).write();
  });
}

Strategy lightseq_strategy() {
  return {"lightseq",
          "keys go straight to whom they concern; ranks with less to do help those with more",
          "any ranks, any heads, any partition; contiguous is where it differs from gather",
          "ranks",
          program,
          refuses_other_than_a_line,
          line_mesh};
}

}  // namespace dattn
