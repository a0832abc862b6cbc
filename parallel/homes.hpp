#pragma once

#include <functional>
#include <span>
#include <vector>

#include "comm/memory.hpp"
#include "comm/strip.hpp"
#include "kernels/view.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// The memory of one Program's slots: where each lies, and whose memory that is. A home is the
/// rank's own memory, of inputs perhaps the caller's, or borrowed: another rank's, for this run.
class Homes {
 public:
  /// Memory for so many bytes of a home.
  using Allocate = std::function<comm::Memory(int home, Index bytes)>;

  /// Allocates every home but those of inputs, which input() and bind() give theirs; touches none,
  /// so pages come where this rank writes. `problem` and `program` must outlive this.
  Homes(const Problem& problem, const Program& program, Allocate allocate);

  int count() const { return static_cast<int>(own_.size()); }
  bool is_input(int home) const;
  const Slot& slot(SlotId s) const { return program_.slots[static_cast<std::size_t>(s)]; }
  Index bytes(SlotId s) const { return bytes_of(slot(s).block, problem_.shape(), problem_.type()); }

  /// What the slot holds; null for an input that has no memory yet.
  const std::byte* memory(SlotId s) const;
  /// The rank's own memory of the slot's home, to be written.
  std::byte* own_memory(SlotId s) { return own_[at(s)].get(); }

  /// Own memory for an input.
  std::span<std::byte> input(SlotId s);
  /// The caller's memory for an input, its rows `stride` bytes apart; 0: dense.
  void bind(SlotId s, const std::byte* memory, Index stride);

  /// Has the slot lie at `memory` of another rank instead of in its home, rows `stride` bytes
  /// apart, until something else comes to its home.
  void borrow(SlotId s, const std::byte* memory, Index stride);
  bool is_borrowed(SlotId s) const { return borrowed_[at(s)]; }
  void give_back(int home);

  /// The slot, to be read by kernels: [rows, heads, numbers], E the type of its numbers.
  template <class E>
  View<const E> read(SlotId s) const {
    View<const E> dense = view(s, reinterpret_cast<const E*>(memory(s)));
    dense.stride = strides_[at(s)] / static_cast<Index>(sizeof(E));
    return dense;
  }
  /// The slot, to be written; dense.
  template <class E>
  View<E> write(SlotId s) {
    return view(s, reinterpret_cast<E*>(own_memory(s)));
  }

  /// Where the heads and rows of `part` lie in the slot: one Range of heads after the other, so
  /// that both ends of a message have the same order however their rows are cut.
  comm::ConstStrips readable(SlotId s, const Block& part) const;
  comm::Strips writable(SlotId s, const Block& part);
  /// Bytes of a row of the slot where rows are dense.
  Index row_bytes(SlotId s) const;

 private:
  std::size_t at(SlotId s) const { return static_cast<std::size_t>(slot(s).home); }
  template <class E>
  View<E> view(SlotId s, E* data) const {
    const Block& block = slot(s).block;
    return {data, block.row_count(), block.head_count(), dim_of(block.kind, problem_.shape())};
  }
  template <class Piece, class Byte>
  std::vector<Piece> strips(SlotId s, const Block& part, Byte* base, Index row) const;

  const Problem& problem_;
  const Program& program_;
  Allocate allocate_;
  std::vector<comm::Memory> own_;        ///< by home
  std::vector<const std::byte*> bound_;  ///< by home: memory of somebody else, or null
  std::vector<Index> strides_;           ///< by home: bytes from row to row, 0 where dense
  std::vector<bool> borrowed_;           ///< by home: what is bound is another rank's
};

/// Where `part` lies among these heads. @pre they have all of it
Range place_among(const Ranges& heads, Range part);

}  // namespace dattn
