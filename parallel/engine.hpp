#pragma once

#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "comm/transport.hpp"
#include "kernels/attend.hpp"
#include "parallel/plan.hpp"

namespace dattn {

/// When one step of a run began and ended, in seconds since the run began, and how much of that the
/// rank waited for messages.
struct StepTime {
  double begin = 0;
  double end = 0;
  double wait = 0;
};

/// What one rank did in one run.
struct RunTimes {
  double seconds = 0;       ///< whole run
  double compute = 0;       ///< in kernels, merges and sums, rounding for the wire, and digests
  double wait = 0;          ///< exposed: nothing to do but wait for a message or a collective
  double hidden = 0;        ///< messages were on their way while the rank did something else
  Index bytes_sent = 0;     ///< counted from the messages themselves; all-reduces by Reduction
  Index between_hosts = 0;  ///< of these, to other hosts
  Index messages = 0;       ///< sent to other ranks, and collectives
  std::vector<StepTime> steps;
  comm::Windows::Moved moved = {};  ///< of bytes_sent, collectives left out; 0 over others
  Index envelopes = 0;    ///< sent beside messages to other ranks (parallel/envelope.hpp); in no
                          ///< other figure
  Index collectives = 0;  ///< of `messages`
};

/// A message or a collective of a step failed; what() names the step, the peer and the bytes.
struct StepFailure : std::runtime_error {
  StepFailure(const std::string& what, bool timed_out_in)
      : std::runtime_error(what), timed_out(timed_out_in) {}
  bool timed_out;  ///< it did not come within the transport's deadline
};

/// Bytes are not what they were when they were sent, or not the same on all ranks where they must
/// be: memory or the network has changed them.
struct Corruption : StepFailure {
  explicit Corruption(const std::string& what) : StepFailure(what, false) {}
};

/// How a run goes, apart from its Program.
struct EngineOptions {
  Score score = {};  ///< how scores are made of q.k
  /// By query head of the whole problem the score of an attention sink, a key of value 0 that each
  /// row sees beside its own (gpt-oss); or empty. Forward: the backward pass has it from LSE.
  std::vector<float> sinks = {};
  /// Log-weights [keys, key heads] of all keys of the problem, by position, added to their scores:
  /// of tokens that stand for several, or, at -inf, for none; or empty. They must outlive the
  /// engine.
  std::span<const float> key_weights = {};
  int threads = 1;
  const Isa* isa = nullptr;  ///< instruction set; null chooses
  /// Query rows that a kernel is called for at a time; 0: all. Where rows see no key of each
  /// other's (sequences of a batch), those of one see each key that is read; together most lanes
  /// are masked.
  Index rows_at_once = 0;
  double poll_every = 200e-6;  ///< seconds of kernels between two polls, at least: a poll has its
                               ///< price even where nothing has come
  bool checked = false;        ///< fill what waits for a message, and sums over no key, with NaN,
                               ///< and have every message say which Block it is, and its digest
                               ///< where there are any
  /// Have every message say what it is and the XXH3-64 digest of its bytes, which is compared
  /// before anything uses them; and compare what ranks have after an all-reduce. @pre
  /// comm::has_digest()
  bool verify_wire = false;
  std::function<void(std::size_t step)> progress = {};  ///< before each step, may be empty
  /// In place of the kernels' attention, where keys do not lie as a Block, or are not yet what
  /// queries meet: merges into the memory of step.out what that of step.q has of them, under the
  /// mask. Rows of `k` are dense if the transport lends none.
  std::function<void(const Attend& step, const std::byte* q, const std::byte* k, std::byte* out,
                     const Mask& mask, const Work& work)>
      attend = {};
};

/// What a run does of its Program. With all of it results are right; anything less is for benches,
/// which tell one part's time from the other's, and leaves results undefined.
struct RunParts {
  bool kernels = true;   ///< Attend and everything else that only this rank works on
  bool messages = true;  ///< Send, Recv and Reduce; without, a slot that has a home to itself and
                         ///< is not borrowed still holds what the run before has received
  bool polling = true;   ///< messages may move while kernels work
};

/// Runs a Program over a transport: allocates the slots once, posts and awaits messages, polls
/// while kernels work, and times every step. Where the Problem compensates, the sums of what is
/// dropped are exchanged before the first step, and attention to pseudo-keys is merged into what
/// the rank delivers after the last one. Used by one thread. All ranks construct and run
/// together. Messages that fail throw std::runtime_error naming the step; no wait is longer than
/// the transport's deadline.
template <comm::Transport T>
class Engine {
 public:
  /// `problem`, `program` and `transport` must outlive the engine.
  /// @pre a problem that compensates has a forward program, and scores of a softmax without rules
  /// that ask for positions; sinks are of a softmax
  Engine(const Problem& problem, const Program& program, T& transport, EngineOptions options);
  Engine(Engine&&) = delete;
  ~Engine();

  /// Memory of an input slot (one of program.inputs) to be filled before run(); laid out as its
  /// Block.
  std::span<std::byte> input(SlotId slot);
  /// Uses the caller's memory for an input slot instead; it must outlive the engine, and its size
  /// be that of the Block.
  void bind(SlotId slot, std::span<const std::byte> memory);
  /// The same where rows lie `stride` bytes apart, which only kernels can read. @pre the slot is
  /// never sent
  void bind(SlotId slot, const std::byte* memory, Index stride);

  /// From now on kernels work under this mask, which must outlive the engine and allow nothing that
  /// the Problem's does not: a cache that is not full yet.
  void narrow(const Mask& mask);

  /// Computes. May be called again: inputs stay, results start afresh. All ranks give the same
  /// `parts`.
  RunTimes run(const RunParts& parts = {});

  /// Memory of a slot of program.kept, laid out as its Block, for the backward pass's engine to
  /// bind: filled by a run, and afresh by each.
  std::span<const std::byte> kept(SlotId slot) const;

  /// The result of the last forward run: O [rows, heads, d_v] and LSE [rows, heads] of
  /// program.result(Kind::O).block, dense. E is double where the Problem's type is, else float.
  template <class E>
  void result(std::span<E> o, std::span<E> lse) const;
  /// A result of the last backward run: dQ, dK or dV [rows, heads, dim] of
  /// program.result(kind).block, dense.
  template <class E>
  void gradient(Kind kind, std::span<E> out) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dattn
