// Faults in a job, for tests: a library to be preloaded into its ranks, which stands before MPI and
// the file system and strikes once, where DATTN_FAULT says:
//
//   DATTN_FAULT="rank=1 call=send at=5 do=kill"
//
// call: init, send, barrier, collective (any other), split, finalize; write, sync, rename (of
// files); compute (the begin of a parallel region, as kernels have); version (of MPI's library).
// at: which of these calls, from 1. do: kill, stop (SIGSTOP), exit (with 0), hang (without using
// the processor), busy (four seconds of work); leave (a collective out); shorten (a send, by 8
// bytes) or corrupt (a bit of it); other (version: another one); full (there is no space for a
// write); starve (no more memory).

#include <dlfcn.h>
#include <mpi.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace {

/// The value of `key` in DATTN_FAULT; empty if there is none.
std::string setting(std::string_view key) {
  const char* text = std::getenv("DATTN_FAULT");
  if (text == nullptr) return {};
  std::string_view words = text;
  while (!words.empty()) {
    const std::string_view word = words.substr(0, words.find(' '));
    words.remove_prefix(std::min(words.size(), word.size() + 1));
    if (word.starts_with(key) && word.substr(key.size(), 1) == "=") {
      return std::string(word.substr(key.size() + 1));
    }
  }
  return {};
}

struct Fault {
  bool mine = [] {
    const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
    return setting("rank") == (rank == nullptr ? "0" : rank);
  }();
  std::string call = setting("call");
  std::string what = setting("do");
  long at = std::atol(setting("at").c_str());
  long seen = 0;
};

Fault& fault() {
  static Fault one;
  return one;
}

/// Counts a call and strikes if this is the one; what is left to do by the caller is in `what`.
bool struck(std::string_view call) {
  Fault& f = fault();
  if (!f.mine || f.call != call || ++f.seen != f.at) return false;
  std::fprintf(stderr, "fault: %s at %s %ld\n", f.what.c_str(), f.call.c_str(), f.at);
  if (f.what == "kill") ::raise(SIGKILL);
  if (f.what == "stop") ::raise(SIGSTOP);
  if (f.what == "exit") ::_exit(0);
  while (f.what == "hang") ::pause();
  if (f.what == "starve") {
    const rlimit little{1, 1};
    ::setrlimit(RLIMIT_AS, &little);
  }
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::seconds(4);
  while (f.what == "busy" && Clock::now() < end) continue;
  return true;
}

using Send = int (*)(const void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request*);

int send(Send real, const void* data, int count, MPI_Datatype type, int peer, int tag,
         MPI_Comm comm, MPI_Request* request) {
  if (!struck("send") || (fault().what != "shorten" && fault().what != "corrupt")) {
    return real(data, count, type, peer, tag, comm, request);
  }
  int size = 0;
  PMPI_Pack_size(count, type, comm, &size);
  // Never freed: the message may need it for ever.
  auto* bytes = static_cast<unsigned char*>(std::malloc(static_cast<std::size_t>(size)));
  int end = 0;
  PMPI_Pack(data, count, type, bytes, size, &end, comm);
  if (fault().what == "shorten") end = end > 8 ? end - 8 : 0;
  if (fault().what == "corrupt" && end > 0) bytes[end - 1] ^= 0x10U;
  return real(bytes, end, MPI_BYTE, peer, tag, comm, request);
}

/// Whether this collective is left out.
bool left_out(MPI_Request* request, const char* call = "collective") {
  if (!struck(call) || fault().what != "leave") return false;
  *request = MPI_REQUEST_NULL;
  return true;
}

template <class F>
F* next(const char* name) {
  return reinterpret_cast<F*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

int MPI_Init_thread(int* argc, char*** argv, int required, int* provided) {
  struck("init");
  return PMPI_Init_thread(argc, argv, required, provided);
}
int MPI_Get_library_version(char* text, int* length) {
  const int code = PMPI_Get_library_version(text, length);
  if (struck("version") && fault().what == "other") text[*length / 2] ^= 1;
  return code;
}
int MPI_Finalize() {
  struck("finalize");
  return PMPI_Finalize();
}
int MPI_Comm_split(MPI_Comm comm, int color, int key, MPI_Comm* out) {
  struck("split");
  return PMPI_Comm_split(comm, color, key, out);
}
int MPI_Isend(const void* data, int count, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
              MPI_Request* request) {
  return send(PMPI_Isend, data, count, type, peer, tag, comm, request);
}
int MPI_Issend(const void* data, int count, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
               MPI_Request* request) {
  return send(PMPI_Issend, data, count, type, peer, tag, comm, request);
}
int MPI_Ibarrier(MPI_Comm comm, MPI_Request* request) {
  return left_out(request, "barrier") ? MPI_SUCCESS : PMPI_Ibarrier(comm, request);
}
int MPI_Ibcast(void* data, int count, MPI_Datatype type, int root, MPI_Comm comm,
               MPI_Request* request) {
  return left_out(request) ? MPI_SUCCESS : PMPI_Ibcast(data, count, type, root, comm, request);
}
int MPI_Iallreduce(const void* from, void* to, int count, MPI_Datatype type, MPI_Op op,
                   MPI_Comm comm, MPI_Request* request) {
  return left_out(request) ? MPI_SUCCESS
                           : PMPI_Iallreduce(from, to, count, type, op, comm, request);
}
int MPI_Iallgather(const void* from, int count, MPI_Datatype type, void* to, int counts,
                   MPI_Datatype types, MPI_Comm comm, MPI_Request* request) {
  return left_out(request) ? MPI_SUCCESS
                           : PMPI_Iallgather(from, count, type, to, counts, types, comm, request);
}

ssize_t pwrite(int file, const void* data, std::size_t bytes, off_t at) {
  if (struck("write") && fault().what == "full") {
    errno = ENOSPC;
    return -1;
  }
  static auto* real = next<ssize_t(int, const void*, std::size_t, off_t)>("pwrite");
  return real(file, data, bytes, at);
}
int fsync(int file) {
  struck("sync");
  static auto* real = next<int(int)>("fsync");
  return real(file);
}
int rename(const char* from, const char* to) noexcept {
  struck("rename");
  static auto* real = next<int(const char*, const char*)>("rename");
  return real(from, to);
}

// OpenMP's, where a kernel begins.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  struck("compute");
  static auto* real = next<void(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
  real(body, data, threads, flags);
}

}  // extern "C"
