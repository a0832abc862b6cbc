#include "parallel/engine.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "comm/error.hpp"
#include "kernels/attend_backward.hpp"
#include "kernels/check.hpp"
#include "kernels/in_parts.hpp"
#include "kernels/partial.hpp"
#include "parallel/all_reduce.hpp"
#include "parallel/compensate.hpp"
#include "parallel/envelope.hpp"
#include "parallel/flights.hpp"
#include "parallel/lending.hpp"
#include "parallel/served.hpp"
#include "parallel/slot_sums.hpp"
#include "parallel/sums.hpp"

namespace dattn {
namespace {

/// Homes that ranks of this host look at lie in memory that they see, the others in any.
template <comm::Transport T>
Homes::Allocate memory_of_homes(const Program& program, T& transport) {
  if constexpr (comm::Lending<T>) {
    const auto seen = homes_seen(program, [&](int rank) { return transport.shares(rank); });
    return [seen, &transport](int home, Index bytes) {
      return seen[static_cast<std::size_t>(home)] ? transport.allocate(bytes)
                                                  : comm::allocate(bytes);
    };
  } else {
    return [](int, Index bytes) { return comm::allocate(bytes); };
  }
}

}  // namespace

template <comm::Transport T>
struct Engine<T>::State {
  const Problem& problem;
  const Program& program;
  T& transport;
  EngineOptions options;
  Homes homes;
  SlotSums sums;
  Course course;  ///< of the run under way, or of the last
  Flights<T> flights;
  Workspace workspace;
  std::optional<Compensation<T>> compensation;  ///< where there are pseudo-keys
  const Mask* mask;                             ///< the Problem's, or a narrower one
  std::vector<AllReduce<T>> axes;               ///< of the mesh, if anything is reduced
  RunParts parts;                               ///< of the run under way

  State(const Problem& problem_in, const Program& program_in, T& transport_in,
        EngineOptions options_in)
      : problem(problem_in),
        program(program_in),
        transport(transport_in),
        options(std::move(options_in)),
        homes(problem, program, memory_of_homes(program, transport)),
        sums(problem, program, homes, options),
        flights(problem, program, transport, homes, course, options),
        mask(&problem_in.mask()) {
    CHECK(transport.size() == problem.ranks() && transport.rank() == program.rank, transport.size(),
          transport.rank(), problem.ranks(), program.rank);
    // Along its one axis all ranks reduce or none; along several who does may differ.
    const int dimensions = static_cast<int>(problem.mesh().axes.size());
    const bool reduces = std::any_of(program.steps.begin(), program.steps.end(), [](const Step& s) {
      return std::holds_alternative<Reduce>(s);
    });
    for (int axis = 0; (dimensions > 1 || reduces) && axis < dimensions; ++axis) {
      axes.emplace_back(transport, problem.mesh().group(program.rank, axis), problem.hosts(),
                        options.verify_wire);
    }
    for (const Step& step : program.steps) {
      const auto* reduce = std::get_if<Reduce>(&step);
      if (reduce == nullptr) continue;
      const Index record = record_bytes(program, *reduce, problem);
      axes[static_cast<std::size_t>(reduce->axis)].reserve(bytes(reduce->slot) / record, record);
    }
    course.times.steps.resize(program.steps.size());
    CHECK(options.sinks.empty() || std::ssize(options.sinks) == problem.shape().query_heads,
          options.sinks.size(), problem.shape().query_heads);
    CHECK(options.sinks.empty() || !options.score.sigmoid, options.score.sigmoid);
    const Shape& shape = problem.shape();
    CHECK(options.key_weights.empty() ||
              std::ssize(options.key_weights) == shape.keys * shape.key_heads,
          options.key_weights.size(), shape.keys, shape.key_heads);
    if (problem.compensate() != Compensate::off) {
      const Score& score = options.score;
      CHECK(program.pass == Pass::forward, name_of(problem.compensate()));
      CHECK(!score.sigmoid && score.alibi.empty() && score.bias.empty() &&
                options.key_weights.empty(),
            name_of(problem.compensate()), score.sigmoid);
      if (pseudo_key_count(problem) > 0) {
        compensation.emplace(problem, program.rank, options.verify_wire);
      }
    }
  }

  const Slot& slot(SlotId s) const { return homes.slot(s); }
  Index bytes(SlotId s) const { return homes.bytes(s); }
  template <class E>
  View<const E> read(SlotId s) const {
    return homes.template read<E>(s);
  }
  template <class E>
  View<E> write(SlotId s) {
    return homes.template write<E>(s);
  }

  // ---- steps -----------------------------------------------------------------------------------

  void take(const Send& step) {
    if (parts.messages) flights.post(step);
  }
  void take(const Recv& step) {
    if (parts.messages) flights.post(step);
  }

  Work work() {
    std::function<void()> between_tiles;
    if (parts.polling) between_tiles = [this] { flights.poll(); };
    return {options.score, options.threads, between_tiles, options.isa, &workspace};
  }

  template <class E>
  void attend_as(const Attend& step) {
    const Index rows = slot(step.q).block.row_count();
    const Index at_once =
        options.rows_at_once > 0 ? options.rows_at_once : std::max<Index>(rows, 1);
    for (const Served& s : served(program, problem, step, options.key_weights)) {
      for (Range some{0, 0}; some.end < rows;) {
        some = {some.end, std::min(rows, some.end + at_once)};
        const auto of = [&](auto view) {
          view.data = view.at(some.begin, 0);
          view.rows = some.size();
          return view;
        };
        Where where = s.where;
        where.queries = part(where.queries, some);
        attend(of(read<E>(step.q).only(s.q)), read<E>(step.k).only(s.k), read<E>(step.v).only(s.v),
               of(write<SumOf<E>>(step.out).only(s.q)), where, *mask, work());
      }
    }
  }

  template <class E>
  void attend_as(const AttendBackward& step) {
    using Sum = SumOf<E>;
    for (const Served& s : served(program, problem, step, options.key_weights)) {
      const View<const Sum> stats = read<Sum>(step.stats).only(s.q);
      View<const Sum> delta = stats;
      ++delta.data;
      attend_backward(read<E>(step.q).only(s.q), read<E>(step.k).only(s.k),
                      read<E>(step.v).only(s.v), read<E>(step.d_o).only(s.q), stats, delta,
                      write<Sum>(step.dq).only(s.q), write<Sum>(step.dk).only(s.k),
                      write<Sum>(step.dv).only(s.v), s.where, *mask, work());
    }
  }
  /// Calls f with a number of the Problem's type.
  template <class F>
  void as_typed(const F& f) {
    switch (problem.type()) {
      case Type::bf16:
        return f(BFloat16{});
      case Type::f4:
        return f(float{});
      case Type::f8:
        return f(double{});
    }
  }
  template <class S>
  void attend_any(const S& step) {
    as_typed([&]<class E>(E) { attend_as<E>(step); });
  }

  void take(const Attend& step) {
    flights.before_reading(step.q);
    flights.before_reading(step.k);
    flights.before_reading(step.v);
    flights.before_writing(step.out);
    if (!parts.kernels) return;
    const double from = course.now();
    if (options.attend) {
      options.attend(step, homes.memory(step.q), homes.memory(step.k), homes.own_memory(step.out),
                     *mask, work());
    } else {
      attend_any(step);
    }
    course.computed(from);
  }

  void take(const AttendBackward& step) {
    for (const SlotId s : {step.q, step.k, step.v, step.d_o, step.stats}) flights.before_reading(s);
    for (const SlotId s : {step.dq, step.dk, step.dv}) flights.before_writing(s);
    if (!parts.kernels) return;
    const double from = course.now();
    attend_any(step);
    course.computed(from);
  }

  void take(const Add& step) {
    flights.before_reading(step.from);
    flights.before_writing(step.into);
    if (!parts.kernels) return;
    const double from = course.now();
    sums.add(step.from, step.into);
    course.computed(from);
  }

  void take(const Clear& step) {
    flights.before_writing(step.slot);
    if (!parts.kernels) return;
    const double from = course.now();
    sums.start_over(step.slot);
    course.computed(from);
  }

  void take(const Merge& step) {
    flights.before_reading(step.from);
    flights.before_writing(step.into);
    if (!parts.kernels) return;
    const double from = course.now();
    sums.merge(step.from, step.into);
    course.computed(from);
  }

  void take(const Reduce& step) {
    if (!parts.messages) return;
    flights.before_writing(step.slot);
    const Kind kind = slot(step.slot).block.kind;
    const double from = course.now();
    if (problem.mesh().axes[static_cast<std::size_t>(step.axis)].size > 1 && bytes(step.slot) > 0) {
      flights.named(course.step, [&] {
        auto& group = axes[static_cast<std::size_t>(step.axis)];
        const std::span<std::byte> records{homes.own_memory(step.slot),
                                           static_cast<std::size_t>(bytes(step.slot))};
        const auto sent =
            group(records, record_bytes(program, step, problem), sum_rule(kind, problem.type()));
        course.times.bytes_sent += sent.bytes;
        course.times.between_hosts += sent.between_hosts;
        course.times.envelopes += sent.envelopes;
      });
      ++course.times.messages;
      ++course.times.collectives;
    }
    course.waited(course.now() - from);
  }

  // ---- pseudo-keys -----------------------------------------------------------------------------

  /// Has a failure name what it hit.
  template <class F>
  void compensating(const F& f) {
    const double from = course.now();
    try {
      f();
    } catch (const Corruption& e) {
      throw Corruption(std::string("pseudo-keys: ") + e.what());
    } catch (const comm::Timeout& e) {
      throw StepFailure(std::string("pseudo-keys: ") + e.what(), true);
    } catch (const std::exception& e) {
      throw StepFailure(std::string("pseudo-keys: ") + e.what(), false);
    }
    course.times.wait += course.now() - from;
  }

  /// Before the first step: sums of what is dropped are under way to all ranks.
  void sum_dropped() {
    as_typed([&]<class E>(E) {
      const double from = course.now();
      if (parts.kernels) {
        compensation->sum(read<E>(program.input(Kind::K)), read<E>(program.input(Kind::V)),
                          options.threads);
      }
      course.computed(from);
      if (!parts.messages) return;
      compensating([&] {
        const auto sent = compensation->template start<E>(transport);
        course.times.bytes_sent += sent.bytes;
        course.times.between_hosts += sent.between_hosts;
        course.times.messages += sent.messages;
        course.times.envelopes += sent.envelopes;
      });
    });
  }

  /// After the last step: what the rank delivers has seen the pseudo-keys too.
  void merge_pseudo_keys() {
    if (parts.messages) {
      compensating([&] { compensation->wait(transport); });
    }
    if (!parts.kernels) return;
    const double from = course.now();
    as_typed([&]<class E>(E) {
      const Result& result = program.result(Kind::O);
      const SlotId q = program.input(Kind::Q);
      const View<const E> queries = read<E>(q);
      const View<SumOf<E>> all = write<SumOf<E>>(result.slot);
      for (const Range rows : result.block.rows) {
        const Index in_q = place_in(q, rows);
        const Index in_all = place_in(result.slot, rows);
        compensation->merge(
            View<const E>{queries.at(in_q, 0), rows.size(), queries.heads, queries.dim},
            View<SumOf<E>>{all.at(in_all, 0), rows.size(), all.heads, all.dim}, options.score,
            options.threads);
      }
    });
    course.computed(from);
  }

  /// Where `rows` begin in the slot, which has them side by side and all heads.
  Index place_in(SlotId s, Range rows) const {
    const Block& whole = slot(s).block;
    const auto first = place_of(whole.rows, rows.begin);
    CHECK(whole.head_count() == heads_of(whole.kind, problem.shape()) && first.has_value() &&
              place_of(whole.rows, rows.end - 1) == *first + rows.size() - 1,
          rows.begin, rows.end, text(whole));
    return *first;
  }

  /// Calls f with the rows of a result, piece by piece: dense, if it has all heads of its slot;
  /// else neighbouring ones.
  template <class E, class F>
  void each_result(Kind kind, const F& f) const {
    CHECK(sizeof(E) == static_cast<std::size_t>(sum_bytes_of(problem.type())), sizeof(E));
    const Result& result = program.result(kind);
    const Block& whole = slot(result.slot).block;
    View<const E> all = read<E>(result.slot);
    if (result.block.heads != whole.heads) {
      CHECK(result.block.heads.size() <= 1, text(result.block), text(whole));
      if (result.block.empty()) return;
      all = all.only(place_among(whole.heads, result.block.heads.front()));
    }
    for (const Range rows : result.block.rows) {
      const auto first = place_of(whole.rows, rows.begin);
      CHECK(first.has_value() && place_of(whole.rows, rows.end - 1) == *first + rows.size() - 1,
            text(result.block), text(whole));
      f(View<const E>{all.at(*first, 0), rows.size(), all.heads, all.dim, all.stride});
    }
  }

  RunTimes run(const RunParts& wanted) {
    parts = wanted;
    for (const SlotId s : program.inputs) {
      CHECK(homes.memory(s) != nullptr || bytes(s) == 0, "input slot", s,
            "is neither filled nor bound");
    }
    RunTimes& times = course.times;
    times = {};
    times.steps.resize(program.steps.size());
    course.step = 0;
    course.start = Course::Clock::now();
    flights.start();
    std::vector<bool> seen(static_cast<std::size_t>(homes.count()), false);
    for (const Slot& s : program.slots) {  // the first slot of each home, as the rehearsal has it
      const auto home = static_cast<std::size_t>(s.home);
      if (parts.kernels && is_sum(s.block.kind) && !seen[home]) {
        sums.start_over(static_cast<SlotId>(&s - program.slots.data()));
      }
      seen[home] = true;
    }
    if (compensation) sum_dropped();
    for (std::size_t i = 0; i < program.steps.size(); ++i) {
      course.step = static_cast<int>(i);
      if (options.progress) options.progress(i);
      times.steps[i].begin = course.now();
      std::visit([this](const auto& step) { this->take(step); }, program.steps[i]);
      times.steps[i].end = course.now();
    }
    if (!program.steps.empty()) {
      flights.land_all();
      times.steps.back().end = course.now();
    }
    if (compensation) merge_pseudo_keys();
    if (!options.sinks.empty() && program.pass == Pass::forward && parts.kernels) {
      const double from = course.now();
      sums.add_sinks(program.result(Kind::O), options.sinks);
      course.computed(from);
    }
    flights.finish();
    times.seconds = course.now();
    return times;
  }
};

template <comm::Transport T>
Engine<T>::Engine(const Problem& problem, const Program& program, T& transport,
                  EngineOptions options)
    : state_(std::make_unique<State>(problem, program, transport, std::move(options))) {}

template <comm::Transport T>
Engine<T>::~Engine() = default;

template <comm::Transport T>
std::span<std::byte> Engine<T>::input(SlotId slot) {
  return state_->homes.input(slot);
}

template <comm::Transport T>
void Engine<T>::bind(SlotId slot, std::span<const std::byte> memory) {
  CHECK(static_cast<Index>(memory.size()) == state_->bytes(slot), memory.size(),
        state_->bytes(slot));
  state_->homes.bind(slot, memory.data(), 0);
}

template <comm::Transport T>
void Engine<T>::bind(SlotId slot, const std::byte* memory, Index stride) {
  for (const Step& step : state_->program.steps) {
    const auto* send = std::get_if<Send>(&step);
    CHECK(send == nullptr || send->slot != slot, slot);
  }
  state_->homes.bind(slot, memory, stride);
}

template <comm::Transport T>
void Engine<T>::narrow(const Mask& mask) {
  state_->mask = &mask;
}

template <comm::Transport T>
RunTimes Engine<T>::run(const RunParts& parts) {
  return state_->run(parts);
}

template <comm::Transport T>
std::span<const std::byte> Engine<T>::kept(SlotId slot) const {
  const auto& all = state_->program.kept;
  CHECK(std::find(all.begin(), all.end(), slot) != all.end(), slot);
  return {state_->homes.memory(slot), static_cast<std::size_t>(state_->bytes(slot))};
}

template <comm::Transport T>
template <class E>
void Engine<T>::result(std::span<E> o, std::span<E> lse) const {
  const auto d_v = static_cast<std::size_t>(state_->problem.shape().d_v);
  std::size_t done = 0;  // (row, head) records
  state_->template each_result<E>(Kind::O, [&](View<const E> part) {
    const auto records = static_cast<std::size_t>(part.rows * part.heads);
    finish(part, o.subspan(done * d_v, records * d_v), lse.subspan(done, records),
           state_->options.threads, state_->options.score.sigmoid);
    done += records;
  });
  CHECK(done == lse.size() && done * d_v == o.size(), done, lse.size());
}

template <comm::Transport T>
template <class E>
void Engine<T>::gradient(Kind kind, std::span<E> out) const {
  CHECK(kind != Kind::O);
  std::size_t done = 0;
  state_->template each_result<E>(kind, [&](View<const E> part) {
    CHECK(part.dense(), name_of(kind));
    in_parts(state_->options.threads, part.size(), static_cast<Index>(sizeof(E)), [&](Range some) {
      std::copy_n(part.data + some.begin, some.size(),
                  out.data() + static_cast<Index>(done) + some.begin);
    });
    done += static_cast<std::size_t>(part.size());
  });
  CHECK(done == out.size(), done, out.size());
}

#define DATTN_ENGINE(T)                                                        \
  template class Engine<T>;                                                    \
  template void Engine<T>::result(std::span<float>, std::span<float>) const;   \
  template void Engine<T>::result(std::span<double>, std::span<double>) const; \
  template void Engine<T>::gradient(Kind, std::span<float>) const;             \
  template void Engine<T>::gradient(Kind, std::span<double>) const;
DATTN_ENGINE(comm::Communicator)
DATTN_ENGINE(comm::Windows)
DATTN_ENGINE(comm::Loopback::Endpoint)

}  // namespace dattn
