#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>

namespace dattn {

/// A file of JSON lines that a sweep adds to: each line, a row with a "key" of its own, is whole or
/// absent, whenever the process is killed. All failures are Failure(Exit::output), but for a file
/// of something else: Failure(Exit::input).
class RowFile {
 public:
  /// Opens the file, or makes it; a last line that was torn by a kill or a full disk is cut off.
  /// Waits some seconds where another process adds to it: ranks of a killed job live on for a
  /// while.
  explicit RowFile(const std::string& path);
  RowFile(const RowFile&) = delete;
  RowFile& operator=(const RowFile&) = delete;
  ~RowFile();

  /// Bytes of the rows that were there.
  std::size_t begin() const { return begin_; }
  /// Keys of the rows that were there, and of those that came since.
  const std::set<std::string>& keys() const { return keys_; }

  /// Adds a row; returns when it is on the disk.
  void add(const nlohmann::ordered_json& row);

  /// Adds a row to a file that another process has open, unless one with its key is there, behind
  /// the first `begin` bytes, which an earlier sweep has written: the last words of a rank whose
  /// job ends. Whether it is there now; throws nothing.
  static bool add_last(const std::string& path, std::size_t begin,
                       const nlohmann::ordered_json& row) noexcept;

 private:
  std::string path_;
  int file_ = -1;
  std::size_t begin_ = 0;
  std::set<std::string> keys_;
};

/// How the line of a row begins.
inline constexpr const char* kRowBegins = R"({"bench":1,)";

}  // namespace dattn
