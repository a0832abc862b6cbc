#pragma once

#include <optional>
#include <string>

#include "comm/communicator.hpp"

namespace dattn::comm {

/// MPI from initialise to finalise, at thread level FUNNELED; errors return instead of aborting.
/// One per process, in main. While an exception unwinds it does not finalise.
class Session {
 public:
  /// `progress`, which outlives this, may be null: see Communicator::set_progress.
  explicit Session(Progress* progress = nullptr);
  /// Throws std::logic_error if MPI is initialised already (use adopt of comm/mpi.hpp then), and
  /// std::runtime_error if MPI offers less than FUNNELED.
  Session(int& argc, char**& argv);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  /// All ranks of the job, over a duplicate of MPI_COMM_WORLD; lives as long as the session.
  Communicator& world() { return *world_; }

  /// Ends the job, all its ranks, with `code`.
  [[noreturn]] static void abort(int code) noexcept;

 private:
  int exceptions_;
  Progress* progress_ = nullptr;
  std::optional<Communicator> world_;
};

/// What is wrong with the launch, and its remedy, when the launcher started more ranks than MPI
/// sees (`ranks`): srun without a matching PMI starts that many jobs of one rank, without a word.
/// The other two are the values of OMPI_COMM_WORLD_SIZE and SLURM_NTASKS, null if unset.
std::optional<std::string> launch_complaint(int ranks, const char* ompi_comm_world_size,
                                            const char* slurm_ntasks);

}  // namespace dattn::comm
