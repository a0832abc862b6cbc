#include "parallel/homes.hpp"

#include <algorithm>

#include "kernels/check.hpp"

namespace dattn {

Homes::Homes(const Problem& problem, const Program& program, Allocate allocate)
    : problem_(problem), program_(program), allocate_(std::move(allocate)) {
  const auto bytes = home_bytes(program, problem);
  own_.resize(bytes.size());
  bound_.resize(bytes.size(), nullptr);
  strides_.resize(bytes.size(), 0);
  borrowed_.resize(bytes.size(), false);
  for (int home = 0; home < count(); ++home) {
    const auto h = static_cast<std::size_t>(home);
    if (!is_input(home)) own_[h] = allocate_(home, bytes[h]);
  }
}

bool Homes::is_input(int home) const {
  return std::any_of(program_.inputs.begin(), program_.inputs.end(),
                     [&](SlotId s) { return slot(s).home == home; });
}

const std::byte* Homes::memory(SlotId s) const {
  return bound_[at(s)] != nullptr ? bound_[at(s)] : own_[at(s)].get();
}

std::span<std::byte> Homes::input(SlotId s) {
  CHECK(is_input(slot(s).home), s);
  if (own_[at(s)] == nullptr) own_[at(s)] = allocate_(slot(s).home, bytes(s));
  bound_[at(s)] = nullptr;
  strides_[at(s)] = 0;
  return {own_memory(s), static_cast<std::size_t>(bytes(s))};
}

void Homes::bind(SlotId s, const std::byte* memory, Index stride) {
  CHECK(is_input(slot(s).home), s);
  bound_[at(s)] = memory;
  strides_[at(s)] = stride;
}

void Homes::borrow(SlotId s, const std::byte* memory, Index stride) {
  CHECK(!is_input(slot(s).home), s);
  bound_[at(s)] = memory;
  strides_[at(s)] = stride;
  borrowed_[at(s)] = true;
}

void Homes::give_back(int home) {
  const auto h = static_cast<std::size_t>(home);
  if (!borrowed_[h]) return;
  bound_[h] = nullptr;
  strides_[h] = 0;
  borrowed_[h] = false;
}

Index Homes::row_bytes(SlotId s) const {
  const Block& block = slot(s).block;
  return record_bytes(block.kind, problem_.shape(), problem_.type()) * block.head_count();
}

comm::ConstStrips Homes::readable(SlotId s, const Block& part) const {
  const Index stride = strides_[at(s)];
  return strips<comm::ConstStrip>(s, part, memory(s), stride != 0 ? stride : row_bytes(s));
}

comm::Strips Homes::writable(SlotId s, const Block& part) {
  return strips<comm::Strip>(s, part, own_memory(s), row_bytes(s));
}

template <class Piece, class Byte>
std::vector<Piece> Homes::strips(SlotId s, const Block& part, Byte* base, Index row) const {
  const Block& whole = slot(s).block;
  const Index head = record_bytes(whole.kind, problem_.shape(), problem_.type());
  std::vector<Piece> out;
  for (const Range heads : part.heads) {
    const Index first_head = place_among(whole.heads, heads).begin;
    for (Range left : part.rows) {
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
  return out;
}

Range place_among(const Ranges& heads, Range part) {
  const auto first = place_of(heads, part.begin);
  CHECK(first.has_value(), part.begin);
  return {*first, *first + part.size()};
}

}  // namespace dattn
