#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "bench/subject.hpp"

namespace dattn {

/// One line of bench_sparse: what a mask costs beside the dense one, in one process or on ranks.
struct SparseRow {
  Cell cell;
  std::string strategy;   ///< on ranks; else empty
  std::string partition;  ///< that the planner chose for it; not of decode
  std::string refused;    ///< why the strategy cannot do it; the figures below are of rows without
  std::string dense;      ///< the dense mask
  Index dense_rows = 0;
  double density = 0;
  double seconds = 0;
  double dense_seconds = 0;  ///< of all rows
  double speedup = 0;
  int repeats = 0;
  int ranks = 1;
  std::optional<Index> bytes, dense_bytes;  ///< that all ranks send
  // On ranks alone:
  std::optional<Index> cached, dense_cached;  ///< bytes of K and V that all ranks keep; of decode
  /// Allowed triples, and time in kernels, of the rank that has most over the mean of the ranks.
  std::optional<double> area_balance, kernel_balance;

  double of_ideal() const { return speedup * density; }
};

nlohmann::json to_json(const SparseRow& row);
std::string to_text(const SparseRow& row);

/// The mask that a sparse one is held to: causal, or full where some query sees a key behind it.
std::string dense_mask(const Shape& shape, const std::string& words);
/// Allowed (head, query, key) triples of `queries`.
double area_of(const Shape& shape, const Mask& mask, Range queries);
/// The same of all queries.
double area_of(const Shape& shape, const std::string& words);

constexpr double kLeastSeconds = 0.02;  ///< shorter work runs several times a repeat

}  // namespace dattn
