#pragma once

#include <string>
#include <string_view>

namespace dattn {

/// What a Forecast knows of the machine: one rank and its link.
struct Machine {
  double latency = 5e-6;     ///< seconds from a matched message's start to its first byte
  double bandwidth = 5e9;    ///< bytes a second that a rank sends, and as many that it receives
  double rate = 5e10;        ///< floating-point operations a second of one rank's kernel
  double overhead = 2e-6;    ///< seconds that a rank spends on a step besides its work
  double backward_rate = 0;  ///< as `rate`, of the backward kernel; 0: the same
  double rows =
      0;  ///< bytes a second of the rows that kernels read and write; 0: they cost nothing

  double backward() const { return backward_rate > 0 ? backward_rate : rate; }

  std::string text() const;
};

/// Reads "latency=5e-6,bandwidth=5e9,rate=5e10,overhead=2e-6,backward_rate=4e10,rows=8e9", each
/// part optional, over the values of `base`. Throws std::invalid_argument with the reason.
Machine parse_machine(std::string_view text, Machine base = {});

}  // namespace dattn
