// Writes one layer of latent attention for the NumPy oracle: its weights, input and results, as
// NumPy files in a folder.
//
//   latent_dump FOLDER MODEL HEADS Q_RANK KV_RANK D_NOPE D_ROPE D_V TOKENS QUERIES FACTOR

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "kernels/latent/basis.hpp"
#include "launcher/npy.hpp"
#include "tests/kernels/latent.hpp"

namespace dattn {
namespace {

template <class T>
void write(const std::string& folder, const char* name, const std::vector<T>& numbers) {
  std::ofstream file(folder + "/" + name + ".npy", std::ios::binary);
  const std::int64_t extent = static_cast<std::int64_t>(numbers.size());
  file << npy_header(sizeof(T) == 4 ? NpyHeader::Type::f4 : NpyHeader::Type::f8, {&extent, 1});
  file.write(reinterpret_cast<const char*>(numbers.data()),
             static_cast<std::streamsize>(numbers.size() * sizeof(T)));
  if (!file) std::exit(5);
}

int dump(const std::string& folder, const std::vector<Index>& n) {
  LatentSizes sizes{.model = n[0],
                    .heads = n[1],
                    .q_rank = n[2],
                    .kv_rank = n[3],
                    .d_nope = n[4],
                    .d_rope = n[5],
                    .d_v = n[6]};
  sizes.rope.factor = static_cast<double>(n[9]);
  sizes.rope.original = 64;
  sizes.rope.mscale_all_dim = 0.7;
  if (const auto why = complaint(sizes)) return std::fprintf(stderr, "%s\n", why->c_str()), 2;
  const Index tokens = n[7];
  const Index queries = n[8];
  const LatentWeights w = random_weights(sizes, whole(sizes), 1);
  const Tensor<float> x = latent_input(sizes, tokens);
  write(folder, "down_q", w.down_q);
  write(folder, "q_gamma", w.q_gamma);
  write(folder, "up_q", w.up_q);
  write(folder, "down_kv", w.down_kv);
  write(folder, "kv_gamma", w.kv_gamma);
  write(folder, "up_k", w.up_k);
  write(folder, "up_v", w.up_v);
  write(folder, "out", w.out);
  write(folder, "x", x.numbers);
  const Range heads = w.part.heads;
  write(folder, "reference", latent_reference(w, x.view(), queries));
  write(folder, "absorbed", absorbed_layer<float>(w, heads, x.view(), queries, {}).numbers);
  write(folder, "expanded", expanded_layer<float>(w, heads, x.view(), queries, {}).numbers);
  write(folder, "absorbed_bf16", absorbed_layer<BFloat16>(w, heads, x.view(), queries, {}).numbers);
  Tensor<float> rows(tokens, 1, sizes.row());
  latent_rows(w, x.view(), {{0, tokens, 1}}, rows.view(), Work{});
  write(folder, "rows", rows.numbers);
  const View<const float> latents{rows.numbers.data(), tokens, 1, sizes.kv_rank, sizes.row()};
  const std::vector<float> u = pca_basis(latents);
  write(folder, "pca", u);
  write(folder, "rotated",
        absorbed_layer<float>(rotated(w, u), heads, x.view(), queries, {}).numbers);
  return 0;
}

}  // namespace
}  // namespace dattn

int main(int count, char** arguments) {
  if (count != 12) return std::fprintf(stderr, "see the top of latent_dump.cpp\n"), 2;
  std::vector<dattn::Index> numbers;
  for (int i = 2; i < count; ++i) numbers.push_back(std::atoll(arguments[i]));
  return dattn::dump(arguments[1], numbers);
}
