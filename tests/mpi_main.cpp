// GoogleTest's main for tests over MPI. A test passes when it passes on every rank; rank 0 prints
// what went wrong anywhere, behind "[rank r]".

#include "tests/mpi_main.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "comm/session.hpp"

namespace dattn::comm {
namespace {

constexpr double kTestDeadline = 20;     // seconds that a wait in a test may take
constexpr double kHarnessDeadline = 60;  // longer: a rank may still sit in its test's deadline

std::optional<Communicator> test_world;

/// Gathers every rank's failures at the end of each test. The gather is the harness's own, on its
/// own communicator, and every rank comes to it whatever happened in its test.
class Listener : public testing::EmptyTestEventListener {
 public:
  explicit Listener(Communicator own) : own_(std::move(own)) {
    own_.set_deadline(kHarnessDeadline);
  }

  bool failed() const { return !failed_.empty(); }

  void OnTestStart(const testing::TestInfo&) override {
    test_world = own_.split(0, own_.rank());
    test_world->set_deadline(kTestDeadline);
  }

  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    const char* file = result.file_name();
    complaints_ += fmt::format("{}:{}: {}\n", file != nullptr ? file : "unknown file",
                               result.line_number(), result.message());
  }

  void OnTestEnd(const testing::TestInfo& test) override {
    report(fmt::format("{}.{}", test.test_suite_name(), test.name()),
           fmt::format(" ({} ms)", test.result()->elapsed_time()));
    test_world.reset();
  }

  // Failures outside any test, such as in a suite's tear-down.
  void OnTestProgramEnd(const testing::UnitTest& unit) override {
    report("end of program", "");
    if (own_.rank() != 0) return;
    fmt::print("{} tests on {} ranks, {} failed\n", unit.test_to_run_count(), own_.size(),
               failed_.size());
    for (const std::string& name : failed_) fmt::print("[  FAILED  ] {}\n", name);
    std::fflush(stdout);
  }

 private:
  void report(const std::string& name, const std::string& time) {
    // The name goes along: ranks that run different tests would otherwise only hang somewhere.
    std::vector<std::string> all;
    try {
      all = own_.all_gather(name + "\n" + std::exchange(complaints_, ""));
    } catch (const std::exception& error) {
      fmt::print(stderr, "[rank {}] {}: the other ranks do not come to its end: {}\n", own_.rank(),
                 name, error.what());
      Session::abort(1);
    }
    bool bad = false;
    for (int r = 0; r < own_.size(); ++r) {
      std::istringstream lines(all[static_cast<std::size_t>(r)]);
      std::string line;
      std::getline(lines, line);
      if (line != name) {
        bad = true;
        if (own_.rank() == 0) fmt::print("[rank {}] is at {}, rank 0 at {}\n", r, line, name);
      }
      while (std::getline(lines, line)) {
        bad = true;
        if (own_.rank() == 0) fmt::print("[rank {}] {}\n", r, line);
      }
    }
    if (bad) failed_.push_back(name);
    if (own_.rank() != 0) return;
    if (bad || !time.empty()) {
      fmt::print("[{}] {}{}\n", bad ? "  FAILED  " : "       OK ", name, time);
    }
    std::fflush(stdout);
  }

  Communicator own_;
  std::string complaints_;
  std::vector<std::string> failed_;
};

int run(Session& session) {
  if (session.world().rank() != 0) GTEST_FLAG_SET(output, "");  // one report, not one per rank
  GTEST_FLAG_SET(shuffle, false);  // its seed would differ from rank to rank
  Communicator& all = session.world();
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  delete listeners.Release(listeners.default_result_printer());
  auto owned = std::make_unique<Listener>(all.split(0, all.rank()));
  Listener& listener = *owned;
  listeners.Append(owned.get());
  const bool failed_here = RUN_ALL_TESTS() != 0;
  listeners.Release(owned.get());
  std::int64_t failed = failed_here || listener.failed() ? 1 : 0;
  all.all_reduce_max(std::span(&failed, 1));
  return static_cast<int>(failed);
}

}  // namespace

Communicator& world() { return test_world.value(); }

}  // namespace dattn::comm

int main(int argc, char** argv) {
  int rank = -1;
  try {
    dattn::comm::Session session(argc, argv);
    rank = session.world().rank();
    testing::InitGoogleTest(&argc, argv);
    try {
      return dattn::comm::run(session);
    } catch (const std::exception& error) {
      fmt::print(stderr, "[rank {}] {}\n", rank, error.what());
      dattn::comm::Session::abort(1);
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "[rank {}] {}\n", rank, error.what());
    return 1;
  }
}
