#pragma once

#include <string>
#include <string_view>

#include "parallel/kernel_work.hpp"

namespace dattn {

/// What a message takes.
struct Link {
  double latency;    ///< seconds from a matched message's start to its first byte
  double bandwidth;  ///< bytes a second that an end of it sends, and as many that it receives
};

/// What a Forecast knows of the machine: one rank, its link to ranks of the same host, and the link
/// of a host to others, which all its ranks share.
struct Machine {
  double latency = 5e-6;     ///< of a rank's link, and of a host's unless net_latency says so
  double bandwidth = 5e9;    ///< likewise
  double rate = 5e10;        ///< floating-point operations a second of the fastest rank's kernel
  double overhead = 2e-6;    ///< seconds that a rank spends on a step besides its work
  double backward_rate = 0;  ///< as `rate`, of the backward kernel; 0: the same
  double rows =
      0;  ///< bytes a second of the rows that kernels read and write; 0: they cost nothing
  double packs = 0;          ///< the same of rows of keys, which are packed; 0: as `rows`
  double lanes = 0;          ///< Grain::lanes of its kernels
  double granule = 1;        ///< Grain::granule
  double net_latency = -1;   ///< of a host's link; negative: as `latency`
  double net_bandwidth = 0;  ///< likewise; 0: as `bandwidth`
  std::string name = {};     ///< what was measured, for people; may be empty

  /// Of a rank to ranks of its host.
  Link inside() const { return {latency, bandwidth}; }
  /// Of a host to other hosts.
  Link between() const {
    return {net_latency < 0 ? latency : net_latency, net_bandwidth > 0 ? net_bandwidth : bandwidth};
  }
  double backward() const { return backward_rate > 0 ? backward_rate : rate; }
  Grain grain() const { return {static_cast<Index>(lanes), static_cast<Index>(granule)}; }

  /// As parse_machine() reads it: all but the name.
  std::string text() const;
  /// For people, with the name.
  std::string title() const { return text() + (name.empty() ? "" : " (" + name + ")"); }
};

inline void set_grain(Machine& machine, const Grain& grain) {
  machine.lanes = static_cast<double>(grain.lanes);
  machine.granule = static_cast<double>(grain.granule);
}

/// Reads "latency=5e-6,bandwidth=5e9,rate=5e10,overhead=2e-6,backward_rate=4e10,rows=8e9,
/// packs=4e9,lanes=16,granule=6,net_latency=5e-5,net_bandwidth=1e9", each part optional, over the
/// values of `base`. Throws std::invalid_argument with the reason.
Machine parse_machine(std::string_view text, Machine base = {});

}  // namespace dattn
