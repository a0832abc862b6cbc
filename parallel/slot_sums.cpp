#include "parallel/slot_sums.hpp"

#include <cstring>
#include <variant>

#include "kernels/in_parts.hpp"
#include "kernels/partial.hpp"
#include "parallel/sums.hpp"

namespace dattn {

SlotSums::SlotSums(const Problem& problem, const Program& program, Homes& homes,
                   const EngineOptions& options)
    : problem_(problem),
      homes_(homes),
      threads_(options.threads),
      checked_(options.checked),
      reduced_(program.slots.size(), false) {
  for (const Step& step : program.steps) {
    if (const auto* reduce = std::get_if<Reduce>(&step)) {
      reduced_[static_cast<std::size_t>(reduce->slot)] = true;
    }
  }
}

/// Calls f with a number of the type in which the Problem sums up.
template <class F>
void SlotSums::as_typed(const F& f) const {
  problem_.type() == Type::f8 ? f(double{}) : f(float{});
}

/// Calls f with what `from` holds, part by part, each dense, and where the same rows and heads lie
/// in `into`, dense too.
template <class E, class F>
void SlotSums::each_part(SlotId from, SlotId into, const F& f) {
  const Block& block = homes_.slot(from).block;
  for (const Range heads : block.heads) {
    const View<const E> source = homes_.read<E>(from).only(place_among(block.heads, heads));
    Index row = 0;
    for (const comm::Strip& s : homes_.writable(into, {block.kind, heads, block.rows})) {
      // Where both have no other heads, rows lie end to end.
      const bool dense = s.length == s.stride && source.dense();
      in_parts(threads_, s.count, s.length, [&](Range some) {
        const Index rows = dense ? some.size() : 1;
        for (Index i = some.begin; i < some.end; i += rows) {
          f(View<const E>{source.at(row + i, 0), rows, source.heads, source.dim},
            reinterpret_cast<E*>(s.data + i * s.stride));
        }
      });
      row += s.count;
    }
  }
}

void SlotSums::start_over(SlotId slot) {
  std::byte* memory = homes_.own_memory(slot);
  const auto fill = [&](int byte) {
    in_parts(threads_, homes_.bytes(slot), 1, [&](Range some) {
      std::memset(memory + some.begin, byte, static_cast<std::size_t>(some.size()));
    });
  };
  if (homes_.slot(slot).block.kind != Kind::O) return fill(0);
  const bool whole = reduced_[static_cast<std::size_t>(slot)];
  if (checked_) fill(0xff);  // a NaN of either width
  as_typed([&]<class E>(E) {
    whole ? clear(homes_.write<E>(slot), threads_) : start(homes_.write<E>(slot), threads_);
  });
}

void SlotSums::add(SlotId from, SlotId into) {
  as_typed([&]<class E>(E) {
    each_part<E>(from, into,
                 [](View<const E> source, E* to) { add_numbers(source.data, to, source.size()); });
  });
}

void SlotSums::merge(SlotId from, SlotId into) {
  as_typed([&]<class E>(E) {
    each_part<E>(from, into, [](View<const E> source, E* to) {
      dattn::merge(source.data, to, source.rows * source.heads, source.dim);
    });
  });
}

void SlotSums::add_sinks(const Result& result, std::span<const float> sinks) {
  const Block& whole = homes_.slot(result.slot).block;
  as_typed([&]<class E>(E) {
    for (const Range heads : result.block.heads) {
      const View<E> all = homes_.write<E>(result.slot).only(place_among(whole.heads, heads));
      const auto logits = sinks.subspan(static_cast<std::size_t>(heads.begin),
                                        static_cast<std::size_t>(heads.size()));
      for (const Range rows : result.block.rows) {
        const Index first = *place_of(whole.rows, rows.begin);
        in_parts(threads_, rows.size(), homes_.row_bytes(result.slot), [&](Range some) {
          add_sink(all.part({first + some.begin, first + some.end}), logits);
        });
      }
    }
  });
}

}  // namespace dattn
