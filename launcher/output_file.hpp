#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace dattn {

/// One file written by many processes at once, that is complete or absent.
/// Everybody writes into a temporary beside the target, and commit() gives it the target's name:
///
///   rank 0:  create   write_at ...  sync        (everybody has synced)  commit
///   others:           join  write_at ...  sync
///
/// All failures are Failure(Exit::output). The temporary goes when its creator goes without
/// commit(), or by remove_temporaries() in any process that has it open or expects it: where the
/// creator dies by SIGKILL, the others are told to end. If all die so, `path.tmp.job_id` is left.
class OutputFile {
 public:
  /// Makes the temporary at its full size, so that a full disk shows before any work is done, and
  /// writes `header` at its front.
  /// @pre header.size() <= total_bytes; job_id is not empty and has no '/'
  static OutputFile create(const std::string& path, std::int64_t total_bytes,
                           const std::string& job_id, std::string_view header = {});

  /// Opens the temporary that create() made, in the same or another process.
  static OutputFile join(const std::string& path, const std::string& job_id);

  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&& other) noexcept;
  ~OutputFile();

  /// Writes all of `bytes`; threads may write to different places at the same time.
  /// @pre 0 <= offset and offset + bytes.size() <= the size given to create()
  void write_at(std::int64_t offset, std::span<const std::byte> bytes) const;

  /// Returns when everything this process wrote is on the disk.
  void sync() const;

  /// Gives the file its final name, replacing a file that had it.
  /// @pre this is the creator, and every process has returned from sync()
  void commit();

  /// The file's name until commit(), for those who clean up after a signal.
  const std::string& temporary() const { return temporary_; }

 private:
  OutputFile(const std::string& path, const std::string& job_id, int flags);

  std::string path_;       // With symbolic links resolved: a link to the old file stays a link.
  std::string temporary_;  // path_.tmp.job_id
  std::int64_t size_ = 0;
  int file_ = -1;
  bool creator_ = false;  // Also false once committed: there is nothing left to remove.
};

/// Failure(Exit::output) unless a file can be made at `path`: no such directory, not writable, or
/// something other than a regular file has the name. Changes nothing.
void refuse_unwritable(const std::string& path);

/// Failure(Exit::usage) if an output is the same file as an input or as another output, whatever
/// the paths look like. Empty paths stand for options not given, "-" among outputs for stdout.
void refuse_same_file(std::span<const std::string> inputs, std::span<const std::string> outputs);

/// Removes the temporaries that this process has open and that are not committed, and those that it
/// expects. Made for signal handlers.
void remove_temporaries() noexcept;

/// Another process may make the temporary of `path` from now on: its creator can be killed before
/// anybody else has joined.
void expect_temporary(const std::string& path, const std::string& job_id);

/// Writes a small text, complete or not at all; the path "-" is stdout.
void write_text_file(const std::string& path, std::string_view text);

}  // namespace dattn
