// LightSeq / DistFlashAttn (Li et al. 2023): keys and values go straight from their owners to those
// who need them, one step ahead, and ranks that a causal mask leaves idle attend to their own keys
// for the queries of others, whose owners merge the Partials that come back. Backward, gradients go
// straight home to whoever owns what they are of. Its published schedule
// leaves pairs out where the ranks are odd in number and half a step idle where they are even;
// parallel/schedule does neither, and takes any mask and partition.
#include "parallel/strategies/lightseq.hpp"

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <set>
#include <tuple>

#include "parallel/moves.hpp"
#include "parallel/schedule.hpp"

namespace dattn {
namespace {

/// Slots by Kind.
class Slots {
 public:
  SlotId& operator[](Kind kind) { return slots_[static_cast<std::size_t>(kind)]; }

 private:
  std::array<SlotId, std::size(kKinds)> slots_{};
};

/// The queries of a piece, or its keys.
struct Half {
  Side side;
  int owner;
  /// The rank computes with its own slots of these, and adds to its own sums.
  bool direct;
  Range heads;
  Ranges rows;
};

std::array<Half, 2> halves(const Problem& problem, const Piece& piece, Pass pass) {
  const Range all{0, problem.shape().query_heads};
  const bool whole_rows = piece.rows == problem.queries().rows(piece.queries);
  const bool own_queries = piece.at == piece.queries && whole_rows;
  // Either the queries or the keys name the heads: a rank's own slots hold all of them.
  const bool own_keys = piece.at == piece.keys && (!own_queries || piece.heads == all);
  return {Half{query_side(pass), piece.queries, own_queries, piece.heads, {piece.rows}},
          Half{key_side(pass), piece.keys, own_keys, piece.heads,
               own_keys ? Ranges{} : keys_of(problem, piece)}};
}

/// One rank's part in a Schedule. Both ends of a message post it at the last boundary between two
/// of their own pieces that is not past the message's time, in the order of those times. So what a
/// rank waits for was posted, by the schedule's clock, before it waits, and nothing deadlocks.
class Part {
 public:
  Part(const Schedule& schedule, Pass pass, Writer& me, const Slots& own)
      : me_(me),
        problem_(me.problem()),
        schedule_(schedule),
        pass_(pass),
        own_(own),
        homes_(static_cast<std::size_t>(problem_.prefetch()) + 1) {}

  void write() {
    const auto mine = schedule_.at(me_.rank());
    const std::vector<Message> messages = messages_in_order();
    send_early(messages);
    auto next = messages.begin();
    for (std::size_t i = 0; i < mine.size(); ++i) {
      if (i > 0) join_results(mine[i - 1].begin);  // one piece after they were due
      while (next != messages.end() && next->time < mine[i].end()) post(*next++);
      compute(mine[i]);
    }
    while (next != messages.end()) post(*next++);
    while (!due_.empty()) join_result();
  }

 private:
  /// The inputs of a piece, which travel before it is computed, or its sums, which travel after.
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
  std::array<Half, 2> halves(const Piece& p) const { return dattn::halves(problem_, p, pass_); }
  Block block(Kind kind, const Half& half) const {
    return {kind, heads_touched(kind, half.heads, problem_.shape()), half.rows};
  }

  std::vector<Message> messages_in_order() const {
    const auto mine = schedule_.at(me_.rank());
    std::vector<Message> all;
    const auto add = [&](std::size_t number) {
      const Piece& p = schedule_.pieces()[number];
      all.push_back({schedule_.posted(number, problem_.prefetch()), false, number});
      all.push_back({p.end(), true, number});
    };
    const auto first = static_cast<std::size_t>(mine.data() - schedule_.pieces().data());
    for (std::size_t i = 0; i < mine.size(); ++i) add(first + i);
    for (const std::size_t number : schedule_.elsewhere(me_.rank())) add(number);
    std::sort(all.begin(), all.end(),
              [](const Message& a, const Message& b) { return a.key() < b.key(); });
    return all;
  }

  void post(const Message& m) { m.is_result ? post_result(piece(m)) : post_inputs(piece(m)); }

  /// Sends at once what is there from the start, up to the first result for the same peer, since
  /// messages of two ranks meet in order: no peer waits until this rank gets to some piece of its
  /// own. It takes no memory but the receiver's, who says when there is room.
  void send_early(const std::vector<Message>& messages) {
    std::set<int> later;  // peers that have got a result before
    for (const Message& m : messages) {
      const Piece& p = piece(m);
      if (m.is_result) {
        for (const Half& half : halves(p)) {
          if (p.at == me_.rank()) later.insert(half.owner);
        }
      } else if (!later.contains(p.at)) {
        send_inputs(p);
        early_.insert(&p);
      }
    }
  }

  void send_inputs(const Piece& p) {
    for (const Half& half : halves(p)) {
      if (half.direct || half.owner != me_.rank()) continue;
      for (const Kind kind : half.side.inputs) me_.send(own_[kind], block(kind, half), p.at);
    }
  }

  void post_inputs(const Piece& p) {
    if (p.at == me_.rank()) {
      // One piece is computed while the inputs of the next ones arrive.
      auto& homes = homes_[posted_++ % homes_.size()];
      Slots slots = own_;
      for (const Half& half : halves(p)) {
        if (half.direct) continue;
        for (const Kind kind : half.side.inputs) {
          slots[kind] = me_.slot(block(kind, half), home(homes, kind));
          me_.recv(slots[kind], me_.block(slots[kind]), half.owner);
        }
      }
      ready_.push_back(slots);
    }
    if (!early_.contains(&p)) send_inputs(p);
  }

  void compute(const Piece& p) {
    Slots slots = ready_.front();
    ready_.pop_front();
    std::vector<std::pair<SlotId, SlotId>> joined;
    for (const Half& half : halves(p)) {
      if (half.direct) continue;
      for (const Kind kind : half.side.sums) {
        auto& homes = begun_homes_[begun_[kind]++ % 2];
        slots[kind] = me_.fresh(block(kind, half), home(homes, kind));
        if (half.owner == me_.rank()) joined.emplace_back(slots[kind], own_[kind]);
      }
    }
    if (pass_ == Pass::forward) {
      me_.attend(slots[Kind::Q], slots[Kind::K], slots[Kind::V], slots[Kind::O]);
    } else {
      AttendBackward step{};
      for (const auto kinds : {input_kinds(pass_), result_kinds(pass_)}) {
        for (const Kind kind : kinds) operand(step, kind) = slots[kind];
      }
      me_.attend_backward(step);
    }
    for (const auto& [from, into] : joined) join(from, into);
    computed_[&p] = slots;
  }

  void post_result(const Piece& p) {
    for (const Half& half : halves(p)) {
      if (half.owner == p.at) continue;
      for (const Kind kind : half.side.sums) {
        if (p.at == me_.rank()) {
          const SlotId slot = computed_.at(&p)[kind];
          me_.send(slot, me_.block(slot), half.owner);
        } else if (half.owner == me_.rank()) {
          std::vector<int>& homes = free_[kind];
          if (homes.empty()) homes.push_back(me_.home());
          const SlotId slot = me_.slot(block(kind, half), homes.back());
          homes.pop_back();
          me_.recv(slot, me_.block(slot), p.at);
          due_.push_back({slot, p.end()});
        }
      }
    }
  }

  void join_results(Index time) {
    while (!due_.empty() && due_.front().end <= time) join_result();
  }
  void join_result() {
    const SlotId slot = due_.front().slot;
    due_.pop_front();
    const Kind kind = me_.block(slot).kind;
    join(slot, own_[kind]);
    free_[kind].push_back(me_.home_of(slot));
  }

  void join(SlotId from, SlotId into) {
    pass_ == Pass::forward ? me_.merge(from, into) : me_.add(from, into);
  }

  /// The home of this kind, made when first asked for.
  int home(std::map<Kind, int>& homes, Kind kind) {
    const auto found = homes.find(kind);
    return found != homes.end() ? found->second : homes[kind] = me_.home();
  }

  Writer& me_;
  const Problem& problem_;
  const Schedule& schedule_;
  const Pass pass_;
  Slots own_;
  std::vector<std::map<Kind, int>> homes_;  ///< of inputs, for pieces in turn
  std::size_t posted_ = 0;
  std::deque<Slots> ready_;             ///< of the pieces whose inputs are posted
  std::map<Kind, int> begun_homes_[2];  ///< of sums begun here
  std::map<Kind, std::size_t> begun_;
  std::set<const Piece*> early_;  ///< whose inputs were sent at the start
  std::map<const Piece*, Slots> computed_;
  std::map<Kind, std::vector<int>> free_;  ///< homes of sums that others have sent
  std::deque<Result> due_;                 ///< those that are not joined yet
};

Program program(const Problem& problem, int rank) {
  return follow(problem, problem.schedule(Pass::forward), rank, Pass::forward);
}

Program backward(const Problem& problem, int rank) {
  return follow(problem, problem.schedule(Pass::backward), rank, Pass::backward);
}

}  // namespace

Program follow(const Problem& problem, const Schedule& schedule, int rank, Pass pass) {
  Slots own;
  if (pass == Pass::backward) {
    return by_token_backward(problem, rank, [&](Writer& me, const AttendBackward& in) {
      AttendBackward all = in;
      for (const auto kinds : {input_kinds(pass), result_kinds(pass)}) {
        for (const Kind kind : kinds) own[kind] = operand(all, kind);
      }
      Part(schedule, pass, me, own).write();
    });
  }
  return by_token(problem, rank, [&](Writer& me, const Inputs& in, SlotId out) {
    own[Kind::Q] = in.q;
    own[Kind::K] = in.k;
    own[Kind::V] = in.v;
    own[Kind::O] = out;
    Part(schedule, pass, me, own).write();
  });
}

Strategy lightseq_strategy() {
  return {"lightseq",
          "keys go straight to whom they concern; ranks with less to do help those with more",
          "any ranks, any heads, any partition; contiguous is where it differs from gather",
          "ranks",
          program,
          backward,
          refuses_other_than_a_line,
          line_mesh};
}

}  // namespace dattn
