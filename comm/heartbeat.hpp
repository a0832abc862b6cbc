#pragma once

#include <netinet/in.h>

#include <cstdint>
#include <string>
#include <vector>

namespace dattn::comm {

/// What a rank has to tell the others apart from being alive.
enum class Alarm : std::int32_t {
  none,
  failed,  ///< a rank is about to abort the job: write down where you are
  stuck    ///< nothing moves: write down where you are, and end
};

/// Small datagrams between the ranks' watchdogs, past MPI, which only the main thread may call:
/// everybody tells rank 0, and rank 0 tells everybody. A rank that was never heard, behind a
/// firewall, is one of which nothing is known. Used by one thread at a time.
class Heartbeat {
 public:
  /// Opens a socket; without one the rank is deaf and mute.
  Heartbeat(int rank, int size);
  Heartbeat(const Heartbeat&) = delete;
  ~Heartbeat();

  /// Rank 0's: where it listens, for call() of the others.
  std::string address() const;
  void call(const std::string& address);

  /// The socket, to wait on; -1: none.
  int socket() const { return socket_; }

  /// Tells: `moves` grows with everything that this rank does.
  void tell(std::int64_t moves, Alarm alarm);
  /// Takes in what has come.
  void hear();

  /// Of rank 0: of all ranks it knows of together; elsewhere what rank 0 said last.
  std::int64_t moves_of_others() const;
  Alarm alarm() const { return alarm_; }
  /// To be called once every `seconds` of this process's time: ranks that were heard before and
  /// then not for more than `limit`. Rank 0 knows of all, the others of rank 0.
  std::vector<int> silent(double seconds, double limit);

 private:
  struct Other {
    sockaddr_in at{};
    bool heard = false;
    std::int64_t moves = 0;
    double silence = 0;
  };

  void send(std::int64_t moves, Alarm alarm, const sockaddr_in& to) const;

  int rank_;
  int socket_ = -1;
  std::uint64_t job_ = 0;              ///< tells this job's datagrams from others
  std::vector<sockaddr_in> rank_0_{};  ///< all its addresses, or the one that answered
  std::vector<Other> others_;          ///< by rank; of rank 0 only, but for rank 0
  Alarm alarm_ = Alarm::none;
};

}  // namespace dattn::comm
