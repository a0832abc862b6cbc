// dattn: splits one attention computation over the ranks of an MPI job.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string_view>

#include "kernels/latent/blas_core.hpp"
#include "launcher/commands.hpp"
#include "launcher/digests.hpp"
#include "launcher/output_file.hpp"
#include "launcher/version.hpp"

namespace {

constexpr std::string_view kHelp =
    "dattn splits one attention computation over the ranks of an MPI job.\n"
    "\n"
    "  dattn run      computes O and LSE, and gradients (under mpirun, or alone as one rank)\n"
    "  dattn bench    a sweep over configurations, a JSON line each, that resumes\n"
    "  dattn decode   new tokens against a KV cache, or a layer of latent attention, step by step\n"
    "  dattn convert  GQA weights as weights of latent attention\n"
    "  dattn plan     proves and prices a plan for any number of ranks, without MPI\n"
    "  dattn machine  measures links and kernels of this job, for the forecasts of run and plan\n"
    "  dattn report   who brought a job down that was stuck or failed\n"
    "  dattn verify   whether the files of a run are still what its manifest says\n"
    "  dattn permute  tokens of a grid from row by row to tile by tile, and back\n"
    "  dattn list     strategies, partitions, masks, forms of decoding\n"
    "\n"
    "  dattn COMMAND --help   its options\n"
    "  dattn --version\n"
    "\n"
    "Exit codes: 0 done and, where asked for, verified; 1 the check failed; 2 options; 3 input\n"
    "files; 4 memory; 5 output files; 70 a bug; 74 bytes were changed; 86 no progress; 130\n"
    "interrupted.\n";

/// The rank, as mpirun or srun say before MPI does; null where neither has started this.
const char* early_rank() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  return rank == nullptr ? std::getenv("PMIX_RANK") : rank;
}

void complain(const std::exception& e) {
  const char* rank = early_rank();
  std::fprintf(stderr, "[rank %s] dattn: %s\n", rank == nullptr ? "0" : rank, e.what());
}

/// A closed descriptor 0, 1 or 2 would be given to the next file that is opened, and messages would
/// be written into it. Writing to this stand-in fails, as it should.
void hold_standard_descriptors() {
  for (int descriptor = 0; descriptor <= 2; ++descriptor) {
    if (::fcntl(descriptor, F_GETFD) == -1 && errno == EBADF) ::open("/dev/null", O_RDONLY);
  }
}

constexpr std::string_view kInterrupted =
    "[rank 0] dattn: interrupted; unfinished output files are removed, run it again for a result\n";

/// Whether mpirun or srun has started this, for the signal handler. MPI sets PMIX_RANK where
/// neither has, so it is asked before.
bool launched = false;

/// SIGINT, SIGTERM, SIGHUP (a terminal that closes) and SIGXCPU (a limit on processor time). Under
/// mpirun and srun it says nothing: they also send SIGTERM to those who are left when another rank
/// has failed, and that rank's line is the one that counts.
void interrupted(int) {
  dattn::remove_temporaries();
  if (!launched) {
    [[maybe_unused]] const auto put =
        ::write(STDERR_FILENO, kInterrupted.data(), kInterrupted.size());
  }
  ::_exit(static_cast<int>(dattn::Exit::interrupted));
}

dattn::Exit dispatch(const std::vector<std::string>& words) {
  const std::string command = words.empty() ? "--help" : words.front();
  const std::vector<std::string> arguments(words.begin() + (words.empty() ? 0 : 1), words.end());
  if (command == "run") return dattn::run_command(arguments);
  if (command == "bench") return dattn::bench_command(arguments);
  if (command == "decode") return dattn::decode_command(arguments);
  if (command == "convert") return dattn::convert_command(arguments);
  if (command == "plan") return dattn::plan_command(arguments);
  if (command == "machine") return dattn::machine_command(arguments);
  if (command == "permute") return dattn::permute_command(arguments);
  if (command == "report") return dattn::report_command(arguments);
  if (command == "verify") return dattn::verify_command(arguments);
  if (command == "list") return dattn::list_command(arguments);
  if (command == "--help" || command == "help" || command == "-h") {
    dattn::write_text_file("-", kHelp);
    return dattn::Exit::ok;
  }
  if (command == "--version") {
    std::printf("dattn %s\n%s\n", dattn::kVersion.data(), dattn::digests_line().c_str());
    return dattn::Exit::ok;
  }
  throw dattn::Failure(dattn::Exit::usage, "there is no command " + dattn::in_quotes(command) +
                                               "; there are run, bench, decode, convert, plan, "
                                               "machine, permute, report, verify and list "
                                               "(see dattn --help)");
}

}  // namespace

int main(int argc, char** argv) {
  // A full disk or a closed pipe must come back as an error of the call that met it.
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
  launched = early_rank() != nullptr;
  for (const int told_to_end : {SIGINT, SIGTERM, SIGHUP, SIGXCPU}) {
    // nohup ignores SIGHUP before it starts this, and means it.
    if (std::signal(told_to_end, interrupted) == SIG_IGN && told_to_end == SIGHUP) {
      std::signal(SIGHUP, SIG_IGN);
    }
  }
  hold_standard_descriptors();
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (command == "decode" || command == "convert") dattn::choose_blas_core(argv);
  try {
    const dattn::Exit code = dispatch({argv + 1, argv + argc});
    dattn::write_text_file("-", "");  // what stdio still holds
    return static_cast<int>(code);
  } catch (const dattn::Failure& e) {
    complain(e);
    return static_cast<int>(e.code);
  } catch (const std::bad_alloc& e) {
    complain(e);
    return static_cast<int>(dattn::Exit::memory);
  } catch (const std::exception& e) {
    complain(e);
    return static_cast<int>(dattn::Exit::internal);
  }
}
