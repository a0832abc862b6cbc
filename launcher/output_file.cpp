#include "launcher/output_file.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "launcher/failure.hpp"

namespace dattn {
namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Failure(Exit::output, quoted_path(path) + ": " + what);
}

[[noreturn]] void refuse_errno(const std::string& path, const std::string& what, int error) {
  const char* fix = "check the path and its permissions";
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    fix = "free space, or name a place with more room";
  } else if (error == EMFILE || error == ENFILE) {
    fix = "allow more open files (ulimit -n)";
  } else if (error == EPIPE || error == EBADF) {
    fix = "let somebody read all of it, or send it to a file";
  }
  refuse(path, what + ": " + std::strerror(error) + "; fix: " + fix);
}

[[noreturn]] void bug(const std::string& path, const std::string& what) {
  throw Failure(Exit::internal, "OutputFile " + quoted_path(path) + ": " + what);
}

/// Absolute, without ".", ".." and links as far as the path exists; as given when that fails.
std::string resolved(const std::string& path) {
  std::error_code error;
  const auto absolute = std::filesystem::absolute(path, error);
  if (error) return path;
  const auto canonical = std::filesystem::weakly_canonical(absolute, error);
  return error ? path : canonical.string();
}

std::string temporary_of(const std::string& resolved_path, const std::string& job_id) {
  return resolved_path + ".tmp." + job_id;
}

std::string directory_of(const std::string& path) {
  const auto parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

/// Reserves the bytes of the file, so that later writes cannot meet a full disk.
int reserve(int file, std::int64_t bytes) {
  if (bytes == 0) return 0;
  // Beyond this limit the kernel would kill the process by SIGXFSZ instead of returning an error.
  rlimit limit = {};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && static_cast<rlim_t>(bytes) > limit.rlim_cur) {
    return EFBIG;
  }
  int error = 0;
  do {
    error = ::posix_fallocate(file, 0, bytes);
  } while (error == EINTR);
  // Not every network file system can reserve; the right size is then the best there is.
  if (error == EINVAL || error == EOPNOTSUPP) return ::ftruncate(file, bytes) == 0 ? 0 : errno;
  return error;
}

/// Makes a rename in `directory` survive a power cut.
void sync_directory(const std::string& directory) {
  const int handle = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (handle < 0) return;  // A directory may allow writing but not reading: nothing to do then.
  const int error = ::fsync(handle) == 0 ? 0 : errno;
  ::close(handle);
  if (error == EIO || error == ENOSPC || error == EDQUOT) {
    refuse_errno(directory, "the directory cannot be synced", error);
  }
}

/// True if both paths lead to one file, or would once it exists.
bool same_file(const std::string& a, const std::string& b) {
  if (a == "-" || b == "-") return a == b;
  struct stat first = {};
  struct stat second = {};
  if (::stat(a.c_str(), &first) == 0 && ::stat(b.c_str(), &second) == 0) {
    return first.st_dev == second.st_dev && first.st_ino == second.st_ino;
  }
  return resolved(a) == resolved(b);
}

/// Where a signal handler finds the temporaries of this process: places that need no allocation.
struct Temporary {
  std::atomic<bool> used = false;
  std::array<char, 4096> path{};
};
std::array<Temporary, 16> temporaries;

void remember(const std::string& path) {
  for (const Temporary& place : temporaries) {
    if (place.used && path == place.path.data()) return;
  }
  for (Temporary& place : temporaries) {
    if (place.used || path.size() >= place.path.size()) continue;
    std::copy_n(path.c_str(), path.size() + 1, place.path.begin());
    place.used = true;  // last, because the signal may come at any time
    return;
  }
}

void forget(const std::string& path) {
  for (Temporary& place : temporaries) {
    if (place.used && path == place.path.data()) place.used = false;
  }
}

}  // namespace

void remove_temporaries() noexcept {
  for (const Temporary& place : temporaries) {
    if (place.used) ::unlink(place.path.data());
  }
}

void expect_temporary(const std::string& path, const std::string& job_id) {
  remember(temporary_of(resolved(path), job_id));
}

void refuse_unwritable(const std::string& path) {
  if (path.empty()) refuse(path, "is no file name; fix: give the output a name");
  struct stat info = {};
  if (::stat(path.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode)) refuse(path, "is a directory; fix: name a file in it");
    if (!S_ISREG(info.st_mode)) refuse(path, "is a pipe or device; fix: name a regular file");
    // The rename would not ask, but a user who took away the permission meant it.
    if (::faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) != 0) {
      refuse_errno(path, "the existing file cannot be replaced", errno);
    }
  } else if (errno != ENOENT) {
    refuse_errno(path, "cannot be written", errno);
  }
  if (path.back() == '/') refuse(path, "is a directory name; fix: name a file in it");
  const std::string directory = directory_of(resolved(path));
  if (::stat(directory.c_str(), &info) != 0) {
    if (errno == ENOENT) refuse(path, "its directory does not exist; fix: create it with mkdir -p");
    refuse_errno(path, "its directory cannot be used", errno);
  }
  if (!S_ISDIR(info.st_mode)) {
    refuse(path, "its directory is not a directory; fix: check the path");
  }
  if (::faccessat(AT_FDCWD, directory.c_str(), W_OK | X_OK, AT_EACCESS) != 0) {
    refuse_errno(path, "its directory cannot be written to", errno);
  }
}

OutputFile::OutputFile(const std::string& path, const std::string& job_id, int flags)
    : path_(resolved(path)), temporary_(temporary_of(path_, job_id)) {
  if (job_id.empty() || job_id.find('/') != std::string::npos) bug(path_, "unusable job id");
  file_ = ::open(temporary_.c_str(), flags | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (file_ < 0 && errno == EEXIST) {
    refuse(temporary_, "is there already; fix: delete it if no run with this job id is alive");
  }
  if (file_ < 0) refuse_errno(temporary_, "cannot be opened", errno);
}

OutputFile OutputFile::create(const std::string& path, std::int64_t total_bytes,
                              const std::string& job_id, std::string_view header) {
  if (total_bytes < 0 || std::ssize(header) > total_bytes) bug(path, "header longer than the file");
  refuse_unwritable(path);
  OutputFile file(path, job_id, O_CREAT | O_EXCL);
  file.creator_ = true;
  remember(file.temporary_);
  if (const int error = reserve(file.file_, total_bytes); error != 0) {
    refuse_errno(path, "no room for " + std::to_string(total_bytes) + " bytes", error);
  }
  file.size_ = total_bytes;
  file.write_at(0, std::as_bytes(std::span(header)));
  return file;
}

OutputFile OutputFile::join(const std::string& path, const std::string& job_id) {
  OutputFile file(path, job_id, 0);
  struct stat info = {};
  if (::fstat(file.file_, &info) != 0) {
    refuse_errno(file.temporary_, "cannot be examined", errno);
  }
  file.size_ = info.st_size;
  remember(file.temporary_);
  return file;
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      size_(other.size_),
      file_(std::exchange(other.file_, -1)),
      creator_(std::exchange(other.creator_, false)) {}

OutputFile& OutputFile::operator=(OutputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(temporary_, other.temporary_);
  std::swap(size_, other.size_);
  std::swap(file_, other.file_);
  std::swap(creator_, other.creator_);
  return *this;
}

OutputFile::~OutputFile() {
  if (file_ < 0) return;
  ::close(file_);
  if (creator_) ::unlink(temporary_.c_str());
  forget(temporary_);
}

void OutputFile::write_at(std::int64_t offset, std::span<const std::byte> bytes) const {
  if (offset < 0 || offset > size_ || std::ssize(bytes) > size_ - offset) {
    bug(path_, "write beyond the end");
  }
  while (!bytes.empty()) {
    const ssize_t put = ::pwrite(file_, bytes.data(), bytes.size(), offset);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) refuse_errno(temporary_, "cannot be written", put < 0 ? errno : EIO);
    offset += put;
    bytes = bytes.subspan(static_cast<std::size_t>(put));
  }
}

void OutputFile::sync() const {
  if (::fsync(file_) != 0) refuse_errno(temporary_, "cannot be synced to the disk", errno);
}

void OutputFile::commit() {
  if (!creator_) bug(path_, "commit by a process that did not create it, or a second commit");
  sync();
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    refuse_errno(path_, "the finished file cannot get its name", errno);
  }
  creator_ = false;
  forget(temporary_);
  sync_directory(directory_of(path_));
}

void refuse_same_file(std::span<const std::string> inputs, std::span<const std::string> outputs) {
  const auto refuse_pair = [](const std::string& output, const std::string& other, bool input) {
    throw Failure(Exit::usage, "output " + quoted_path(output) + " is the same file as the " +
                                   (input ? "input " : "output ") + quoted_path(other) +
                                   "; fix: give it a name of its own");
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].empty()) continue;
    for (const std::string& input : inputs) {
      if (!input.empty() && outputs[i] != "-" && same_file(outputs[i], input)) {
        refuse_pair(outputs[i], input, true);
      }
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (!outputs[j].empty() && same_file(outputs[i], outputs[j])) {
        refuse_pair(outputs[i], outputs[j], false);
      }
    }
  }
}

void write_text_file(const std::string& path, std::string_view text) {
  if (path == "-") {
    const std::size_t put = std::fwrite(text.data(), 1, text.size(), stdout);
    if (put != text.size() || std::fflush(stdout) != 0)
      refuse_errno("standard output", "cannot be written", errno);
    return;
  }
  OutputFile file = OutputFile::create(path, std::ssize(text), std::to_string(::getpid()), text);
  file.commit();
}

}  // namespace dattn
