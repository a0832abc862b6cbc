#pragma once

// Blocks whose masks have a step (Mask::step): the folder's own, not for others to include.

#include "kernels/attend.hpp"

namespace dattn {

/// Every `step`-th row of a block.
struct EveryRow {
  Index first;
  Index step;
  Index count;

  template <class T>
  View<T> of(View<T> view) const {
    if (view.data == nullptr) return view;
    return {view.at(first, 0), count, view.heads, view.dim, view.row_stride() * step};
  }
};

/// Queries and keys of a block that see each other only.
struct Residue {
  EveryRow queries;
  EveryRow keys;
  Where where;  ///< of them
};

/// The block in parts within which live pieces are whole spans: queries and keys whose positions
/// are the same modulo Mask::step. Nothing where the mask has no step, or where the parts would be
/// too small to be worth a call each.
std::vector<Residue> residues_of(const Where& where, const Mask& mask);

/// Whether heads of the block have different steps, or masks apart() of their own. Together they
/// have fewer residues than some of them by themselves, or none.
bool steps_differ(const Where& where, const Mask& mask);

/// The masks under which the block is taken one after the other (Mask::apart), where that lets the
/// last one be taken residue by residue; else none. @pre steps do not differ
std::vector<MaskPtr> apart(const Where& where, const Mask& mask);

}  // namespace dattn
