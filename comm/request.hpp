#pragma once

#include <memory>
#include <string>

namespace dattn::comm {

/// A message in flight, or none. Its bytes never die under it: the destructor waits for it, for the
/// communicator's deadline at most, and then cancels it or, where MPI cannot, aborts the job.
/// While an exception unwinds, the destructor does not wait.
class [[nodiscard]] Request {
 public:
  struct Impl;

  /// No message: done.
  Request() noexcept;
  explicit Request(std::unique_ptr<Impl> impl) noexcept;
  Request(Request&& other) noexcept;
  Request& operator=(Request&& other) noexcept;
  ~Request();

  /// Whether the message is complete; makes progress. Throws Mismatch if the message has another
  /// length than expected, Error if MPI fails; the request is done then.
  bool test();

  /// Polls until the message is complete; throws as test() does, and Timeout after the deadline,
  /// which leaves the request as it was.
  void wait();

  /// Keeps `buffer` alive until the message is complete.
  void keep(std::shared_ptr<const void> buffer);

  /// "receive of 24 bytes from rank 3 (tag 0)", or "nothing" when done.
  std::string describe() const;

 private:
  void drop() noexcept;
  void abandon() noexcept;

  std::unique_ptr<Impl> impl_;
};

}  // namespace dattn::comm
