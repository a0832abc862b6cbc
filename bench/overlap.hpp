#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "comm/communicator.hpp"
#include "launcher/options.hpp"

namespace dattn {

/// How every case is tried.
struct OverlapOptions {
  int threads = 1;
  int repeats = 9;
  double rest = 0;     ///< share of a run's time to sleep before the next
  double ratio = 0.7;  ///< seconds of a step's messages over those of its kernels; see README
  /// Collective: has every rank send at most so many bytes a second. Empty: the link stays as it
  /// is, whatever the ratio then comes to.
  std::function<void(double bytes_a_second)> set_rate;
};

/// How much of its communication one strategy hides in one pass, or why it did not run.
struct OverlapRow {
  std::string strategy, partition, mesh, pass;
  std::string refused;
  int ranks = 1, threads = 1, repeats = 0;
  bool polling = true;
  bool steady = true;  ///< the machine was as fast after a repeat as before it
  Shape shape;
  std::string mask;
  Index piece = 0;               ///< bytes at which messages are cut
  Index piece_abroad = 0;        ///< the same between hosts
  double bytes = 0;              ///< sent by the rank that sends most
  double messages = 0;           ///< sent by it, before they are cut
  double rate = 0;               ///< bytes a second, as the link was set; 0: it was not
  double ratio = 0;              ///< as asked for, as measured
  double compute = 0, comm = 0;  ///< seconds without messages, and without kernels
  double both = 0;               ///< seconds of the pass
  double wait = 0;               ///< seconds of it that a rank only waits, mean of the ranks
  double hidden = 0, hidden_min = 0, hidden_max = 0;  ///< 1 - (both - compute) / comm
  double plannable = 0;  ///< what `hidden` would be if nothing but the plan kept it from 1
};

/// Collective: measures one strategy in all passes of the task, with and without polling; complete
/// at rank 0.
std::vector<OverlapRow> measure_overlap(comm::Communicator& ranks, const Task& task,
                                        const std::string& strategy, const OverlapOptions& options);

/// The columns of JSON and CSV, in their order; null where there is no figure.
nlohmann::ordered_json fields(const OverlapRow& row);
/// For people.
std::string to_table(const std::vector<OverlapRow>& rows);

}  // namespace dattn
