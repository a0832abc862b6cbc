#include "launcher/latent_files.hpp"

#include <unistd.h>

#include <array>
#include <nlohmann/json.hpp>
#include <span>

#include "kernels/check.hpp"
#include "launcher/npy.hpp"
#include "launcher/output_file.hpp"

namespace dattn {
namespace {

struct Matrix {
  const char* name;
  const std::vector<float>* numbers;
  std::vector<std::int64_t> shape;
};

constexpr std::array kNames{"down_kv", "kv_gamma", "up_q", "up_k", "up_v", "out"};

std::string file_of(const std::string& prefix, const char* name) {
  return prefix + "." + name + ".npy";
}

std::string sizes_text(const LatentSizes& s) {
  const nlohmann::json j{{"version", 1},
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

}  // namespace

std::vector<std::string> latent_files(const std::string& prefix) {
  std::vector<std::string> files{prefix + ".json"};
  for (const char* name : kNames) files.push_back(file_of(prefix, name));
  return files;
}

void write_latent_files(const std::string& prefix, const LatentWeights& w) {
  const LatentSizes& s = w.sizes;
  CHECK(w.part == whole(s) && s.q_rank == 0, s.q_rank);
  const std::array<Matrix, kNames.size()> matrices{{
      {kNames[0], &w.down_kv, {s.model, s.row()}},
      {kNames[1], &w.kv_gamma, {s.kv_rank}},
      {kNames[2], &w.up_q, {s.model, s.heads, s.d_qk()}},
      {kNames[3], &w.up_k, {s.heads, s.kv_rank, s.d_nope}},
      {kNames[4], &w.up_v, {s.heads, s.kv_rank, s.d_v}},
      {kNames[5], &w.out, {s.heads, s.d_v, s.model}},
  }};
  const std::string job = std::to_string(::getpid());
  const std::string text = sizes_text(s);
  std::vector<OutputFile> files;
  for (const Matrix& m : matrices) {
    const std::string header = npy_header(NpyHeader::Type::f4, m.shape);
    const auto bytes = std::as_bytes(std::span(*m.numbers));
    files.push_back(OutputFile::create(file_of(prefix, m.name),
                                       std::ssize(header) + std::ssize(bytes), job, header));
    files.back().write_at(std::ssize(header), bytes);
    files.back().sync();
  }
  files.push_back(OutputFile::create(prefix + ".json", std::ssize(text), job, text));
  for (OutputFile& file : files) file.commit();
}

}  // namespace dattn
