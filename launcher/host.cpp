#include "launcher/host.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "launcher/failure.hpp"

namespace dattn {

Host this_host() {
  Host host;
  host.name = comm::processor_name();
  host.pid = static_cast<int>(::getpid());
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) == 0) {
    host.cpu_count = CPU_COUNT(&set);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &set)) continue;
      int last = cpu;
      while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, &set)) ++last;
      host.cpus += (host.cpus.empty() ? "" : ",") + std::to_string(cpu) +
                   (last > cpu ? "-" + std::to_string(last) : "");
      cpu = last;
    }
  }
  host.limits = memory_limits();
  return host;
}

int threads_from_environment() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  // "4,2" gives a number per nesting level; the first is ours.
  const std::string_view words(text);
  const std::string_view first = words.substr(0, words.find(','));
  int threads = 0;
  const auto [end, error] = std::from_chars(first.data(), first.data() + first.size(), threads);
  if (error != std::errc{} || end != first.data() + first.size() || threads < 1 || threads > 1024) {
    throw Failure(Exit::usage, "OMP_NUM_THREADS is " + in_quotes(words) +
                                   "; set it to 1..1024, unset it, or give --threads");
  }
  return threads;
}

int threads_of(comm::Communicator& world, const Host& host) {
  int ranks_here = 0;
  for (const std::string& other : world.all_gather(host.name + " " + host.cpus)) {
    ranks_here += other == host.name + " " + host.cpus ? 1 : 0;
  }
  return std::max(1, host.cpu_count / ranks_here);
}

}  // namespace dattn
