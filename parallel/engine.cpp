#include "parallel/engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "comm/error.hpp"
#include "kernels/attend_backward.hpp"
#include "kernels/check.hpp"
#include "kernels/partial.hpp"
#include "parallel/compensate.hpp"
#include "parallel/pairs.hpp"
#include "parallel/wire.hpp"

namespace dattn {
namespace {

/// Homes begin at multiples of this: whole cache lines and vector registers.
constexpr std::size_t kAlign = 64;

struct Freed {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{kAlign}); }
};
using Memory = std::unique_ptr<std::byte[], Freed>;

Memory allocate(Index bytes) {
  const auto size = static_cast<std::size_t>(std::max<Index>(bytes, 1));
  return Memory(new (std::align_val_t{kAlign}) std::byte[size]);
}

/// MPI hands over records of the size of its datatype, at no better alignment than their numbers'.
template <class E>
void merge_records(const std::byte* in, std::byte* inout, std::int64_t records,
                   std::int64_t record_bytes) {
  merge(reinterpret_cast<const E*>(in), reinterpret_cast<E*>(inout), records,
        record_bytes / static_cast<std::int64_t>(sizeof(E)));
}

template <class E>
void add_numbers(const E* in, E* inout, Index count) {
  for (Index i = 0; i < count; ++i) inout[i] += in[i];
}

/// Likewise, of gradients.
template <class E>
void add_records(const std::byte* in, std::byte* inout, std::int64_t records,
                 std::int64_t record_bytes) {
  add_numbers(reinterpret_cast<const E*>(in), reinterpret_cast<E*>(inout),
              records * record_bytes / static_cast<std::int64_t>(sizeof(E)));
}

}  // namespace

template <comm::Transport T>
struct Engine<T>::State {
  using Clock = std::chrono::steady_clock;

  /// A message that may still be on its way.
  struct Flight {
    typename T::Request request;
    int home;
    SlotId slot;
    bool writes;
    bool counts;  ///< travels between ranks
    int step;
    std::byte* staged;  ///< where it lies rounded; null: it does not
  };

  /// Where the messages of a home lie rounded while they are under way, one behind the other.
  struct Staging {
    Memory memory;
    Index size;
    Index used;
  };

  const Problem& problem;
  const Program& program;
  T& transport;
  EngineOptions options;
  std::vector<Memory> homes;
  std::vector<Staging> staging;  ///< by home
  Workspace workspace;
  std::optional<Compensation<T>> compensation;  ///< where there are pseudo-keys
  std::vector<const std::byte*> bound;  ///< by home, for inputs: the caller's memory or ours
  std::vector<Index> strides;           ///< by home: bytes from row to row, 0 where rows are dense
  const Mask* mask;                     ///< the Problem's, or a narrower one
  std::vector<Flight> flights;
  std::vector<T> axes;  ///< one transport for each axis of a mesh of several
  RunTimes times;
  RunParts parts;  ///< of the run under way
  Clock::time_point start;
  int under_way = 0;       ///< flights that count
  double since = 0;        ///< when under_way last rose from 0
  double on_the_wire = 0;  ///< seconds in which under_way was not 0
  double widening = 0;     ///< seconds in which land() worked
  double polled = 0;       ///< when poll() last did something
  std::size_t turn = 0;    ///< flight that the next poll tests first
  int now_at = 0;          ///< step, for messages

  State(const Problem& problem_in, const Program& program_in, T& transport_in,
        EngineOptions options_in)
      : problem(problem_in),
        program(program_in),
        transport(transport_in),
        options(std::move(options_in)),
        mask(&problem_in.mask()) {
    CHECK(transport.size() == problem.ranks() && transport.rank() == program.rank, transport.size(),
          transport.rank(), problem.ranks(), program.rank);
    const auto bytes = home_bytes(program, problem);
    homes.resize(bytes.size());
    bound.resize(bytes.size(), nullptr);
    strides.resize(bytes.size(), 0);
    for (std::size_t h = 0; h < bytes.size(); ++h) {
      if (!is_input(static_cast<int>(h))) homes[h] = allocate(bytes[h]);
    }
    for (const Index size : staging_bytes(program, problem)) {
      staging.push_back({size > 0 ? allocate(size) : Memory(), size, 0});
    }
    if (problem.mesh().axes.size() > 1) {
      for (int axis = 0; axis < static_cast<int>(problem.mesh().axes.size()); ++axis) {
        const auto group = problem.mesh().group(program.rank, axis);
        axes.push_back(transport.split(group.front(), program.rank));
      }
    }
    times.steps.resize(program.steps.size());
    if (problem.compensate() != Compensate::off) {
      const Score& score = options.score;
      CHECK(program.pass == Pass::forward, name_of(problem.compensate()));
      CHECK(!score.sigmoid && score.alibi.empty() && score.bias.empty(),
            name_of(problem.compensate()), score.sigmoid);
      if (pseudo_key_count(problem) > 0) compensation.emplace(problem, program.rank);
    }
  }

  bool is_input(int home) const {
    return std::any_of(program.inputs.begin(), program.inputs.end(),
                       [&](SlotId s) { return slot(s).home == home; });
  }
  const Slot& slot(SlotId s) const { return program.slots[static_cast<std::size_t>(s)]; }
  Index bytes(SlotId s) const { return bytes_of(slot(s).block, problem.shape(), problem.type()); }

  const std::byte* memory(SlotId s) const {
    const auto home = static_cast<std::size_t>(slot(s).home);
    return bound[home] != nullptr ? bound[home] : homes[home].get();
  }
  std::byte* own_memory(SlotId s) { return homes[static_cast<std::size_t>(slot(s).home)].get(); }

  double now() const { return std::chrono::duration<double>(Clock::now() - start).count(); }

  // ---- messages --------------------------------------------------------------------------------

  /// Where the heads and rows of `part` lie in slot `s`: one Range of heads after the other, so
  /// that both ends of a message have the same order however their rows are cut.
  template <class Piece, class Byte>
  std::vector<Piece> strips(SlotId s, const Block& part, Byte* base) const {
    std::vector<Piece> out;
    for (const Range heads : part.heads) strips(s, heads, part.rows, base, out);
    return out;
  }
  template <class Piece, class Byte>
  void strips(SlotId s, Range heads, const Ranges& rows, Byte* base,
              std::vector<Piece>& out) const {
    const Block& whole = slot(s).block;
    const Index head = record_bytes(whole.kind, problem.shape(), problem.type());
    const Index row = head * whole.head_count();
    const Index first_head = local(whole.heads, heads).begin;
    for (Range left : rows) {
      while (!left.empty()) {
        // The piece of `left` that lies in one Range of the slot is one strip.
        Index before = 0;
        Range here;
        for (const Range range : whole.rows) {
          if (range.contains(left.begin)) {
            here = intersect(left, range);
            before += left.begin - range.begin;
            break;
          }
          before += range.size();
        }
        CHECK(!here.empty(), left.begin, text(whole));
        out.push_back(
            {base + before * row + first_head * head, here.size(), heads.size() * head, row});
        left.begin = here.end;
      }
    }
  }
  /// Where `part` lies among these heads. @pre they have all of it
  static Range local(const Ranges& heads, Range part) {
    const auto first = place_of(heads, part.begin);
    CHECK(first.has_value(), part.begin);
    return {*first, *first + part.size()};
  }

  /// Room for a message that travels rounded; null for others.
  template <class Message>
  std::byte* stage(const Message& step) {
    if (step.peer == program.rank || !is_rounded(step.block.kind, problem)) return nullptr;
    const int home = slot(step.slot).home;
    Staging& here = staging[static_cast<std::size_t>(home)];
    const bool in_use = std::any_of(flights.begin(), flights.end(), [&](const Flight& f) {
      return f.home == home && f.staged != nullptr;
    });
    const Index from = in_use ? here.used : 0;
    here.used = from + wire_bytes(step.block, problem);
    CHECK(here.used <= here.size, home, here.used, here.size);
    return here.memory.get() + from;
  }
  RoundedRecord rounded_record(Kind kind) const {
    return {dim_of(kind, problem.shape()), kind == Kind::O ? 2 : 0};
  }

  template <class Message>
  void depart(typename T::Request request, const Message& step, std::byte* in_staging) {
    const bool counts = step.peer != program.rank;
    if (counts && under_way++ == 0) since = now();
    flights.push_back({std::move(request), slot(step.slot).home, step.slot,
                       std::is_same_v<Message, Recv>, counts, now_at, in_staging});
  }

  void land(std::size_t i) {
    const Flight flight = std::move(flights[i]);
    flights.erase(flights.begin() + static_cast<std::ptrdiff_t>(i));
    if (flight.counts && --under_way == 0) on_the_wire += now() - since;
    if (!flight.writes || flight.staged == nullptr) return;
    const double from = now();
    const auto& step = std::get<Recv>(program.steps[static_cast<std::size_t>(flight.step)]);
    widen(flight.staged, rounded_record(step.block.kind),
          strips<comm::Strip>(step.slot, step.block, own_memory(step.slot)),
          [this] { transport.poll(); });
    widening += now() - from;
  }

  /// Lets messages move; called between tiles by the thread that runs the engine.
  void poll() {
    if (flights.empty() || now() - polled < options.poll_every) return;
    // Testing one message that is not done moves all; flights take turns at being that one.
    for (std::size_t n = flights.size(); n > 0; --n) {
      if (turn >= flights.size()) turn = 0;
      if (!test(flights[turn])) {
        ++turn;
        break;
      }
      land(turn);
    }
    polled = now();
  }

  bool test(Flight& flight) {
    return named(flight.step, [&] { return flight.request.test(); });
  }

  std::string place(int step) const {
    return "step " + std::to_string(step) + " (" +
           text(program, program.steps[static_cast<std::size_t>(step)]) + "): ";
  }

  /// Does what may fail on behalf of `step`, and has the failure name it.
  template <class F>
  auto named(int step, const F& f) {
    try {
      return f();
    } catch (const comm::Timeout& e) {
      throw StepFailure(place(step) + e.what(), true);
    } catch (const std::exception& e) {
      throw StepFailure(place(step) + e.what(), false);
    }
  }

  /// Waits for every flight that `conflicts`.
  template <class Conflicts>
  void settle(const Conflicts& conflicts) {
    const double from = now();
    const double widened = widening;
    bool waited = false;
    for (std::size_t i = 0; i < flights.size();) {
      if (!conflicts(flights[i])) {
        ++i;
        continue;
      }
      waited = true;
      named(flights[i].step, [&] { flights[i].request.wait(); });
      land(i);
    }
    if (waited) {
      times.compute += widening - widened;
      const double seconds = now() - from - (widening - widened);
      times.wait += seconds;
      times.steps[static_cast<std::size_t>(now_at)].wait += seconds;
    }
  }

  void before_reading(SlotId s) {
    settle([&](const Flight& f) { return f.home == slot(s).home && f.writes; });
  }
  void before_writing(SlotId s) {
    settle([&](const Flight& f) { return f.home == slot(s).home; });
  }

  // ---- steps -----------------------------------------------------------------------------------

  void take(const Send& step) {
    if (!parts.messages) return;
    before_reading(step.slot);
    auto pieces = strips<comm::ConstStrip>(step.slot, step.block, memory(step.slot));
    std::byte* rounded = stage(step);
    if (rounded != nullptr) {
      const double from = now();
      round(pieces, rounded_record(step.block.kind), rounded, [this] { transport.poll(); });
      pieces = {{rounded, 1, wire_bytes(step.block, problem), 0}};
      times.compute += now() - from;
    }
    if (step.peer != program.rank) {
      times.bytes_sent += comm::total(pieces);
      ++times.messages;
    }
    depart(transport.send(pieces, step.peer), step, rounded);
  }

  void take(const Recv& step) {
    if (!parts.messages) return;
    // Pieces of one slot arrive side by side; whatever else touches the home must be over.
    settle([&](const Flight& f) {
      return f.home == slot(step.slot).home && !(f.writes && f.slot == step.slot);
    });
    auto pieces = strips<comm::Strip>(step.slot, step.block, own_memory(step.slot));
    if (options.checked) {
      for (const comm::Strip& p : pieces) {
        for (Index i = 0; i < p.count; ++i) {  // all bits set: a NaN of either width
          std::memset(p.data + i * p.stride, 0xff, static_cast<std::size_t>(p.length));
        }
      }
    }
    std::byte* rounded = stage(step);
    if (rounded != nullptr) pieces = {{rounded, 1, wire_bytes(step.block, problem), 0}};
    depart(transport.recv(pieces, step.peer), step, rounded);
  }

  template <class E>
  View<E> view(SlotId s, E* data) const {
    const Block& block = slot(s).block;
    return {data, block.row_count(), block.head_count(), dim_of(block.kind, problem.shape())};
  }
  template <class E>
  View<const E> read(SlotId s) const {
    View<const E> dense = view(s, reinterpret_cast<const E*>(memory(s)));
    dense.stride = strides[static_cast<std::size_t>(slot(s).home)] / static_cast<Index>(sizeof(E));
    return dense;
  }
  template <class E>
  View<E> write(SlotId s) {
    return view(s, reinterpret_cast<E*>(own_memory(s)));
  }

  /// Some neighbouring query heads that `step` serves and what they read: among all, and where they
  /// lie in its slots of queries, keys and values.
  struct Served {
    Where where;
    Range q, k, v;
  };
  template <class S>
  std::vector<Served> served(const S& step) const {
    const Block& q = slot(step.q).block;
    const Block& k = slot(step.k).block;
    const Block& v = slot(step.v).block;
    const Shape& shape = problem.shape();
    std::vector<Served> all;
    for (const Range heads : heads_served(program, step, shape)) {
      const Range key_heads = shape.key_heads_of(heads);
      const Range value_heads = shape.value_heads_of(heads);
      all.push_back({{shape, heads, key_heads, value_heads, problem.queries().positions(q.rows),
                      problem.keys().positions(k.rows)},
                     local(q.heads, heads),
                     local(k.heads, key_heads),
                     local(v.heads, value_heads)});
    }
    return all;
  }
  Work work() {
    std::function<void()> between_tiles;
    if (parts.polling) between_tiles = [this] { poll(); };
    return {options.score, options.threads, between_tiles, options.isa, &workspace};
  }

  template <class E>
  void attend_as(const Attend& step) {
    const Index rows = slot(step.q).block.row_count();
    const Index at_once =
        options.rows_at_once > 0 ? options.rows_at_once : std::max<Index>(rows, 1);
    for (const Served& s : served(step)) {
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
    for (const Served& s : served(step)) {
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
  /// Whether what is added up is float; else double.
  bool narrow() const { return problem.type() != Type::f8; }

  void take(const Attend& step) {
    before_reading(step.q);
    before_reading(step.k);
    before_reading(step.v);
    before_writing(step.out);
    if (!parts.kernels) return;
    const double from = now();
    attend_any(step);
    times.compute += now() - from;
  }

  void take(const AttendBackward& step) {
    for (const SlotId s : {step.q, step.k, step.v, step.d_o, step.stats}) before_reading(s);
    for (const SlotId s : {step.dq, step.dk, step.dv}) before_writing(s);
    if (!parts.kernels) return;
    const double from = now();
    attend_any(step);
    times.compute += now() - from;
  }

  /// Calls f with what `from` holds, part by part, each dense, and where the same rows and heads
  /// lie in `into`, dense too.
  template <class E, class F>
  void each_part(SlotId from, SlotId into, const F& f) {
    const Block& block = slot(from).block;
    for (const Range heads : block.heads) {
      const View<const E> source = read<E>(from).only(local(block.heads, heads));
      std::vector<comm::Strip> pieces;
      strips(into, heads, block.rows, own_memory(into), pieces);
      Index row = 0;
      for (const comm::Strip& s : pieces) {
        // Where both have no other heads, rows lie end to end.
        const Index rows = s.length == s.stride && source.dense() ? s.count : 1;
        for (Index i = 0; i < s.count; i += rows, row += rows) {
          f(View<const E>{source.at(row, 0), rows, source.heads, source.dim},
            reinterpret_cast<E*>(s.data + i * s.stride));
        }
      }
    }
  }

  void take(const Add& step) {
    before_reading(step.from);
    before_writing(step.into);
    if (!parts.kernels) return;
    const double from = now();
    const auto as = [&]<class E>(E) {
      each_part<E>(step.from, step.into, [](View<const E> source, E* into) {
        add_numbers(source.data, into, source.size());
      });
    };
    narrow() ? as(float{}) : as(double{});
    times.compute += now() - from;
  }

  void take(const Clear& step) {
    before_writing(step.slot);
    if (!parts.kernels) return;
    const double from = now();
    start_over(step.slot);
    times.compute += now() - from;
  }

  /// Makes a sum one over no pair.
  void start_over(SlotId s) {
    if (slot(s).block.kind != Kind::O) {
      std::memset(own_memory(s), 0, static_cast<std::size_t>(bytes(s)));
    } else if (narrow()) {
      clear(write<float>(s));
    } else {
      clear(write<double>(s));
    }
  }

  void take(const Merge& step) {
    before_reading(step.from);
    before_writing(step.into);
    if (!parts.kernels) return;
    const double from = now();
    const auto as = [&]<class E>(E) {
      each_part<E>(step.from, step.into, [](View<const E> source, E* into) {
        merge(source.data, into, source.rows * source.heads, source.dim);
      });
    };
    narrow() ? as(float{}) : as(double{});
    times.compute += now() - from;
  }

  void take(const Reduce& step) {
    if (!parts.messages) return;
    before_writing(step.slot);
    const Kind kind = slot(step.slot).block.kind;
    const Index record = record_bytes(kind, problem.shape(), problem.type());
    const Index records = bytes(step.slot) / record;
    T& group = axes.empty() ? transport : axes[static_cast<std::size_t>(step.axis)];
    const double from = now();
    if (group.size() > 1 && records > 0) {
      const comm::Operation rule = kind == Kind::O
                                       ? (narrow() ? comm::operation<merge_records<float>>()
                                                   : comm::operation<merge_records<double>>())
                                       : (narrow() ? comm::operation<add_records<float>>()
                                                   : comm::operation<add_records<double>>());
      named(now_at, [&] {
        group.all_reduce({own_memory(step.slot), static_cast<std::size_t>(bytes(step.slot))},
                         record, rule);
      });
      times.bytes_sent += reduce_bytes(records, record, group.size(), group.rank());
      ++times.messages;
    }
    const double seconds = now() - from;
    times.wait += seconds;
    times.steps[static_cast<std::size_t>(now_at)].wait += seconds;
  }

  // ---- pseudo-keys -----------------------------------------------------------------------------

  /// Has a failure name what it hit.
  template <class F>
  void compensating(const F& f) {
    const double from = now();
    try {
      f();
    } catch (const comm::Timeout& e) {
      throw StepFailure(std::string("pseudo-keys: ") + e.what(), true);
    } catch (const std::exception& e) {
      throw StepFailure(std::string("pseudo-keys: ") + e.what(), false);
    }
    times.wait += now() - from;
  }

  /// Before the first step: sums of what is dropped are under way to all ranks.
  void sum_dropped() {
    as_typed([&]<class E>(E) {
      const double from = now();
      if (parts.kernels) {
        compensation->sum(read<E>(program.input(Kind::K)), read<E>(program.input(Kind::V)),
                          options.threads);
      }
      times.compute += now() - from;
      if (!parts.messages) return;
      compensating([&] {
        const auto sent = compensation->template start<E>(transport);
        times.bytes_sent += sent.bytes;
        times.messages += sent.messages;
      });
    });
  }

  /// After the last step: what the rank delivers has seen the pseudo-keys too.
  void merge_pseudo_keys() {
    if (parts.messages) compensating([&] { compensation->wait(); });
    if (!parts.kernels) return;
    const double from = now();
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
    times.compute += now() - from;
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
      all = all.only(local(whole.heads, result.block.heads.front()));
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
      CHECK(memory(s) != nullptr || bytes(s) == 0, "input slot", s, "is neither filled nor bound");
    }
    times = {};
    times.steps.resize(program.steps.size());
    on_the_wire = 0;
    polled = 0;
    start = Clock::now();
    std::vector<bool> seen(homes.size(), false);
    for (const Slot& s : program.slots) {  // the first slot of each home, as the rehearsal has it
      const auto home = static_cast<std::size_t>(s.home);
      if (parts.kernels && is_sum(s.block.kind) && !seen[home]) {
        start_over(static_cast<SlotId>(&s - program.slots.data()));
      }
      seen[home] = true;
    }
    if (compensation) sum_dropped();
    for (std::size_t i = 0; i < program.steps.size(); ++i) {
      now_at = static_cast<int>(i);
      if (options.progress) options.progress(i);
      times.steps[i].begin = now();
      std::visit([this](const auto& step) { this->take(step); }, program.steps[i]);
      times.steps[i].end = now();
    }
    if (!program.steps.empty()) {
      settle([](const Flight&) { return true; });
      times.steps.back().end = now();
    }
    if (compensation) merge_pseudo_keys();
    times.seconds = now();
    times.hidden = std::max(0.0, on_the_wire - times.wait);
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
  const auto home = static_cast<std::size_t>(state_->slot(slot).home);
  CHECK(state_->is_input(static_cast<int>(home)), slot);
  const Index bytes = state_->bytes(slot);
  if (state_->homes[home] == nullptr) state_->homes[home] = allocate(bytes);
  state_->bound[home] = nullptr;
  state_->strides[home] = 0;
  return {state_->homes[home].get(), static_cast<std::size_t>(bytes)};
}

template <comm::Transport T>
void Engine<T>::bind(SlotId slot, std::span<const std::byte> memory) {
  const int home = state_->slot(slot).home;
  CHECK(state_->is_input(home), slot);
  CHECK(static_cast<Index>(memory.size()) == state_->bytes(slot), memory.size(),
        state_->bytes(slot));
  state_->bound[static_cast<std::size_t>(home)] = memory.data();
  state_->strides[static_cast<std::size_t>(home)] = 0;
}

template <comm::Transport T>
void Engine<T>::bind(SlotId slot, const std::byte* memory, Index stride) {
  const int home = state_->slot(slot).home;
  CHECK(state_->is_input(home), slot);
  for (const Step& step : state_->program.steps) {
    const auto* send = std::get_if<Send>(&step);
    CHECK(send == nullptr || send->slot != slot, slot);
  }
  state_->bound[static_cast<std::size_t>(home)] = memory;
  state_->strides[static_cast<std::size_t>(home)] = stride;
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
  return {state_->memory(slot), static_cast<std::size_t>(state_->bytes(slot))};
}

template <comm::Transport T>
template <class E>
void Engine<T>::result(std::span<E> o, std::span<E> lse) const {
  const auto d_v = static_cast<std::size_t>(state_->problem.shape().d_v);
  std::size_t done = 0;  // (row, head) records
  state_->template each_result<E>(Kind::O, [&](View<const E> part) {
    const auto records = static_cast<std::size_t>(part.rows * part.heads);
    finish(part, o.subspan(done * d_v, records * d_v), lse.subspan(done, records));
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
    std::copy_n(part.data, part.size(),
                out.subspan(done, static_cast<std::size_t>(part.size())).data());
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
DATTN_ENGINE(comm::Loopback::Endpoint)

}  // namespace dattn
