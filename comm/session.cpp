#include "comm/session.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <link.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "comm/error.hpp"
#include "comm/handles.hpp"
#include "comm/mpi.hpp"

namespace dattn::comm {
namespace {

/// While it lives, a process that nobody has started as one of a job tells Open MPI to look for no
/// network but its own: one of the libraries that others come with measures clocks for a fifth of a
/// second. What the user has set stays. (Without a daemon of its own, ess_singleton_isolated, it
/// would start faster still, but such processes take each other's session directory.)
class Alone {
 public:
  Alone() {
    for (const char* of_a_job : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"}) {
      if (std::getenv(of_a_job) != nullptr) return;
    }
    set_ = std::getenv(kMessages) == nullptr && ::setenv(kMessages, "ob1", 0) == 0;
  }
  ~Alone() {
    if (set_) ::unsetenv(kMessages);
  }
  Alone(const Alone&) = delete;

 private:
  static constexpr const char* kMessages = "OMPI_MCA_pml";
  bool set_ = false;
};

void initialise(int* argc, char*** argv) {
  int already = 0;
  check(MPI_Initialized(&already));
  if (already != 0) throw std::logic_error("MPI is initialised already: use comm::adopt");
  const Alone alone;
  int provided = 0;
  check(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided));
  if (provided < MPI_THREAD_FUNNELED) {
    throw std::runtime_error(
        fmt::format("MPI offers thread level {}, less than FUNNELED", provided));
  }
  check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
  check(MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN));
}

/// The number that `text` is, or 0.
int number(const char* text) {
  int value = 0;
  if (text == nullptr) return 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  return error == std::errc{} && stop == end ? value : 0;
}

/// Makes all libraries that are loaded now stay so until the process ends. MPI_Finalize unloads
/// Open MPI's plugins and PMIx while Open MPI's own thread may still be on its way through their
/// code (4.1.4 with PMIx 4.2: a segmentation fault of all ranks at the end of one job in
/// thousands).
void keep_libraries() {
  std::vector<std::string> names;
  const auto note = [](dl_phdr_info* library, std::size_t, void* into) {
    static_cast<std::vector<std::string>*>(into)->emplace_back(library->dlpi_name);
    return 0;
  };
  dl_iterate_phdr(note, &names);
  for (const std::string& name : names) {
    // No handle is closed: each only keeps what is there. The program and the kernel's part have no
    // name that opens.
    if (!name.empty()) dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
  }
}

}  // namespace

Session::Session(Progress* progress)
    : exceptions_(std::uncaught_exceptions()), progress_(progress) {
  const Waiting waiting(progress_, "MPI_Init", -1, 0);
  initialise(nullptr, nullptr);
  world_ = adopt(MPI_COMM_WORLD);
  world_->set_progress(progress_);
}

Session::Session(int& argc, char**& argv) : exceptions_(std::uncaught_exceptions()) {
  initialise(&argc, &argv);
  world_ = adopt(MPI_COMM_WORLD);
}

Session::~Session() {
  // MPI_Finalize is collective: after an exception the other ranks may never come, and the job
  // would hang instead of failing. mpirun ends a job in which a rank leaves without finalising.
  if (std::uncaught_exceptions() > exceptions_) return;
  if (progress_ != nullptr) progress_->phase("end");
  const Waiting waiting(progress_, "MPI_Finalize", -1, 0);
  world_.reset();
  keep_libraries();
  MPI_Finalize();
}

void Session::abort(int code) noexcept {
  MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

std::optional<std::string> launch_complaint(int ranks, const char* ompi_comm_world_size,
                                            const char* slurm_ntasks) {
  if (const int started = number(ompi_comm_world_size); started > 0) {
    // mpirun inside a Slurm job may well start fewer ranks than the job has tasks.
    if (started <= ranks) return std::nullopt;
    return fmt::format(
        "mpirun started {} ranks but MPI sees {}: the program is linked to another MPI than "
        "mpirun's; use the mpirun of the MPI that it was built with",
        started, ranks);
  }
  if (const int started = number(slurm_ntasks); started > ranks) {
    return fmt::format(
        "srun started {} ranks but MPI sees {}: srun and Open MPI share no PMI; use `srun "
        "--mpi=pmix` (see `srun --mpi=list`) or mpirun",
        started, ranks);
  }
  return std::nullopt;
}

}  // namespace dattn::comm
