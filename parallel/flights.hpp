#pragma once

#include <chrono>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "comm/error.hpp"
#include "comm/transport.hpp"
#include "parallel/engine.hpp"
#include "parallel/envelope.hpp"
#include "parallel/homes.hpp"

namespace dattn {

/// How far a run has come, and what it has taken so far.
struct Course {
  using Clock = std::chrono::steady_clock;

  RunTimes times;
  Clock::time_point start;
  int step = 0;  ///< that is being taken

  double now() const { return std::chrono::duration<double>(Clock::now() - start).count(); }
  /// Since `from` kernels, merges and sums were at work.
  void computed(double from) { times.compute += now() - from; }
  /// So many seconds had nothing to do but wait.
  void waited(double seconds) {
    times.wait += seconds;
    times.steps[static_cast<std::size_t>(step)].wait += seconds;
  }
};

/// The messages of an Engine that may still be on their way: posts them, lets them move, and waits
/// for those that a step is in conflict with.
template <comm::Transport T>
class Flights {
 public:
  /// All must outlive this; of the options it has poll_every, checked and verify_wire.
  Flights(const Problem& problem, const Program& program, T& transport, Homes& homes,
          Course& course, const EngineOptions& options);

  /// A run begins, its Course at 0.
  void start();
  /// It is over, and no other rank looks at memory of this one any more; what it has hidden, and
  /// what has moved how, is known. @pre nothing is on its way
  void finish();

  void post(const Send& step);
  void post(const Recv& step);

  /// Lets messages move; called between tiles by the thread that runs the engine.
  void poll();

  /// Waits for what writes the slot's home; for that and what reads it; for everything.
  void before_reading(SlotId s);
  void before_writing(SlotId s);
  void land_all();

  /// Does what may fail on behalf of `step`, and has the failure name it.
  template <class F>
  auto named(int step, const F& f) {
    try {
      return f();
    } catch (const comm::Timeout& e) {
      throw StepFailure(place(step) + e.what(), true);
    } catch (const Corruption& e) {
      throw Corruption(place(step) + e.what());
    } catch (const std::bad_alloc&) {
      throw;  // no failure of the step, and its exit code is another
    } catch (const std::exception& e) {
      throw StepFailure(place(step) + e.what(), false);
    }
  }

 private:
  /// A message that may still be on its way.
  struct Flight {
    typename T::Request request;
    int home;
    SlotId slot;
    bool writes;
    bool counts;  ///< travels between ranks
    int step;
    std::byte* staged;  ///< where it lies rounded; null: it does not
    typename T::Request envelope;
  };

  /// What lies in another rank's memory, and the step that has received it.
  struct Seen {
    comm::ConstStrip bytes;
    int step;
  };

  /// Where the messages of a home lie rounded while they are under way, one behind the other.
  struct Staging {
    comm::Memory memory;
    Index size;
    Index used;
  };

  template <class Message>
  std::byte* stage(const Message& step);
  template <class Message>
  void depart(typename T::Request request, const Message& step, std::byte* in_staging,
              typename T::Request envelope);
  typename T::Request seal(const Send& step, const comm::ConstStrips& pieces, bool rounded);
  typename T::Request expect(const Recv& step);
  void check(const Flight& flight, const Recv& step);
  std::uint64_t digest(const comm::ConstStrips& pieces);
  void check_still(int home);
  void land(std::size_t i);
  bool test(Flight& flight);
  template <class Conflicts>
  void settle(const Conflicts& conflicts);
  std::string place(int step) const;

  const Problem& problem_;
  const Program& program_;
  T& transport_;
  Homes& homes_;
  Course& course_;
  double poll_every_;
  bool checked_;
  std::optional<Envelopes> envelopes_;
  std::vector<std::optional<Seen>> seen_;              ///< by home, where there are digests
  std::vector<std::optional<std::uint64_t>> digests_;  ///< by slot: of what came whole, and stays
  std::vector<bool> borrowable_;                       ///< by slot
  std::vector<int> last_writes_;                       ///< by home
  comm::Windows::Moved moved_;                         ///< before this run
  std::vector<Staging> staging_;                       ///< by home
  std::vector<Flight> flights_;
  int under_way_ = 0;       ///< flights that count
  double since_ = 0;        ///< when under_way_ last rose from 0
  double on_the_wire_ = 0;  ///< seconds in which under_way_ was not 0
  double landing_ = 0;      ///< seconds in which land() worked
  double polled_ = 0;       ///< when poll() last did something
  std::size_t turn_ = 0;    ///< flight that the next poll tests first
};

}  // namespace dattn
