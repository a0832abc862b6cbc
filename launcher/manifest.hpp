#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "comm/communicator.hpp"
#include "kernels/range.hpp"
#include "launcher/npy.hpp"
#include "launcher/output_file.hpp"

namespace dattn {

/// What a run has read and written, file by file: name, type, shape, and an XXH3-64 digest of the
/// rows of each rank, of what it had in memory when it wrote them. It is given its name
/// when all outputs have theirs, so where it is they are complete.
class Manifest {
 public:
  /// To be written to `path`, in whose folder names of files begin where they can. Empty: there is
  /// none, and nothing is done. @pre else comm::has_digest()
  explicit Manifest(std::string path);

  /// Collective: NumPy files of floats that were read, as (option, path), empty paths left out;
  /// each is read once more, by one rank. JobFailure(input)
  void add_inputs(comm::Communicator& world,
                  const std::vector<std::pair<std::string, std::string>>& files);
  /// Collective: a NumPy file of which this rank has written these rows, `bytes` in this order.
  void add_output(comm::Communicator& world, const std::string& option, const std::string& path,
                  NpyHeader::Type type, const std::vector<std::int64_t>& shape, const Runs& rows,
                  std::span<const std::byte> bytes);
  /// Collective: the file of what was added, complete; rank 0 has to commit it, last. None where
  /// there is no manifest. JobFailure(output)
  std::optional<OutputFile> write(comm::Communicator& world) const;

 private:
  std::string path_;
  nlohmann::ordered_json inputs_ = nlohmann::ordered_json::array();
  nlohmann::ordered_json outputs_ = nlohmann::ordered_json::array();
};

/// Failure(usage) unless a manifest at `path` can name these files, empty paths left out: JSON has
/// UTF-8 only, as a file's name need not be.
void require_names(const std::string& path, std::span<const std::string> files);

/// One file of a manifest, held against what is there.
struct ManifestLine {
  bool right = false;
  std::string text;
};

/// Holds all files of the manifest at `path` against it. Failure(input) if it cannot be read, or is
/// none.
std::vector<ManifestLine> verified_manifest(const std::string& path);

}  // namespace dattn
