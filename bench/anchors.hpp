#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/ceilings.hpp"
#include "bench/subject.hpp"

namespace dattn {

constexpr const char* kToSgemm = "sgemm";
constexpr const char* kToAmx = "amx";
constexpr const char* kToRead = "read";

/// The ceilings of this machine, prepared when first asked for.
class Machine {
 public:
  Machine() : amx_(amx_registers::present()), sgemm_(Sgemm::load()) {}

  bool has(const std::string& anchor) const {
    return anchor == kToSgemm ? sgemm_.has_value() : anchor == kToAmx ? amx_ : true;
  }
  std::string core() const { return sgemm_ ? sgemm_->core() : ""; }

  /// GFLOP/s or GB/s, now. @pre has(anchor)
  double rate(const std::string& anchor, int threads) {
    if (anchor == kToSgemm) return sgemm_->gflops(threads);
    if (anchor == kToAmx) return amx_registers::gflops(threads);
    return read(threads).gbps();
  }

  const MemoryRead& read(int threads) {
    if (!read_ || read_threads_ != threads) {
      read_.reset();
      read_ = std::make_unique<MemoryRead>(threads);
      read_threads_ = threads;
    }
    return *read_;
  }

 private:
  bool amx_;  // before sgemm_: the permission must come before any thread
  std::optional<Sgemm> sgemm_;
  std::unique_ptr<MemoryRead> read_;
  int read_threads_ = 0;
};

/// A rate that alternates with the kernel's, in units of the kernel's.
struct Anchor {
  std::string name;
  std::function<double()> rate;
};

/// What the repeats of one cell said.
struct Measured {
  std::vector<double> seconds;
  std::map<std::string, std::vector<double>> ratios;  ///< by anchor: kernel / anchor
  std::map<std::string, std::vector<double>> anchors;
  std::vector<double> poll_gaps;
  int dropped = 0;
  double foreign = 0;     ///< share of the machine's time that others took
  bool unsteady = false;  ///< too few steady repeats came: all are kept
};

struct Effort {
  int repeats = 15;
  double seconds = 0;  ///< of one row, at most; 0: no limit
};

/// Runs the subject and the anchors in turn. A repeat whose two anchors differ by more than a tenth
/// is dropped and made up for; a kernel shorter than 20 ms runs several times a repeat.
Measured measure(Subject& subject, const std::vector<Anchor>& anchors, const Effort& effort);

}  // namespace dattn
