// Decoding under masks over threads: O against attention in double by the mask's definition, and
// what the cache keeps against brute force over it.
#include "parallel/ragged_cache.hpp"

#include <cmath>
#include <cstring>

#include "kernels/random.hpp"
#include "parallel/cache.hpp"
#include "parallel/decoder.hpp"
#include "tests/parallel/on_all_ranks.hpp"

namespace dattn::testing {
namespace {

constexpr Index kQk = 8;
constexpr Index kV = 4;

/// One number of Q (stream 0), K (1) or V (2).
float number(std::uint64_t stream, Index position, Index head, Index i) {
  return static_cast<float>(
      normal(mixed(stream), static_cast<std::uint64_t>((position * 64 + head) * 16 + i)));
}

struct Job {
  std::string mask;
  std::vector<Index> context;
  Index fresh;  ///< new tokens of a step
  Index query_heads, key_heads;
};

std::vector<Job> jobs() {
  return {{"stream:sink=3,recent=9", {40, 0, 17}, 1, 4, 2},
          {"s2:block=4,local=2,stride=3,step=1", {61}, 1, 6, 3},
          {"causal@0-1;window:7,0@2-5;stream:sink=2,recent=4@6-7", {33, 50}, 3, 8, 4},
          {"dilated:5,0,3", {29, 29}, 2, 3, 1},
          // Long enough to be taken residue by residue.
          {"dilated:200,0,3", {900, 780}, 1, 4, 2},
          {"dilated:100,50,2/sink:5@0-1;dilated:300,0,3@2-3", {1700}, 2, 4, 2}};
}

constexpr int kSteps = 6;

Decoding decoding_of(const Job& job) {
  Decoding d{.capacity = {},
             .queries = job.fresh,
             .query_heads = job.query_heads,
             .key_heads = job.key_heads,
             .value_heads = job.key_heads,
             .d_qk = kQk,
             .d_v = kV};
  for (const Index tokens : job.context) {
    const Index n = tokens + kSteps * job.fresh;
    d.capacity.push_back(n);
    d.masks.push_back(
        parse_mask(job.mask, {n, n, job.query_heads, job.key_heads, job.key_heads, kQk, kV}));
  }
  return d;
}

/// Whether a query from `next` on sees the token with a head that reads the key head.
bool due(const Decoding& d, std::size_t s, Index key_head, Index token, Index next) {
  const Index group = d.query_heads / d.key_heads;
  for (Index h = key_head * group; h < (key_head + 1) * group; ++h) {
    for (Index q = std::max(next, token); q < d.capacity[s]; ++q) {
      if (d.masks[s]->allows(h, q, token)) return true;
    }
  }
  return false;
}

void run(const Job& job, const Strategy& form, comm::Loopback::Endpoint& end) {
  const Decoding d = decoding_of(job);
  const double scale = 1 / std::sqrt(static_cast<double>(kQk));
  Decoder<comm::Loopback::Endpoint> decoder(d, form, std::nullopt, end,
                                            {.score = {.scale = scale}, .checked = true});
  RaggedCache& cache = *decoder.ragged();
  const auto append = [&](std::size_t s, Index token) {
    if (!cache.wants(s, token)) return;
    std::vector<float> k, v;
    for (Index h = 0; h < d.key_heads; ++h) {
      for (Index i = 0; i < kQk; ++i) k.push_back(number(1, d.first(s) + token, h, i));
      for (Index i = 0; i < kV; ++i) v.push_back(number(2, d.first(s) + token, h, i));
    }
    cache.append(s, token, reinterpret_cast<const std::byte*>(k.data()),
                 reinterpret_cast<const std::byte*>(v.data()));
  };
  std::vector<Index> lengths = job.context;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    cache.advance(s, lengths[s]);
    for (Index t = 0; t < lengths[s]; ++t) append(s, t);
  }
  const Block& keys =
      decoder.program().slots[static_cast<std::size_t>(decoder.program().input(Kind::K))].block;
  double error = 0;
  double norm = 0;
  for (int step = 0; step < kSteps; ++step) {
    auto* q = reinterpret_cast<float*>(decoder.queries().data());
    std::vector<Index> kept(static_cast<std::size_t>(d.key_heads), 0);
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      cache.advance(s, lengths[s]);
      for (Index t = 0; t < d.queries; ++t, ++lengths[s]) {
        append(s, lengths[s]);
        for (const Range heads : decoder.asks()) {
          for (Index h = heads.begin; h < heads.end; ++h) {
            for (Index i = 0; i < kQk; ++i) *q++ = number(0, d.first(s) + lengths[s], h, i);
          }
        }
      }
      for (const Run& own : decoder.problem().keys().positions(keys.rows)) {
        for (Index n = 0; n < own.count; ++n) {
          const Index token = own.at(n) - d.first(s);
          if (token < 0 || token >= lengths[s]) continue;
          for (const Range heads : keys.heads) {
            for (Index h = heads.begin; h < heads.end; ++h) {
              kept[static_cast<std::size_t>(h)] += due(d, s, h, token, lengths[s] - d.queries);
            }
          }
        }
      }
    }
    EXPECT_EQ(cache.tokens(), kept) << job.mask << ", " << form.name << ", step " << step;
    EXPECT_LE(cache.bytes(), cache.held_bytes());
    EXPECT_LE(15 * cache.held_bytes(), 16 * cache.bytes() + 16 * 16 * (kQk + kV) * 4);
    decoder.step(lengths);
    const auto rows = d.queries * std::ssize(lengths);
    std::vector<float> lse(static_cast<std::size_t>(rows * size(decoder.gets())));
    std::vector<float> o(lse.size() * kV);
    decoder.result(o, lse);
    const float* got = o.data();
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      for (Index t = lengths[s] - d.queries; t < lengths[s]; ++t) {
        for (const Range heads : decoder.gets()) {
          for (Index h = heads.begin; h < heads.end; ++h) {
            const Index kh = h * d.key_heads / d.query_heads;
            double sum = 0;
            std::vector<double> want(kV, 0);
            for (Index key = 0; key <= t; ++key) {
              if (!d.masks[s]->allows(h, t, key)) continue;
              double dot = 0;
              for (Index i = 0; i < kQk; ++i) {
                dot += static_cast<double>(number(0, d.first(s) + t, h, i)) *
                       static_cast<double>(number(1, d.first(s) + key, kh, i));
              }
              const double weight = std::exp(scale * dot);
              sum += weight;
              for (Index i = 0; i < kV; ++i) {
                want[static_cast<std::size_t>(i)] +=
                    weight * static_cast<double>(number(2, d.first(s) + key, kh, i));
              }
            }
            for (const double x : want) {
              const double off = static_cast<double>(*got++) - x / sum;
              error += off * off;
              norm += x / sum * (x / sum);
            }
          }
        }
      }
    }
  }
  EXPECT_LE(std::sqrt(error), 1e-6 * std::sqrt(norm))
      << job.mask << ", " << form.name << ", rank " << end.rank() << " of " << end.size();
}

TEST(RaggedCache, KeepsWhatIsDueAndAttendsToIt) {
  for (const int ranks : {1, 3, 4}) {
    for (const Strategy& form : decode_forms()) {
      for (const Job& job : jobs()) {
        on_all_ranks(ranks, {"delayed", ranks % 2 == 0, 2}, 3,
                     [&](comm::Loopback::Endpoint& end) { run(job, form, end); });
      }
    }
  }
}

// What `dattn plan` says that ranks must keep.
TEST(RaggedCache, KeepsWhatPlansSay) {
  const Index n = 96;
  for (const std::string mask : {"s2:block=8,local=2,stride=4,step=1", "stream:sink=4,recent=10"}) {
    const Job job{mask, {n}, 1, 8, 4};
    const Decoding d = decoding_of(job);
    const Shape whole{n, n, 8, 4, 4, kQk, kV};
    const CacheNeed need =
        cache_need(Problem(whole, parse_mask(mask, whole), line(3), "striped"), kSteps);
    const Strategy& form = *find_decode_form("sequence");
    const Problem problem = decoding_problem(d, form.mesh(3, whole));
    for (int r = 0; r < 3; ++r) {
      RaggedCache cache(d, problem, form.program(problem, r));
      cache.advance(0, n);
      const std::vector<std::byte> row(4 * kQk * 4);
      for (Index t = 0; t < n; ++t) {
        if (cache.wants(0, t)) cache.append(0, t, row.data(), row.data());
      }
      EXPECT_EQ(cache.tokens(), need.keys[static_cast<std::size_t>(r)]) << mask << ", rank " << r;
      EXPECT_EQ(ragged_bytes(d, problem, form.program(problem, r), job.context) - cache.bytes(),
                (kSteps + 2 - r) / 3 * 4 * (kQk + kV) * 4)
          << "only the tokens to come are missing";
    }
  }
}

}  // namespace
}  // namespace dattn::testing
