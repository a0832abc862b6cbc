#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "bench/measure.hpp"
#include "kernels/shape.hpp"

namespace dattn {

/// One repeat of one strategy and pass, over all its ranks.
struct Sample {
  double seconds = 0;  ///< of the slowest rank
  double compute = 0;  ///< in kernels, mean of the ranks
  double exposed = 0;  ///< waiting for messages, likewise
  double hidden = 0;   ///< messages under way while the rank worked, likewise
  double bytes = 0;    ///< sent by the rank that sends most
  double messages = 0;
  double ideal_busy = 0;  ///< seconds, in the same repeat; 0: not measured
  double ideal_slowest = 0;
  double ideal_alone = 0;
};

/// One line of the report: how one strategy did in one pass on some ranks, or why it did not.
struct Row {
  std::string strategy, partition, mesh, pass;
  int ranks = 1;
  int threads = 1;
  Shape shape;
  std::string mask;
  std::string refused;  ///< why; the figures below are of rows without

  int prefetch = 0;  ///< stages ahead, as planned
  double seconds = 0, seconds_min = 0, seconds_max = 0;
  double ideal_busy = 0, ideal_slowest = 0, ideal_alone = 0;           ///< seconds; 0: not measured
  double of_ideal_busy = 0, of_ideal_slowest = 0, of_ideal_alone = 0;  ///< 1: as good
  double compute = 0, exposed = 0, hidden = 0;  ///< of the repeat whose seconds are the median
  double bytes = 0, messages = 0;
  double forecast = 0;
  double flops = 0;    ///< of all allowed pairs
  double speedup = 0;  ///< rate over the best rate of one rank; 0: not measured
  Index memory = 0;    ///< of the plan, of the rank that needs most
  int repeats = 0;

  double gflops() const { return flops / seconds / 1e9; }
  /// The medians of `samples` into the measured figures. @pre there is one
  void measured(const std::vector<Sample>& samples);
};

/// The columns of JSON and CSV, in their order; null where there is no figure.
nlohmann::ordered_json fields(const Row& row);
/// A header line and a line a row; the rows have the same columns.
std::string to_csv(const std::vector<nlohmann::ordered_json>& rows);
/// Text for people: a figure, or a dash where there is none.
std::string shown(double value, int digits);
/// The rows of one number of ranks, for people.
std::string to_table(const std::vector<Row>& rows);

}  // namespace dattn
