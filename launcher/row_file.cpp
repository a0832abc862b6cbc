#include "launcher/row_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string_view>
#include <thread>

#include "launcher/failure.hpp"

namespace dattn {
namespace {

using nlohmann::ordered_json;

/// Bytes far behind any row, whose locks say who adds to the file, and who writes right now.
constexpr off_t kSweep = off_t{1} << 60;
constexpr off_t kWriter = kSweep + 1;
constexpr std::chrono::seconds kPatience{15};
constexpr std::chrono::milliseconds kPause{50};

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Failure(Exit::output, "--out: " + quoted_path(path) + " " + what);
}
[[noreturn]] void refuse_errno(const std::string& path, const char* what, int error) {
  refuse(path, fmt::format("{}: {}", what, std::strerror(error)));
}

/// Whether this process alone has the byte now. Where a file system knows no locks, it has.
bool lock(int file, off_t byte, std::chrono::seconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (true) {
    struct flock range {};
    range.l_type = F_WRLCK;
    range.l_whence = SEEK_SET;
    range.l_start = byte;
    range.l_len = 1;
    if (::fcntl(file, F_OFD_SETLK, &range) == 0) return true;
    if (errno != EAGAIN && errno != EACCES && errno != EINTR) return true;
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(kPause);
  }
}

std::string content_of(int file, const std::string& path) {
  std::string text;
  std::string piece(std::size_t{1} << 16, '\0');
  while (true) {
    const ssize_t got = ::pread(file, piece.data(), piece.size(), static_cast<off_t>(text.size()));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refuse_errno(path, "cannot be read", errno);
    if (got == 0) return text;
    text.append(piece, 0, static_cast<std::size_t>(got));
  }
}

/// The keys of whole rows, and the bytes that these take.
struct Rows {
  std::set<std::string> keys;
  std::size_t bytes = 0;
};

Rows rows_of(const std::string& path, std::string_view text) {
  const std::string_view begins = kRowBegins;
  Rows rows;
  for (std::size_t number = 1; rows.bytes < text.size(); ++number) {
    const std::string_view rest = text.substr(rows.bytes);
    const std::string_view line = rest.substr(0, rest.find('\n'));
    const bool last = line.size() + 1 >= rest.size();
    const ordered_json row = ordered_json::parse(line, nullptr, false);
    const bool whole = line.size() < rest.size() && row.is_object() && row.contains("key") &&
                       row["key"].is_string();
    const bool ours = line.substr(0, begins.size()) == begins.substr(0, line.size());
    if (whole && ours) {
      rows.keys.insert(row["key"].get<std::string>());
      rows.bytes += line.size() + 1;
      continue;
    }
    if (last && ours) return rows;  // torn
    throw Failure(Exit::input,
                  fmt::format("--out: line {} of {} is no row of dattn bench; name another file",
                              number, quoted_path(path)));
  }
  return rows;
}

/// One write, taken back unless all of it came through.
void append(int file, const std::string& path, const ordered_json& row) {
  // A file's name need not be UTF-8.
  const std::string line = row.dump(-1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
  const off_t before = ::lseek(file, 0, SEEK_END);
  const ssize_t put = ::write(file, line.data(), line.size());
  const int error = put < 0 ? errno : ENOSPC;
  if (put != static_cast<ssize_t>(line.size())) {
    if (before >= 0 && put > 0) [[maybe_unused]]
      const int cut = ::ftruncate(file, before);
    refuse_errno(path, "cannot be added to", error);
  }
  if (::fsync(file) != 0) refuse_errno(path, "cannot be synced to the disk", errno);
}

}  // namespace

RowFile::RowFile(const std::string& path)
    : path_(path), file_(::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  if (file_ < 0) refuse_errno(path, "cannot be opened", errno);
  try {
    if (!lock(file_, kSweep, kPatience)) {
      refuse(path, "is being added to by another dattn bench; wait for it, or name another file");
    }
    const std::string text = content_of(file_, path);
    Rows rows = rows_of(path, text);
    if (rows.bytes < text.size() && ::ftruncate(file_, static_cast<off_t>(rows.bytes)) != 0) {
      refuse_errno(path, "cannot be cut behind its last whole row", errno);
    }
    begin_ = rows.bytes;
    keys_ = std::move(rows.keys);
  } catch (...) {
    ::close(file_);
    throw;
  }
}

RowFile::~RowFile() { ::close(file_); }

void RowFile::add(const ordered_json& row) {
  append(file_, path_, row);
  keys_.insert(row["key"].get<std::string>());
}

bool RowFile::add_last(const std::string& path, std::size_t begin,
                       const ordered_json& row) noexcept {
  const int file = ::open(path.c_str(), O_RDWR | O_APPEND | O_CLOEXEC);
  if (file < 0) return false;
  bool there = false;
  try {
    if (lock(file, kWriter, kPatience)) {
      const std::string text = content_of(file, path);
      const Rows rows = rows_of(path, std::string_view(text).substr(std::min(begin, text.size())));
      there = rows.keys.contains(row["key"].get<std::string>());
      if (!there) append(file, path, row);
      there = true;
    }
  } catch (...) {  // the job ends anyway, with what ended it
  }
  ::close(file);
  return there;
}

}  // namespace dattn
