// LightSeq / DistFlashAttn (Li et al. 2023): keys and values go straight from their owners to those
// who need them, one step ahead, and ranks that a causal mask leaves idle attend to their own keys
// for the queries of others, whose owners merge the Partials that come back. Backward, gradients go
// straight home to whoever owns what they are of. Its published schedule
// leaves pairs out where the ranks are odd in number and half a step idle where they are even;
// parallel/schedule does neither, and takes any mask and partition. What pieces on one host share
// of a rank elsewhere goes there once (parcels).
#include "parallel/strategies/lightseq.hpp"

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <set>
#include <tuple>

#include "parallel/moves.hpp"
#include "parallel/schedule.hpp"
#include "parallel/strategies/parcels.hpp"

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
        parcels_(problem_, schedule, pass, me.rank()),
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
  /// The inputs of a piece, which travel before it is computed, or its sums, which travel after;
  /// and those of a parcel, between its owner and its courier, before the first of them and after
  /// the last.
  struct Message {
    Index time;
    enum What { kFetch, kInputs, kResult, kAdded } what;
    std::size_t piece = 0;           ///< number in the schedule
    const Parcel* parcel = nullptr;  ///< or this
    bool operator<(const Message& other) const {
      if (std::tie(time, what) != std::tie(other.time, other.what)) {
        return std::tie(time, what) < std::tie(other.time, other.what);
      }
      return parcel != nullptr ? parcel->key() < other.parcel->key() : piece < other.piece;
    }
  };
  struct Result {
    SlotId slot;
    Index end;
    const Parcel* parcel;  ///< whose sum it joins; none: the rank's own
  };

  const Piece& piece(const Message& m) const { return schedule_.pieces()[m.piece]; }
  std::size_t number(const Piece& p) const {
    return static_cast<std::size_t>(&p - schedule_.pieces().data());
  }
  std::array<Half, 2> halves(const Piece& p) const { return dattn::halves(problem_, p, pass_); }
  Side side(int half) const { return half == 0 ? query_side(pass_) : key_side(pass_); }
  Block block(Kind kind, const Half& half) const { return block(kind, half.heads, half.rows); }
  Block block(Kind kind, Range heads, const Ranges& rows) const {
    return {kind, heads_touched(kind, heads, problem_.shape()), rows};
  }
  Block block(Kind kind, const Parcel& parcel) const {
    return block(kind, parcel.heads, parcel.rows);
  }
  /// With whom whoever computes a piece exchanges this cut of a half of it.
  static int partner(const Cut& cut, const Half& half) {
    return cut.parcel != nullptr ? cut.parcel->courier : half.owner;
  }

  std::vector<Message> messages_in_order() const {
    const auto mine = schedule_.at(me_.rank());
    std::vector<Message> all;
    const auto& elsewhere = schedule_.elsewhere(me_.rank());
    std::set<std::size_t> numbers(elsewhere.begin(), elsewhere.end());
    for (const Piece& p : mine) numbers.insert(number(p));
    for (const Parcel& parcel : parcels_.all()) {
      if (parcel.courier == me_.rank()) {
        numbers.insert(parcel.readers.begin(), parcel.readers.end());
      } else if (parcel.owner != me_.rank()) {
        continue;
      }
      if (!side(parcel.half).inputs.empty()) {
        all.push_back({parcel.fetched, Message::kFetch, 0, &parcel});
      }
      if (!side(parcel.half).sums.empty()) {
        all.push_back({parcel.added, Message::kAdded, 0, &parcel});
      }
    }
    for (const std::size_t n : numbers) {
      all.push_back({schedule_.posted(n, problem_.prefetch()), Message::kInputs, n});
      all.push_back({schedule_.pieces()[n].end(), Message::kResult, n});
    }
    std::sort(all.begin(), all.end());
    return all;
  }

  void post(const Message& m) {
    switch (m.what) {
      case Message::kFetch:
        return post_fetch(*m.parcel);
      case Message::kInputs:
        return post_inputs(piece(m));
      case Message::kResult:
        return post_result(piece(m));
      case Message::kAdded:
        return post_added(*m.parcel);
    }
  }

  /// Sends at once what is there from the start, up to the first message for the same peer that is
  /// not, since messages of two ranks meet in order: no peer waits until this rank gets to some
  /// piece of its own. It takes no memory but the receiver's, who says when there is room.
  void send_early(const std::vector<Message>& messages) {
    std::set<int> later;  // peers that have got anything else before
    for (const Message& m : messages) {
      if (m.parcel != nullptr) {
        if (m.parcel->owner != me_.rank()) {
          if (m.what == Message::kAdded) later.insert(m.parcel->owner);
        } else if (m.what == Message::kFetch && !later.contains(m.parcel->courier)) {
          send_parcel(*m.parcel);
          early_parcels_.insert(m.parcel);
        }
        continue;
      }
      const Piece& p = piece(m);
      const auto both = halves(p);
      for (const int h : {0, 1}) {
        const Half& half = both[static_cast<std::size_t>(h)];
        const std::vector<Cut> cuts = parcels_.cuts(m.piece, h);
        const bool passes_on = std::any_of(cuts.begin(), cuts.end(), [&](const Cut& cut) {
          return cut.parcel != nullptr && cut.parcel->courier == me_.rank();
        });
        if (m.what == Message::kResult) {
          if (p.at != me_.rank()) continue;
          for (const Cut& cut : cuts) later.insert(partner(cut, half));
        } else if (passes_on) {
          later.insert(p.at);
        } else if (!later.contains(p.at)) {
          send_inputs(p, h);
          early_.insert({m.piece, h});
        }
      }
    }
  }

  void send_parcel(const Parcel& parcel) {
    for (const Kind kind : side(parcel.half).inputs) {
      me_.send(own_[kind], block(kind, parcel), parcel.courier);
    }
  }

  /// What this rank has of a half of the piece, as its owner or as a courier.
  void send_inputs(const Piece& p, int h) {
    const Half half = halves(p)[static_cast<std::size_t>(h)];
    if (half.direct) return;
    for (const Cut& cut : parcels_.cuts(number(p), h)) {
      if (partner(cut, half) != me_.rank()) continue;
      for (const Kind kind : half.side.inputs) {
        const SlotId from = cut.parcel != nullptr ? relayed_.at(cut.parcel)[kind] : own_[kind];
        me_.send(from, block(kind, cut.heads, half.rows), p.at);
      }
    }
  }

  void post_fetch(const Parcel& parcel) {
    if (parcel.courier == me_.rank()) {
      Slots& slots = relayed_[&parcel];
      for (const Kind kind : side(parcel.half).inputs) {
        slots[kind] = me_.slot(block(kind, parcel), lend(kind, parcel.fetched, parcel.asked));
        me_.recv(slots[kind], me_.block(slots[kind]), parcel.owner);
      }
    } else if (!early_parcels_.contains(&parcel)) {
      send_parcel(parcel);
    }
  }

  /// A home of this kind that nobody uses at `from` or later, until `until`.
  int lend(Kind kind, Index from, Index until) {
    auto& all = lent_[kind];
    auto free =
        std::find_if(all.begin(), all.end(), [&](const auto& home) { return home.second < from; });
    if (free == all.end()) free = all.insert(free, {me_.home(), 0});
    free->second = until;
    return free->first;
  }

  void post_inputs(const Piece& p) {
    if (p.at == me_.rank()) {
      // One piece is computed while the inputs of the next ones arrive.
      auto& homes = homes_[posted_++ % homes_.size()];
      Slots slots = own_;
      const auto both = halves(p);
      for (const int h : {0, 1}) {
        const Half& half = both[static_cast<std::size_t>(h)];
        if (half.direct) continue;
        for (const Kind kind : half.side.inputs) {
          slots[kind] = me_.slot(block(kind, half), home(homes, kind));
        }
        for (const Cut& cut : parcels_.cuts(number(p), h)) {
          for (const Kind kind : half.side.inputs) {
            me_.recv(slots[kind], block(kind, cut.heads, half.rows), partner(cut, half));
          }
        }
      }
      ready_.push_back(slots);
    }
    for (const int h : {0, 1}) {
      if (!early_.contains({number(p), h})) send_inputs(p, h);
    }
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
    const auto both = halves(p);
    for (const int h : {0, 1}) {
      const Half& half = both[static_cast<std::size_t>(h)];
      if (half.owner == p.at) continue;
      for (const Cut& cut : parcels_.cuts(number(p), h)) {
        const int to = partner(cut, half);
        for (const Kind kind : half.side.sums) {
          const Block part = block(kind, cut.heads, half.rows);
          if (to == me_.rank()) {
            if (cut.parcel != nullptr) start_sum(kind, *cut.parcel, p.end());
            await(part, p.at, p.end(), cut.parcel);
          }
          if (p.at == me_.rank()) me_.send(computed_.at(&p)[kind], part, to);
        }
      }
    }
  }

  /// The courier's sum of what comes of a parcel, from the first of that at `time`.
  void start_sum(Kind kind, const Parcel& parcel, Index time) {
    if (!started_.insert({&parcel, kind}).second) return;
    relayed_[&parcel][kind] = me_.fresh(block(kind, parcel), lend(kind, time, parcel.added));
  }

  /// Receives a sum that is due at `end`, to be joined later.
  void await(const Block& sum, int from, Index end, const Parcel* parcel) {
    std::vector<int>& homes = free_[sum.kind];
    if (homes.empty()) homes.push_back(me_.home());
    const SlotId slot = me_.slot(sum, homes.back());
    homes.pop_back();
    me_.recv(slot, sum, from);
    due_.push_back({slot, end, parcel});
  }

  void post_added(const Parcel& parcel) {
    for (const Kind kind : side(parcel.half).sums) {
      if (parcel.courier == me_.rank()) {
        while (std::any_of(due_.begin(), due_.end(),
                           [&](const Result& r) { return r.parcel == &parcel; })) {
          join_result();
        }
        const SlotId sum = relayed_.at(&parcel)[kind];
        me_.send(sum, me_.block(sum), parcel.owner);
      } else {
        await(block(kind, parcel), parcel.courier, parcel.added, nullptr);
      }
    }
  }

  void join_results(Index time) {
    while (!due_.empty() && due_.front().end <= time) join_result();
  }
  void join_result() {
    const Result result = due_.front();
    due_.pop_front();
    const Kind kind = me_.block(result.slot).kind;
    join(result.slot, result.parcel != nullptr ? relayed_.at(result.parcel)[kind] : own_[kind]);
    free_[kind].push_back(me_.home_of(result.slot));
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
  Parcels parcels_;
  std::vector<std::map<Kind, int>> homes_;  ///< of inputs, for pieces in turn
  std::size_t posted_ = 0;
  std::deque<Slots> ready_;             ///< of the pieces whose inputs are posted
  std::map<Kind, int> begun_homes_[2];  ///< of sums begun here
  std::map<Kind, std::size_t> begun_;
  std::set<std::pair<std::size_t, int>> early_;       ///< pieces and halves sent at the start
  std::set<const Parcel*> early_parcels_;             ///< likewise
  std::map<const Parcel*, Slots> relayed_;            ///< by a courier: inputs and sums
  std::set<std::pair<const Parcel*, Kind>> started_;  ///< of those sums
  std::map<Kind, std::vector<std::pair<int, Index>>> lent_;  ///< their homes, and until when
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
          line_mesh,
          true};
}

}  // namespace dattn
