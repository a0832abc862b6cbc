#pragma once

#include <map>

#include "kernels/range.hpp"

namespace dattn {

/// After how many members of the run their residues modulo `step` come again.
Index period(const Run& run, Index step);

/// The members of each residue modulo `step` that there is; and of one of them.
std::map<Index, Runs> by_residue(const Runs& runs, Index step);
Runs of_residue(const Runs& runs, Index step, Index residue);

/// Whether queries and keys of a mask with this step (Mask::step) are taken residue by residue: not
/// where there is no step, or where the parts would be too small to be worth a call each. Plans
/// price what kernels do, so both ask here.
bool by_residues(const Runs& queries, const Runs& keys, Index step);

}  // namespace dattn
