#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "parallel/plan.hpp"

namespace dattn {

/// A way to split attention over ranks: a pure function from (Problem, rank) to a Program.
struct Strategy {
  std::string_view name;
  std::string_view summary;    ///< one sentence
  std::string_view requires_;  ///< what it needs, one clause
  /// The axes of its mesh, outermost first; one axis where it does not care.
  std::string_view axes;
  /// Of the forward pass and of the backward pass. Pure. @pre refuses(problem) is empty
  Program (*program)(const Problem& problem, int rank);
  Program (*backward)(const Problem& problem, int rank);
  /// Why it cannot run this, with the fix, if it cannot.
  std::optional<std::string> (*refuses)(const Problem& problem);
  /// The mesh for this many ranks where the user names none.
  Mesh (*mesh)(int ranks, const Shape& shape);
  bool relays = false;  ///< whether `auto` weighs Problem::relays(), which changes its Programs
};

/// The same where ranks share hosts. Ranks of a host stand side by side. Where all hosts have as
/// many of them, the inner of two axes stays inside a host, as long as there are as many heads as
/// ranks on an axis of heads; where they have not, the mesh is the strategy's own.
Mesh mesh_across(const Strategy& strategy, const Hosts& hosts, int ranks, const Shape& shape);
/// The mesh with its ranks in that order.
Mesh side_by_side(Mesh mesh, const Hosts& hosts);

/// One rank's Program of a pass. @pre strategy.refuses(problem) is empty
Program make_program(const Strategy& strategy, const Problem& problem, int rank, Pass pass);

/// The table of strategies. A new one is one file in strategies/ and one line here.
std::span<const Strategy> strategies();

/// The strategy of this name, or null.
const Strategy* find_strategy(std::string_view name);

/// All ranks' Programs. @pre as make_program
Plan make_plan(const Strategy& strategy, const Problem& problem, Pass pass = Pass::forward);

/// For strategies that take any number of ranks on one axis.
std::optional<std::string> refuses_other_than_a_line(const Problem& problem);
Mesh line_mesh(int ranks, const Shape& shape);

}  // namespace dattn
