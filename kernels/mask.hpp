#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/shape.hpp"

namespace dattn {

/// What Mask::alike says where all queries to come see the same.
inline constexpr Index kAllAlike = std::numeric_limits<Index>::max();

/// How much of a tile (a rectangle of queries x keys) a mask allows. Of an empty tile: None.
enum class Cover { None, Some, All };

class Mask;
using MaskPtr = std::shared_ptr<const Mask>;

/// Which (head, query, key) triples are allowed. Queries and keys are positions; a query's may be
/// negative (more queries than keys), a key's never.
class Mask {
 public:
  virtual ~Mask() = default;

  /// The definition; everything else must agree with it.
  virtual bool allows(Index head, Index query, Index key) const = 0;

  /// Appends the allowed keys of one query inside `keys`: ascending, disjoint, not touching.
  /// Derived by asking `allows` for each key; masks override it where they can say it at once.
  virtual void spans(Index head, Index query, Range keys, std::vector<Range>& out) const;

  /// The same of the members of a run of keys, counted from its first. Derived from `spans` of its
  /// bounds; masks override it where a stride makes one span of many.
  virtual void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const;

  /// Exact, for any tile. Derived from `spans`, row by row until the answer is known.
  virtual Cover cover(Index head, Range queries, Range keys) const;

  /// Allowed pairs of a tile, of masks that can say it at once; nothing: they are counted.
  virtual std::optional<Index> pairs(Index head, Range queries, Range keys) const;

  /// Of the queries from this one on, how many see the same of `keys`: 1 at least, and it may say
  /// less than there are. What counts rows asks so once for many.
  virtual Index alike(Index head, Index query, Range keys) const;

  /// Of this head, a number that divides key - query of every allowed pair: what sees each other
  /// has the same residue, and kernels take residues one by one. 1 where there is none.
  virtual Index step(Index head) const;

  /// Masks that together allow what this one allows of the head, no pair twice, where kernels had
  /// better take one after the other: the last one's step is lost in the whole. Empty: it is one.
  virtual std::vector<MaskPtr> apart(Index head) const;

  /// Heads with equal variants see the same pairs.
  virtual Index variant(Index head) const;
  /// How many heads may differ; 1: all heads see the same.
  virtual Index heads() const;

  /// The words from which parse_mask makes this mask again.
  virtual std::string spec() const = 0;
};

/// An array of whole numbers in a file that a mask names.
struct NumberFile {
  std::vector<Index> extents;
  std::function<std::vector<Index>()> read;  ///< all numbers, in C order; called once at most
};
/// Opens such a file; throws what its caller wants to catch.
using OpenNumbers = std::function<NumberFile(const std::string& file)>;

/// The numbers that a mask is made of, in files or arrays, are not what they should be; what()
/// names them.
struct BadMaskNumbers : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// Of queries and keys.
struct Lengths {
  Index queries = 0;
  Index keys = 0;
};

/// One primitive mask as the user names it.
struct MaskKind {
  std::string_view name;
  std::string_view form;       ///< e.g. "window:L,R"
  std::string_view summary;    ///< one sentence
  std::string_view requires_;  ///< what it needs, one clause
  /// Makes the mask from the text behind the colon. Throws std::invalid_argument with the reason.
  MaskPtr (*make)(std::string_view arguments, const Shape& shape, const OpenNumbers& open);
  /// What the arguments say of the lengths, where they say it all; likewise. Null: they do not.
  Lengths (*lengths)(std::string_view arguments) = nullptr;
};

/// The table of masks. A new mask is one file in masks/ and one line here.
std::span<const MaskKind> mask_kinds();

/// Makes a mask from words: `a+b` is a and b, `a/b` is a or b ('+' binds tighter, parentheses
/// group), `a@0-3;b@4-7` gives head ranges their own masks. What stands in double quotes is taken
/// as it is, "" for one quote. `open` is for masks that name files. Throws std::invalid_argument,
/// BadMaskNumbers where a file is wrong, and what `open` throws.
MaskPtr parse_mask(std::string_view spec, const Shape& shape, const OpenNumbers& open = {});

/// The lengths that the words imply: those of one primitive that says them; nothing otherwise.
/// Throws as parse_mask.
std::optional<Lengths> implied_lengths(std::string_view spec);

/// @pre neither is a table (per_head)
MaskPtr both(MaskPtr a, MaskPtr b);
MaskPtr either(MaskPtr a, MaskPtr b);
/// A table from head to mask.
/// @pre the Ranges cover 0..heads in order, without gap or overlap; no mask is itself a table
MaskPtr per_head(std::vector<std::pair<Range, MaskPtr>> table);

/// Splits "n1,n2,..." into counts >= 0. Throws std::invalid_argument naming `form`.
std::vector<Index> parse_counts(std::string_view text, std::string_view form);

}  // namespace dattn
