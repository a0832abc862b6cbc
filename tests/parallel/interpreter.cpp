#include "tests/parallel/interpreter.hpp"

#include <algorithm>
#include <list>
#include <random>
#include <utility>
#include <vector>

#include "tests/parallel/legal.hpp"

namespace dattn {
namespace {

using Word = std::uint64_t;

Word mix(Word x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Word tag(Kind kind, Index row, Index head, Index i) {
  return mix(mix(mix(static_cast<Word>(kind) + 7) + static_cast<Word>(row)) +
             static_cast<Word>(head) * 64 + static_cast<Word>(i));
}

Word pair_value(Index head, Word q, Word k, Word v) {
  return mix(mix(mix(q + static_cast<Word>(head)) ^ k) ^ v);
}

/// What a pair gives to the three gradients, out of the five numbers that it reads.
struct PairGradients {
  Word dq, dk, dv;
};
PairGradients pair_gradients(Index head, Word q, Word k, Word v, Word d_o, Word stats) {
  const Word all = mix(mix(pair_value(head, q, k, v) ^ d_o) + stats);
  return {all, mix(all + 1), mix(all + 2)};
}

bool sum_kind(Kind kind) { return kind == Kind::O || kind >= Kind::dQ; }

struct Bad {
  std::string why;
};

/// The numbers of a Block in the order of memory: calls f(row, head, i).
template <class F>
void each(const Block& block, Index dim, const F& f) {
  for (const Range rows : block.rows) {
    for (Index r = rows.begin; r < rows.end; ++r) {
      for (const Range heads : block.heads) {
        for (Index h = heads.begin; h < heads.end; ++h) {
          for (Index i = 0; i < dim; ++i) f(r, h, i);
        }
      }
    }
  }
}

struct Message {
  int rank, step, peer;
  bool is_send;
  SlotId slot;
  int home;
  const Block* block;
  Message* other = nullptr;
  bool read = false;  ///< of a send: its data is on the way
  bool done = false;
  std::vector<Word> data{};
};

class World {
 public:
  World(const Problem& problem, const Plan& plan, Weather weather, Word seed)
      : problem_(problem), shape_(problem.shape()), plan_(plan), weather_(weather), random_(seed) {
    for (const Program& program : plan) set(program);
    for (Index row = 0; row < shape_.queries; ++row) {
      query_.push_back(problem.queries().positions({{row, row + 1}}).front().first);
    }
    for (Index row = 0; row < shape_.keys; ++row) {
      key_.push_back(problem.keys().positions({{row, row + 1}}).front().first);
    }
  }

  void run() {
    struct Event {
      std::size_t rank;
      Message* message;  ///< null: the rank takes its next step
    };
    std::vector<Event> ranks;
    std::vector<Event> moves;
    while (true) {
      ranks.clear();
      moves.clear();
      bool finished = true;
      for (std::size_t r = 0; r < plan_.size(); ++r) {
        finished = finished && (state_[r].next == plan_[r].steps.size() && idle(r));
        if (may_step(r)) ranks.push_back({r, nullptr});
      }
      for (Message& m : messages_) {
        if (m.is_send && m.other != nullptr && !m.other->done) moves.push_back({0, &m});
      }
      if (ranks.empty() && moves.empty()) {
        if (!finished) throw Bad{"deadlock"};
        break;
      }
      if (weather_ == Weather::Late && !ranks.empty()) moves.clear();
      if (weather_ == Weather::Early && !moves.empty()) ranks.clear();
      ranks.insert(ranks.end(), moves.begin(), moves.end());
      const Event next = ranks[random_() % ranks.size()];
      if (next.message == nullptr) {
        step(next.rank);
      } else if (!next.message->read) {
        leave(*next.message);
      } else {
        land(*next.message);
      }
    }
    compare();
  }

 private:
  struct State {
    std::vector<std::vector<Word>> homes;
    std::size_t next = 0;
    bool at_reduce = false, reduced = false;
    std::vector<Message*> pending;
  };

  Index dim(const Block& b) const { return dim_of(b.kind, shape_); }
  const Block& block(std::size_t r, SlotId s) const {
    return plan_[r].slots[static_cast<std::size_t>(s)].block;
  }
  int home(std::size_t r, SlotId s) const {
    return plan_[r].slots[static_cast<std::size_t>(s)].home;
  }
  Word& word(std::size_t r, SlotId s, Index row, Index head, Index i) {
    const Block& b = block(r, s);
    const Index place =
        place_of(b.rows, row).value() * b.head_count() + place_of(b.heads, head).value();
    return state_[r]
        .homes[static_cast<std::size_t>(home(r, s))][static_cast<std::size_t>(place * dim(b) + i)];
  }

  // ---- before the first step -------------------------------------------------------------------

  void set(const Program& p) {
    if (const char* why = illegal(problem_, p, static_cast<int>(state_.size()))) {
      throw Bad{std::string("illegal: ") + why};
    }
    State s;
    std::vector<std::size_t> words(static_cast<std::size_t>(p.homes), 0);
    for (const Slot& slot : p.slots) {
      auto& n = words[static_cast<std::size_t>(slot.home)];
      n = std::max(n, static_cast<std::size_t>(slot.block.row_count() * slot.block.head_count() *
                                               dim(slot.block)));
    }
    for (const std::size_t n : words) {
      s.homes.emplace_back(n);
      for (Word& w : s.homes.back()) w = random_();
    }
    state_.push_back(std::move(s));
    const std::size_t r = state_.size() - 1;
    std::vector<bool> seen(words.size(), false);
    for (std::size_t i = 0; i < p.slots.size(); ++i) {
      const auto h = static_cast<std::size_t>(p.slots[i].home);
      if (!seen[h] && sum_kind(p.slots[i].block.kind)) fill(r, static_cast<SlotId>(i), true);
      seen[h] = true;
    }
    for (const SlotId in : p.inputs) fill(r, in, false);
  }

  void fill(std::size_t r, SlotId s, bool zero) {
    const Block& b = block(r, s);
    each(b, dim(b), [&](Index row, Index head, Index i) {
      word(r, s, row, head, i) = zero ? 0 : tag(b.kind, row, head, i);
    });
  }

  // ---- waiting ---------------------------------------------------------------------------------

  bool idle(std::size_t r) const {
    return std::all_of(state_[r].pending.begin(), state_[r].pending.end(),
                       [](const Message* m) { return m->done; });
  }
  bool may_read(std::size_t r, SlotId s) const {
    return std::none_of(state_[r].pending.begin(), state_[r].pending.end(), [&](const Message* m) {
      return !m->done && !m->is_send && m->home == home(r, s);
    });
  }
  bool may_write(std::size_t r, SlotId s, bool message) const {
    return std::none_of(state_[r].pending.begin(), state_[r].pending.end(), [&](const Message* m) {
      const bool beside = message && !m->is_send && m->slot == s;
      return !m->done && m->home == home(r, s) && !beside;
    });
  }

  bool may_step(std::size_t r) const {
    if (state_[r].next >= plan_[r].steps.size()) return false;
    const Step& step = plan_[r].steps[state_[r].next];
    if (const auto* s = std::get_if<Send>(&step)) return may_read(r, s->slot);
    if (const auto* s = std::get_if<Recv>(&step)) return may_write(r, s->slot, true);
    if (const auto* s = std::get_if<Attend>(&step)) {
      return may_read(r, s->q) && may_read(r, s->k) && may_read(r, s->v) &&
             may_write(r, s->out, false);
    }
    if (const auto* s = std::get_if<AttendBackward>(&step)) {
      for (const SlotId in : {s->q, s->k, s->v, s->d_o, s->stats}) {
        if (!may_read(r, in)) return false;
      }
      for (const SlotId sum : {s->dq, s->dk, s->dv}) {
        if (!may_write(r, sum, false)) return false;
      }
      return true;
    }
    if (const auto* s = std::get_if<Add>(&step)) {
      return may_read(r, s->from) && may_write(r, s->into, false);
    }
    if (const auto* s = std::get_if<Clear>(&step)) return may_write(r, s->slot, false);
    if (const auto* s = std::get_if<Merge>(&step)) {
      return may_read(r, s->from) && may_write(r, s->into, false);
    }
    const auto& s = std::get<Reduce>(step);
    return state_[r].reduced || (!state_[r].at_reduce && may_write(r, s.slot, false));
  }

  // ---- steps -----------------------------------------------------------------------------------

  void step(std::size_t r) {
    const Step& now = plan_[r].steps[state_[r].next];
    if (const auto* s = std::get_if<Send>(&now)) {
      post(r, {plan_[r].rank, static_cast<int>(state_[r].next), s->peer, true, s->slot,
               home(r, s->slot), &s->block});
    } else if (const auto* t = std::get_if<Recv>(&now)) {
      each(t->block, dim(t->block),
           [&](Index row, Index head, Index i) { word(r, t->slot, row, head, i) = random_(); });
      post(r, {plan_[r].rank, static_cast<int>(state_[r].next), t->peer, false, t->slot,
               home(r, t->slot), &t->block});
    } else if (const auto* a = std::get_if<Attend>(&now)) {
      attend(r, *a);
    } else if (const auto* back = std::get_if<AttendBackward>(&now)) {
      attend_backward(r, *back);
    } else if (const auto* m = std::get_if<Merge>(&now)) {
      plus(r, m->from, m->into);
    } else if (const auto* add = std::get_if<Add>(&now)) {
      plus(r, add->from, add->into);
    } else if (const auto* clear = std::get_if<Clear>(&now)) {
      fill(r, clear->slot, true);
    } else {
      if (!reduce(r, std::get<Reduce>(now))) return;
    }
    ++state_[r].next;
  }

  /// f(head, row, key, key head, value head) for the allowed pairs of the step.
  template <class Step, class F>
  void each_pair(std::size_t r, const Step& step, const F& f) {
    const Block& k = block(r, step.k);
    const Block& v = block(r, step.v);
    each(block(r, step.q), 1, [&](Index row, Index head, Index) {
      const Index kh = shape_.key_head(head);
      const Index vh = shape_.value_head(head);
      if (!place_of(k.heads, kh) || !place_of(v.heads, vh)) return;
      for (const Range keys : k.rows) {
        for (Index key = keys.begin; key < keys.end; ++key) {
          if (allowed(head, row, key)) f(head, row, key, kh, vh);
        }
      }
    });
  }

  void attend(std::size_t r, const Attend& a) {
    each_pair(r, a, [&](Index head, Index row, Index key, Index kh, Index vh) {
      const Word value = pair_value(head, word(r, a.q, row, head, 0), word(r, a.k, key, kh, 0),
                                    word(r, a.v, key, vh, 0));
      for (Index i = 0; i < dim_of(Kind::O, shape_); ++i) {
        word(r, a.out, row, head, i) += value * static_cast<Word>(2 * i + 1);
      }
    });
  }

  void attend_backward(std::size_t r, const AttendBackward& a) {
    each_pair(r, a, [&](Index head, Index row, Index key, Index kh, Index vh) {
      const PairGradients g = pair_gradients(
          head, word(r, a.q, row, head, 0), word(r, a.k, key, kh, 0), word(r, a.v, key, vh, 0),
          word(r, a.d_o, row, head, 0), word(r, a.stats, row, head, 0));
      for (Index i = 0; i < dim_of(Kind::dQ, shape_); ++i) {
        word(r, a.dq, row, head, i) += g.dq * static_cast<Word>(2 * i + 1);
        word(r, a.dk, key, kh, i) += g.dk * static_cast<Word>(2 * i + 1);
      }
      for (Index i = 0; i < dim_of(Kind::dV, shape_); ++i) {
        word(r, a.dv, key, vh, i) += g.dv * static_cast<Word>(2 * i + 1);
      }
    });
  }

  void plus(std::size_t r, SlotId from, SlotId into) {
    const Block& b = block(r, from);
    each(b, dim(b), [&](Index row, Index head, Index i) {
      word(r, into, row, head, i) += word(r, from, row, head, i);
    });
  }

  bool reduce(std::size_t r, const Reduce& s) {
    if (std::exchange(state_[r].reduced, false)) return true;
    state_[r].at_reduce = true;
    const auto group = problem_.mesh().group(static_cast<int>(r), s.axis);
    for (const int member : group) {
      const auto m = static_cast<std::size_t>(member);
      if (!state_[m].at_reduce) return false;
      const auto* other = std::get_if<Reduce>(&plan_[m].steps[state_[m].next]);
      if (other->axis != s.axis) return false;
    }
    std::vector<Word> sum;
    for (const int member : group) {  // word by word, as a collective would: it knows no Blocks
      const auto m = static_cast<std::size_t>(member);
      const SlotId slot = std::get<Reduce>(plan_[m].steps[state_[m].next]).slot;
      const Block& b = block(m, slot);
      const auto words = static_cast<std::size_t>(b.row_count() * b.head_count() * dim(b));
      if (sum.empty()) sum.resize(words);
      if (sum.size() != words) throw Bad{"collective of different lengths"};
      const auto& memory = state_[m].homes[static_cast<std::size_t>(home(m, slot))];
      for (std::size_t i = 0; i < words; ++i) sum[i] += memory[i];
    }
    for (const int member : group) {
      const auto m = static_cast<std::size_t>(member);
      const SlotId slot = std::get<Reduce>(plan_[m].steps[state_[m].next]).slot;
      auto& memory = state_[m].homes[static_cast<std::size_t>(home(m, slot))];
      std::copy(sum.begin(), sum.end(), memory.begin());
      state_[m].at_reduce = false;
      state_[m].reduced = m != r;
    }
    return true;
  }

  // ---- messages --------------------------------------------------------------------------------

  void post(std::size_t r, Message message) {
    messages_.push_back(std::move(message));
    Message& m = messages_.back();
    state_[r].pending.push_back(&m);
    if (m.is_send && weather_ == Weather::Buffered) leave(m);
    for (Message& other : messages_) {  // the oldest one that waits for this
      if (other.other == nullptr && other.is_send != m.is_send && other.rank == m.peer &&
          other.peer == m.rank) {
        other.other = &m;
        m.other = &other;
        return;
      }
    }
  }

  void leave(Message& m) {
    each(*m.block, dim(*m.block), [&](Index row, Index head, Index i) {
      m.data.push_back(word(static_cast<std::size_t>(m.rank), m.slot, row, head, i));
    });
    m.read = m.done = true;
  }

  void land(Message& m) {
    Message& to = *m.other;
    const auto room =
        static_cast<std::size_t>(to.block->row_count() * to.block->head_count() * dim(*to.block));
    if (room < m.data.size()) throw Bad{"message too long"};
    std::size_t n = 0;
    each(*to.block, dim(*to.block), [&](Index row, Index head, Index i) {
      if (n < m.data.size()) {
        word(static_cast<std::size_t>(to.rank), to.slot, row, head, i) = m.data[n++];
      }
    });
    to.done = true;
  }

  // ---- the end ---------------------------------------------------------------------------------

  bool allowed(Index head, Index row, Index key) const {
    return problem_.mask().allows(head, query_[static_cast<std::size_t>(row)],
                                  key_[static_cast<std::size_t>(key)]);
  }

  /// The first word of what `head` of the row of `kind` should hold in the end.
  Word expected(Kind kind, Index row, Index head) const {
    Word sum = 0;
    const auto add = [&](Index h, Index query, Index key) {
      if (!allowed(h, query, key)) return;
      const Word q = tag(Kind::Q, query, h, 0);
      const Word k = tag(Kind::K, key, shape_.key_head(h), 0);
      const Word v = tag(Kind::V, key, shape_.value_head(h), 0);
      if (kind == Kind::O) {
        sum += pair_value(h, q, k, v);
        return;
      }
      const PairGradients g =
          pair_gradients(h, q, k, v, tag(Kind::dO, query, h, 0), tag(Kind::Stats, query, h, 0));
      sum += kind == Kind::dQ ? g.dq : kind == Kind::dK ? g.dk : g.dv;
    };
    if (kind == Kind::O || kind == Kind::dQ) {
      for (Index key = 0; key < shape_.keys; ++key) add(head, row, key);
      return sum;
    }
    for (Index h = 0; h < shape_.query_heads; ++h) {
      if ((kind == Kind::dK ? shape_.key_head(h) : shape_.value_head(h)) != head) continue;
      for (Index query = 0; query < shape_.queries; ++query) add(h, query, row);
    }
    return sum;
  }

  void compare() {
    const Pass pass = plan_.front().pass;
    for (const Program& p : plan_) {
      if (p.pass != pass) throw Bad{"passes mixed"};
    }
    for (std::size_t n = 0; n < plan_.front().results.size(); ++n) compare(n);
    for (std::size_t r = 0; r < plan_.size(); ++r) {
      for (const SlotId s : plan_[r].kept) compare_kept(r, s);
    }
  }

  /// Kept is what is there as it was given out.
  void compare_kept(std::size_t r, SlotId s) {
    const Block& b = block(r, s);
    each(b, dim(b), [&](Index row, Index head, Index i) {
      if (word(r, s, row, head, i) != tag(b.kind, row, head, i)) {
        throw Bad{"kept wrong in row " + std::to_string(row)};
      }
    });
  }

  /// The `n`-th results of all ranks.
  void compare(std::size_t n) {
    const Kind kind = plan_.front().results[n].block.kind;
    const Index heads = heads_of(kind, shape_);
    const Index rows = kind == Kind::dK || kind == Kind::dV ? shape_.keys : shape_.queries;
    std::vector<int> times(static_cast<std::size_t>(rows * heads), 0);
    for (std::size_t r = 0; r < plan_.size(); ++r) {
      const Result& result = plan_[r].results[n];
      each(result.block, 1, [&](Index row, Index head, Index) {
        ++times[static_cast<std::size_t>(row * heads + head)];
        const Word sum = expected(kind, row, head);
        for (Index i = 0; i < dim_of(kind, shape_); ++i) {
          if (word(r, result.slot, row, head, i) != sum * static_cast<Word>(2 * i + 1)) {
            throw Bad{"wrong result in row " + std::to_string(row)};
          }
        }
      });
    }
    if (std::any_of(times.begin(), times.end(), [](int count) { return count != 1; })) {
      throw Bad{"rows not delivered once"};
    }
  }

  const Problem& problem_;
  const Shape& shape_;
  const Plan& plan_;
  Weather weather_;
  std::mt19937_64 random_;
  std::vector<Index> query_;  ///< position of each row
  std::vector<Index> key_;
  std::vector<State> state_;
  std::list<Message> messages_;
};

}  // namespace

std::string interpret(const Problem& problem, const Plan& plan, Weather weather,
                      std::uint64_t seed) {
  try {
    World(problem, plan, weather, seed).run();
  } catch (const Bad& bad) {
    return bad.why;
  }
  return {};
}

}  // namespace dattn
