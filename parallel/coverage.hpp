#pragma once

#include <functional>

#include "parallel/rehearse.hpp"

namespace dattn {

/// One Attend or AttendBackward as it bears on results: who did it, and for which query heads which
/// queries met which keys.
struct Contribution {
  int rank = 0;
  int step = 0;
  Ranges heads;
  const Ranges* query_rows = nullptr;
  const Ranges* key_rows = nullptr;
  bool used = false;  ///< it reached some rank's result
};

/// Part of a sum: these rows of these heads of its tensor hold the contribution with this number.
struct Cell {
  Range heads;
  Range rows;
  int contribution = 0;
};

/// Some rows of some heads.
struct Rect {
  Range heads;
  Range rows;
};

void append_rects(std::vector<Rect>& rects, const Block& block);

/// A message: what `source` holds of `block` replaces what `target` holds of it.
void move_cells(std::vector<Cell> source, const Block& block, std::vector<Cell>& target);

/// How `rects` fail to lie side by side on `target`, in words; with `whole`, also how they leave a
/// part of it open. Nothing if they do not fail.
std::optional<std::string> misfit(std::vector<Rect> rects, const Block& target, bool whole);

/// Checks what all ranks deliver: each result of the pass whole, and in every row and head of it
/// every allowed pair once (of a query row every key that it sees, of a key row every query that
/// sees it with any head that reads it). `cells(rank, slot)` is what a slot holds in the end. Marks
/// the contributions that it finds used.
std::optional<Fault> check_results(
    const Problem& problem, const Plan& plan,
    const std::function<const std::vector<Cell>&(int rank, SlotId)>& cells,
    std::vector<Contribution>& contributions);

}  // namespace dattn
