#include "launcher/latent_files.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <sstream>

#include "kernels/check.hpp"
#include "launcher/failure.hpp"
#include "launcher/file_sum.hpp"
#include "launcher/output_file.hpp"

namespace dattn {
namespace {

using nlohmann::json;

/// Which dimension of a matrix counts heads.
enum class Heads { none, first, second };

struct Matrix {
  const char* name;
  std::vector<float> LatentWeights::*numbers;
  std::vector<std::int64_t> shape;
  Heads heads = Heads::none;
};

std::vector<Matrix> matrices_of(const LatentSizes& s) {
  std::vector<Matrix> all;
  if (s.q_rank > 0) {
    all.push_back({"down_q", &LatentWeights::down_q, {s.model, s.q_rank}});
    all.push_back({"q_gamma", &LatentWeights::q_gamma, {s.q_rank}});
  }
  all.push_back({"down_kv", &LatentWeights::down_kv, {s.model, s.row()}});
  all.push_back({"kv_gamma", &LatentWeights::kv_gamma, {s.kv_rank}});
  all.push_back({"up_q", &LatentWeights::up_q, {s.q_width(), s.heads, s.d_qk()}, Heads::second});
  all.push_back({"up_k", &LatentWeights::up_k, {s.heads, s.kv_rank, s.d_nope}, Heads::first});
  all.push_back({"up_v", &LatentWeights::up_v, {s.heads, s.kv_rank, s.d_v}, Heads::first});
  all.push_back({"out", &LatentWeights::out, {s.heads, s.d_v, s.model}, Heads::first});
  return all;
}

std::string file_of(const std::string& prefix, const char* name) {
  return prefix + "." + name + ".npy";
}

std::string sizes_text(const LatentSizes& s) {
  const json j{{"version", 1},
               {"model", s.model},
               {"heads", s.heads},
               {"q_rank", s.q_rank},
               {"kv_rank", s.kv_rank},
               {"d_nope", s.d_nope},
               {"d_rope", s.d_rope},
               {"d_v", s.d_v},
               {"rope_base", s.rope.base},
               {"rope_copies", s.rope.copies},
               {"epsilon", s.epsilon},
               {"scale", s.scale()}};
  return j.dump(1) + "\n";
}

/// PREFIX.json, with what is wrong in it.
class SizesFile {
 public:
  SizesFile(const std::string& option, const std::string& path) : option_(option), path_(path) {
    constexpr std::uintmax_t kMost = 1 << 20;  // bytes
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) {
      fail(error ? error.message() : "is not a regular file");  // a pipe could keep us for ever
    }
    if (std::filesystem::file_size(path, error) > kMost) fail("is larger than 1 MiB");
    std::ifstream stream(path);
    if (!stream) fail("cannot be opened; check its permissions");
    std::ostringstream whole;
    whole << stream.rdbuf();
    text_ = whole.str();
    try {
      json_ = json::parse(text_);
    } catch (const json::exception& e) {
      fail(fmt::format("is not JSON ({})", in_quotes(e.what(), 120)));
    }
    if (!json_.is_object()) fail("is not an object {...}");
  }

  const std::string& text() const { return text_; }

  LatentSizes sizes() {
    LatentSizes s;
    Index version = 0;
    read("version", version, true);
    if (version != 1) fail(fmt::format("has version {}; this is for version 1", version));
    read("model", s.model, true);
    read("heads", s.heads, true);
    read("q_rank", s.q_rank, false);
    read("kv_rank", s.kv_rank, true);
    read("d_nope", s.d_nope, true);
    read("d_rope", s.d_rope, true);
    read("d_v", s.d_v, true);
    read("epsilon", s.epsilon, true);
    read("rope_base", s.rope.base, true);
    read("rope_copies", s.rope.copies, false);
    read("rope_factor", s.rope.factor, false);
    read("rope_original", s.rope.original, false);
    read("beta_fast", s.rope.beta_fast, false);
    read("beta_slow", s.rope.beta_slow, false);
    read("mscale", s.rope.mscale, false);
    read("mscale_all_dim", s.rope.mscale_all_dim, false);
    double scale = 0;
    const bool says_scale = read("scale", scale, false);
    for (const auto& [name, value] : json_.items()) {
      if (std::find(known_.begin(), known_.end(), name) != known_.end()) continue;
      fail(fmt::format("has {}, which is none of {}; leave it out", in_quotes(name),
                       fmt::join(known_, ", ")));
    }
    if (const auto why = complaint(s)) fail(*why);
    if (says_scale && !(std::abs(scale - s.scale()) <= 1e-6 * s.scale())) {
      fail(
          fmt::format("has the scale {}, where d_nope, d_rope and YaRN make it {}; leave 'scale' "
                      "out, or correct these",
                      scale, s.scale()));
    }
    return s;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw Failure(Exit::input, fmt::format("{}: {} {}", option_, quoted_path(path_), why));
  }

  template <class T>
  bool read(const char* name, T& into, bool required) {
    known_.push_back(name);
    const auto found = json_.find(name);
    if (found == json_.end()) {
      if (required) fail(fmt::format("lacks '{}'", name));
      return false;
    }
    const bool whole = std::is_same_v<T, Index>;
    if (!(whole ? found->is_number_integer() : found->is_number())) {
      fail(fmt::format("has no {} as '{}'", whole ? "whole number" : "number", name));
    }
    into = found->get<T>();
    return true;
  }

  std::string option_, path_, text_;
  json json_;
  std::vector<std::string> known_;
};

}  // namespace

std::vector<std::string> latent_files(const std::string& prefix, const LatentSizes& sizes) {
  std::vector<std::string> files{prefix + ".json"};
  for (const Matrix& m : matrices_of(sizes)) files.push_back(file_of(prefix, m.name));
  return files;
}

void write_latent_files(const std::string& prefix, const LatentWeights& w) {
  CHECK(w.part == whole(w.sizes) && w.sizes.rope.factor == 1, w.sizes.rope.factor);
  check_weights(w);
  const std::string job = std::to_string(::getpid());
  const std::string text = sizes_text(w.sizes);
  std::vector<OutputFile> files;
  for (const Matrix& m : matrices_of(w.sizes)) {
    const std::string header = npy_header(NpyHeader::Type::f4, m.shape);
    const auto bytes = std::as_bytes(std::span(w.*m.numbers));
    files.push_back(OutputFile::create(file_of(prefix, m.name),
                                       std::ssize(header) + std::ssize(bytes), job, header));
    files.back().write_at(std::ssize(header), bytes);
    files.back().sync();
  }
  files.push_back(OutputFile::create(prefix + ".json", std::ssize(text), job, text));
  for (OutputFile& file : files) file.commit();
}

LatentFiles::LatentFiles(const std::string& option, const std::string& prefix) {
  SizesFile json(option, prefix + ".json");
  sizes_ = json.sizes();
  text_ = json.text();
  paths_ = latent_files(prefix, sizes_);
  for (const Matrix& m : matrices_of(sizes_)) {
    const NpyReader& file = files_.emplace_back(file_of(prefix, m.name));
    if (file.header().shape == m.shape) continue;
    throw Failure(Exit::input,
                  fmt::format("{}: {} is [{}]; by {} it must be [{}]", option,
                              quoted_path(file.path()), fmt::join(file.header().shape, ", "),
                              quoted_path(paths_.front()), fmt::join(m.shape, ", ")));
  }
}

LatentWeights LatentFiles::read(Range heads) const {
  LatentWeights w{.sizes = sizes_, .part = whole(sizes_)};
  w.part.heads = heads;
  const std::vector<Matrix> matrices = matrices_of(sizes_);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    const NpyReader& file = files_[i];
    std::vector<float>& to = w.*m.numbers;
    if (m.heads == Heads::second) {
      const Index head = m.shape[2];
      to.resize(static_cast<std::size_t>(m.shape[0] * heads.size() * head));
      for (Index row = 0; row < m.shape[0]; ++row) {
        file.read_part(row, heads.begin * head, heads.size() * head,
                       to.data() + row * heads.size() * head);
      }
      continue;
    }
    const Range rows = m.heads == Heads::first ? heads : Range{0, m.shape[0]};
    to.resize(static_cast<std::size_t>(rows.size() * file.row_size()));
    file.read_rows(rows.begin, rows.size(), 1, to.data());
  }
  check_weights(w);
  return w;
}

std::string LatentFiles::sum() const {
  FileSum sum;
  sum.add(text_);
  for (const NpyReader& file : files_) sum.add(file);
  return sum.text();
}

}  // namespace dattn
