#include "launcher/manifest.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "comm/digest.hpp"
#include "launcher/failure.hpp"
#include "launcher/together.hpp"
#include "launcher/version.hpp"

namespace dattn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using nlohmann::ordered_json;

constexpr const char* kDigest = "xxh3_64";
constexpr int kVersionOfFormat = 1;

std::string name_of(NpyHeader::Type type) {
  switch (type) {
    case NpyHeader::Type::f2:
      return "f2";
    case NpyHeader::Type::f4:
      return "f4";
    case NpyHeader::Type::f8:
      return "f8";
    case NpyHeader::Type::i4:
      return "i4";
    case NpyHeader::Type::i8:
      return "i8";
  }
  return {};
}

ordered_json part_json(int rank, const Runs& rows, std::uint64_t digest) {
  ordered_json runs = ordered_json::array();
  for (const Run& run : rows) runs.push_back({run.first, run.count, run.step});
  return {{"rank", rank}, {"rows", runs}, {kDigest, comm::digest_text(digest)}};
}

/// A file, without its parts.
ordered_json entry_json(const std::string& option, const std::string& name,
                        const NpyHeader& header) {
  return {{"option", option},
          {"file", name},
          {"dtype", name_of(header.type)},
          {"shape", header.shape},
          {"parts", ordered_json::array()}};
}

/// Of the bytes of these rows, in this order. @pre they exist
std::uint64_t digest_of_rows(const NpyReader& file, const Runs& rows) {
  constexpr std::int64_t kBytes = std::int64_t{4} << 20;
  const std::int64_t row = file.row_size() * npy_item_bytes(file.header().type);
  const std::int64_t most = std::max<std::int64_t>(1, kBytes / std::max<std::int64_t>(1, row));
  comm::Digest digest;
  std::vector<std::byte> bytes;
  for (const Run& run : rows) {
    for (std::int64_t done = 0; row > 0 && done < run.count;) {
      const std::int64_t now = run.step == 1 ? std::min(most, run.count - done) : 1;
      bytes.resize(static_cast<std::size_t>(now * row));
      file.read_row_bytes(run.at(done), bytes);
      digest.add(bytes);
      done += now;
    }
  }
  return digest.value();
}

/// As the manifest at `manifest` names the file: from its folder on, if it lies below that.
std::string name_from(const std::string& manifest, const std::string& file) {
  const fs::path whole = fs::weakly_canonical(fs::absolute(file));
  const fs::path name =
      whole.lexically_relative(fs::weakly_canonical(fs::absolute(manifest)).parent_path());
  return name.empty() || name.begin()->string() == ".." ? whole.string() : name.string();
}

Failure unusable(const std::string& path, const std::string& what) {
  return {Exit::input, fmt::format("manifest {} {}; give a file that dattn run --manifest wrote",
                                   quoted_path(path), what)};
}

json read_manifest(const std::string& path) {
  constexpr std::uintmax_t kMost = std::uintmax_t{1} << 28;  // bytes
  std::error_code error;
  if (!fs::is_regular_file(path, error)) {
    throw unusable(path, error ? error.message() : "is not a regular file");
  }
  if (fs::file_size(path, error) > kMost) throw unusable(path, "is larger than 256 MiB");
  std::ifstream stream(path);
  std::ostringstream whole;
  if (!(whole << stream.rdbuf())) throw unusable(path, "cannot be read");
  json all;
  try {
    all = json::parse(whole.str());
    if (all.at("version").get<int>() != kVersionOfFormat) {
      throw unusable(path, fmt::format("is not of version {}", kVersionOfFormat));
    }
  } catch (const json::exception& e) {
    throw unusable(path, "is not one (" + in_quotes(e.what(), 120) + ")");
  }
  return all;
}

/// Why the file is not what `entry` says; empty if it is. Throws json's exceptions.
std::string trouble_with(const json& entry, const NpyReader& file) {
  const std::string type = name_of(file.header().type);
  if (entry.at("dtype") != type) {
    return fmt::format("holds {}, the manifest has {}", type, entry.at("dtype").get<std::string>());
  }
  if (entry.at("shape") != json(file.header().shape)) {
    return fmt::format("has the shape {}, the manifest has {}", json(file.header().shape).dump(),
                       entry.at("shape").dump());
  }
  std::int64_t rows = 0;
  for (const json& part : entry.at("parts")) {
    Runs runs;
    for (const json& run : part.at("rows")) {
      runs.push_back({run.at(0), run.at(1), run.at(2)});
      const Run& r = runs.back();
      // Compared without products, which could be too large.
      if (r.first < 0 || r.count < 0 || r.step < 1 || r.first > file.rows() ||
          (r.count > 0 &&
           (r.first == file.rows() || r.count - 1 > (file.rows() - 1 - r.first) / r.step))) {
        return fmt::format("has no rows {}, which the manifest has", run.dump());
      }
      rows += r.count;
    }
    const std::string digest = comm::digest_text(digest_of_rows(file, runs));
    if (part.at(kDigest) != digest) {
      return fmt::format("has changed in rows {} of rank {}: XXH3-64 {}, the manifest has {}",
                         part.at("rows").dump(), part.at("rank").dump(), digest,
                         part.at(kDigest).get<std::string>());
    }
  }
  if (rows != file.rows()) return "has rows of which the manifest says nothing";
  return {};
}

}  // namespace

void require_names(const std::string& path, std::span<const std::string> files) {
  for (const std::string& file : files) {
    if (file.empty()) continue;
    const std::string name = name_from(path, file);
    if (escaped(name) == name) continue;
    throw Failure(Exit::usage, "--manifest: its JSON cannot name " + quoted_path(name) +
                                   ", which is not plain UTF-8; rename that");
  }
}

Manifest::Manifest(std::string path) : path_(std::move(path)) {}

void Manifest::add_inputs(comm::Communicator& world,
                          const std::vector<std::pair<std::string, std::string>>& files) {
  if (path_.empty()) return;
  std::vector<std::string> texts(files.size());
  const auto reader = [&](std::size_t i) {
    return static_cast<int>(i % static_cast<std::size_t>(world.size()));
  };
  together(world, [&] {
    for (std::size_t i = 0; i < files.size(); ++i) {
      const auto& [option, path] = files[i];
      if (path.empty() || reader(i) != world.rank()) continue;
      const NpyReader file(path);
      const Runs rows{{0, file.rows(), 1}};
      ordered_json entry = entry_json(option, name_from(path_, path), file.header());
      entry["parts"].push_back(part_json(reader(i), rows, digest_of_rows(file, rows)));
      texts[i] = entry.dump();
    }
  });
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (files[i].second.empty()) continue;
    world.broadcast(texts[i], reader(i));
    inputs_.push_back(ordered_json::parse(texts[i]));
  }
}

void Manifest::add_output(comm::Communicator& world, const std::string& option,
                          const std::string& path, NpyHeader::Type type,
                          const std::vector<std::int64_t>& shape, const Runs& rows,
                          std::span<const std::byte> bytes) {
  if (path_.empty() || path.empty()) return;
  const auto parts = world.gather(part_json(world.rank(), rows, comm::digest_of(bytes)).dump());
  if (world.rank() != 0) return;
  ordered_json entry =
      entry_json(option, name_from(path_, path), {.type = type, .shape = shape, .data_offset = 0});
  for (const std::string& part : parts) entry["parts"].push_back(ordered_json::parse(part));
  outputs_.push_back(std::move(entry));
}

std::optional<OutputFile> Manifest::write(comm::Communicator& world) const {
  if (path_.empty()) return {};
  std::string job = std::to_string(::getpid());
  world.broadcast(job, 0);
  std::optional<OutputFile> file;
  together(world, [&] {
    if (world.rank() != 0) return;
    const ordered_json all{{"version", kVersionOfFormat},
                           {"dattn", kVersion},
                           {"inputs", inputs_},
                           {"outputs", outputs_}};
    const std::string text = all.dump(1) + "\n";
    file = OutputFile::create(path_, std::ssize(text), job, text);
  });
  // So that they can remove it where rank 0 dies.
  together(world, [&] {
    if (!file) file = OutputFile::join(path_, job);
  });
  return file;
}

std::vector<ManifestLine> verified_manifest(const std::string& path) {
  const json all = read_manifest(path);
  std::vector<ManifestLine> lines;
  try {
    for (const char* group : {"inputs", "outputs"}) {
      for (const json& entry : all.at(group)) {
        const fs::path name = entry.at("file").get<std::string>();
        const std::string file =
            (fs::weakly_canonical(fs::absolute(path)).parent_path() / name).string();
        std::string trouble;
        try {
          trouble = trouble_with(entry, NpyReader(file));
        } catch (const Failure& e) {
          trouble = e.what();
        }
        lines.push_back({trouble.empty(), escaped(name.string()) +
                                              (trouble.empty() ? ": as it was" : ": " + trouble)});
      }
    }
  } catch (const json::exception& e) {
    throw unusable(path, "is not one (" + in_quotes(e.what(), 120) + ")");
  }
  return lines;
}

}  // namespace dattn
