#include "parallel/inspect.hpp"

#include <algorithm>

#include "parallel/pairs.hpp"

namespace dattn {
namespace {

class Inspector {
 public:
  Inspector(const Problem& problem, const Program& program, int rank)
      : problem_(problem), program_(program), rank_(rank) {}

  std::optional<Fault> run() {
    if (!slots_stand() || !inputs_stand() || !results_stand() || !kept_stand()) return fault_;
    for (; step_ < program_.steps.size(); ++step_) {
      if (!std::visit([this](const auto& step) { return stands(step); }, program_.steps[step_])) {
        break;
      }
    }
    return fault_;
  }

 private:
  bool fault(std::string what) {
    fault_ = Fault{rank_, static_cast<int>(step_), std::move(what)};
    return false;
  }

  const Block& block(SlotId s) const { return program_.slots[static_cast<std::size_t>(s)].block; }
  int home(SlotId s) const { return program_.slots[static_cast<std::size_t>(s)].home; }
  bool is_input(int home_in) const {
    return std::any_of(program_.inputs.begin(), program_.inputs.end(),
                       [&](SlotId s) { return home(s) == home_in; });
  }

  bool known(SlotId s) {
    if (s >= 0 && s < static_cast<SlotId>(program_.slots.size())) return true;
    return fault("there is no slot " + std::to_string(s));
  }

  /// Whether the tensor has all of this, each row once and heads in order, neighbours joined.
  bool within_tensor(const Block& part) const {
    const Index tokens = (of_queries(part.kind) ? problem_.queries() : problem_.keys()).tokens();
    Index next = 0;
    for (const Range r : part.heads) {
      if (r.empty() || r.begin < next || r.end > heads_of(part.kind, problem_.shape()))
        return false;
      next = r.end + 1;
    }
    Ranges rows = part.rows;
    std::sort(rows.begin(), rows.end());
    Index end = 0;
    for (const Range r : rows) {
      if (r.empty() || r.begin < end || r.end > tokens) return false;
      end = r.end;
    }
    return true;
  }

  bool slots_stand() {
    if (program_.rank != rank_) {
      return fault("the program says that it is rank " + std::to_string(program_.rank) + "'s");
    }
    for (const SlotId s : program_.inputs) {
      if (!known(s)) return false;
    }
    for (const Result& result : program_.results) {
      if (!known(result.slot)) return false;
    }
    for (const SlotId s : program_.kept) {
      if (!known(s)) return false;
    }
    for (const Slot& slot : program_.slots) {
      if (slot.home < 0 || slot.home >= program_.homes) {
        return fault("there is no home " + std::to_string(slot.home));
      }
      if (!within_tensor(slot.block)) {
        return fault("a slot for " + text(slot.block) + ", which its tensor does not have");
      }
    }
    return true;
  }

  bool inputs_stand() {
    const auto due = input_kinds(program_.pass);
    if (program_.inputs.size() != due.size()) {
      return fault("starts with " + std::to_string(program_.inputs.size()) + " inputs where " +
                   std::to_string(due.size()) + " are due");
    }
    for (std::size_t i = 0; i < due.size(); ++i) {
      const Block& input = block(program_.inputs[i]);
      if (input.kind != due[i]) {
        return fault(text(input) + " as the input " + std::string(name_of(due[i])));
      }
      // Queries may be replicated (few of them, against many keys); keys and values have one owner,
      // unless they come from a cache, or the forward pass has kept them for this rank, which
      // hand_over() proves.
      if (problem_.cached() || (program_.pass == Pass::backward && problem_.keeps())) continue;
      const Range own = problem_.keys().rows(rank_);
      for (const Range rows : input.rows) {
        if (!of_queries(input.kind) && !own.contains(rows)) {
          return fault("starts with " + text(input) + ", which is not its own");
        }
      }
    }
    for (std::size_t s = 0; s < program_.slots.size(); ++s) {
      const auto id = static_cast<SlotId>(s);
      const bool known_input =
          std::find(program_.inputs.begin(), program_.inputs.end(), id) != program_.inputs.end();
      if (is_input(home(id)) && !known_input) {
        return fault(text(block(id)) + " shares its home with an input");
      }
    }
    for (std::size_t i = 0; i < due.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        if (home(program_.inputs[i]) == home(program_.inputs[j])) {
          return fault("two inputs share a home");
        }
      }
    }
    return true;
  }

  bool results_stand() {
    const auto due = result_kinds(program_.pass);
    bool stand = program_.results.size() == due.size();
    for (std::size_t i = 0; stand && i < due.size(); ++i) {
      const Result& result = program_.results[i];
      if (result.block.kind != due[i] || !contains(block(result.slot), result.block)) {
        step_ = program_.steps.size();
        return fault("delivers " + text(result.block) + " out of " + text(block(result.slot)));
      }
      stand = within_tensor(result.block);
    }
    if (stand) return true;
    step_ = program_.steps.size();
    return fault("does not deliver each result of a " + std::string(name_of(program_.pass)) +
                 " pass");
  }

  bool kept_stand() {
    for (std::size_t i = 0; i < program_.kept.size(); ++i) {
      const Block& kept = block(program_.kept[i]);
      const auto kinds = input_kinds(Pass::forward);
      if (program_.pass != Pass::forward ||
          std::find(kinds.begin(), kinds.end(), kept.kind) == kinds.end()) {
        return fault("keeps " + text(kept) + " in a " + std::string(name_of(program_.pass)) +
                     " pass");
      }
      for (std::size_t j = 0; j < i; ++j) {
        if (block(program_.kept[j]).kind == kept.kind) {
          return fault("keeps both " + text(block(program_.kept[j])) + " and " + text(kept));
        }
      }
    }
    return true;
  }

  bool writable(SlotId s) { return !is_input(home(s)) || fault("writes into an input"); }

  template <class Transfer>
  bool addressed(const Transfer& t) {
    if (!known(t.slot)) return false;
    if (t.peer < 0 || t.peer >= problem_.ranks()) {
      return fault("there is no rank " + std::to_string(t.peer));
    }
    if (t.block.empty() || !contains(block(t.slot), t.block)) {
      return fault(text(t.block) + " is no part of " + text(block(t.slot)));
    }
    return true;
  }

  bool stands(const Send& step) { return addressed(step); }
  bool stands(const Recv& step) { return addressed(step) && writable(step.slot); }

  bool stands(const Attend& step) {
    if (!known(step.q) || !known(step.k) || !known(step.v) || !known(step.out)) return false;
    const Block& q = block(step.q);
    const Block& k = block(step.k);
    const Block& v = block(step.v);
    const Block& out = block(step.out);
    const bool has_v = problem_.values_in_keys() ? step.v == step.k : v.kind == Kind::V;
    if (q.kind != Kind::Q || k.kind != Kind::K || !has_v || out.kind != Kind::O) {
      return fault("attends with " + text(q) + ", " + text(k) + ", " + text(v) + ", " + text(out) +
                   " where Q, K, V, O are due");
    }
    if (out.rows != q.rows || out.heads != q.heads || k.rows != v.rows) {
      return fault("attends with rows or heads that differ: " + text(q) + " into " + text(out) +
                   ", " + text(k) + " beside " + text(v));
    }
    if (heads_served(program_, step, problem_.shape()).empty()) {
      return fault(text(k) + " and " + text(v) + " serve no query head of " + text(q));
    }
    return writable(step.out);
  }

  bool stands(const AttendBackward& step) {
    AttendBackward all = step;
    for (const auto kinds : {input_kinds(Pass::backward), result_kinds(Pass::backward)}) {
      for (const Kind kind : kinds) {
        const SlotId s = operand(all, kind);
        if (!known(s)) return false;
        if (block(s).kind != kind) {
          return fault("goes back with " + text(block(s)) + " where " + std::string(name_of(kind)) +
                       " is due");
        }
      }
    }
    const auto beside = [&](SlotId a, SlotId b) {
      if (block(a).rows == block(b).rows && block(a).heads == block(b).heads) return true;
      return fault("goes back with rows or heads that differ: " + text(block(a)) + " beside " +
                   text(block(b)));
    };
    if (!beside(step.q, step.d_o) || !beside(step.q, step.stats) || !beside(step.q, step.dq) ||
        !beside(step.k, step.dk) || !beside(step.v, step.dv)) {
      return false;
    }
    if (block(step.k).rows != block(step.v).rows) {
      return fault("goes back with " + text(block(step.k)) + " beside " + text(block(step.v)));
    }
    if (heads_served(program_, step, problem_.shape()).empty()) {
      return fault(text(block(step.k)) + " and " + text(block(step.v)) +
                   " serve no query head of " + text(block(step.q)));
    }
    return true;  // sums lie in no input's home
  }

  bool stands(const Merge& step) {
    if (!known(step.from) || !known(step.into)) return false;
    const Block& from = block(step.from);
    const Block& into = block(step.into);
    if (from.kind != Kind::O || !contains(into, from) || step.from == step.into) {
      return fault("merges " + text(from) + " into " + text(into));
    }
    return writable(step.into);
  }

  bool stands(const Add& step) {
    if (!known(step.from) || !known(step.into)) return false;
    const Block& from = block(step.from);
    const Block& into = block(step.into);
    if (!is_sum(from.kind) || from.kind == Kind::O || !contains(into, from) ||
        home(step.from) == home(step.into)) {
      return fault("adds " + text(from) + " to " + text(into));
    }
    return true;
  }

  bool stands(const Clear& step) {
    if (!known(step.slot)) return false;
    return is_sum(block(step.slot).kind) || fault("clears " + text(block(step.slot)));
  }

  bool stands(const Reduce& step) {
    if (!known(step.slot)) return false;
    if (step.axis < 0 || step.axis >= static_cast<int>(problem_.mesh().axes.size()) ||
        !is_sum(block(step.slot).kind)) {
      return fault("reduces " + text(block(step.slot)) + " along axis " +
                   std::to_string(step.axis));
    }
    return writable(step.slot);
  }

  const Problem& problem_;
  const Program& program_;
  const int rank_;
  std::size_t step_ = 0;
  std::optional<Fault> fault_;
};

}  // namespace

std::optional<Fault> inspect(const Problem& problem, const Program& program, int rank) {
  return Inspector(problem, program, rank).run();
}

}  // namespace dattn
