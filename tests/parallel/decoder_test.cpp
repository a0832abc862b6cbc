// Decoding step by step over threads, against attention in double by its definition.
#include "parallel/decoder.hpp"

#include <cmath>
#include <numeric>
#include <random>

#include "kernels/bfloat.hpp"
#include "kernels/settings.hpp"
#include "tests/parallel/on_all_ranks.hpp"
#include "tests/sanitized.hpp"

namespace dattn::testing {
namespace {

struct Batch {
  Decoding decoding;
  std::vector<Index> start;  ///< tokens of each sequence before the first step
  const char* text;
};

std::vector<PrefixLevel> prefixes(const char* words, Index sequences) {
  Settings settings(words, "levels=GxL");
  return read_prefix_tree(settings, sequences, 0, 0).levels;
}

std::vector<Batch> batches() {
  return {
      {{{9, 30, 17}, 1, 8, 2, 2, 8, 5, false, Type::f4}, {3, 25, 0}, "GQA"},
      {{{40}, 1, 5, 5, 5, 4, 4, false, Type::bf16}, {33}, "one sequence"},
      {{{12, 13}, 3, 6, 3, 2, 4, 6, false, Type::f4}, {0, 4}, "three tokens a step"},
      {{{20, 11}, 2, 4, 1, 1, 12, 8, true, Type::f4}, {11, 2}, "values in keys"},
      {{{8, 70}, 1, 16, 1, 1, 20, 16, true, Type::bf16}, {2, 60}, "values in keys, bf16"},
      {{{32, 39, 50}, 16, 4, 2, 2, 8, 4, false, Type::f4}, {0, 7, 18}, "16 tokens a step"},
      {{{6, 20, 4, 9, 4}, 2, 4, 2, 2, 8, 5, false, Type::f4, prefixes("levels=1x19:2x7x12", 5)},
       {2, 16, 0, 5, 0},
       "a tree of prefixes"},
      {{std::vector<Index>(24, 50), 1, 8, 2, 2, 8, 4, false, Type::bf16,
        prefixes("levels=3x400x1x90,sizes=19x1x4", 24)},
       std::vector<Index>(24, 48),
       "prefixes that many read"},
  };
}

/// Numbers by position, head and dim, as the cache and the queries hold them.
class Numbers {
 public:
  Numbers(const Decoding& d, unsigned seed) : d_(d) {
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, Index count) {
      to.resize(static_cast<std::size_t>(count));
      for (float& x : to) {
        x = normal(bits);
        if (d.type == Type::bf16) x = static_cast<float>(BFloat16(x));
      }
    };
    fill(q, d.keys() * d.query_heads * d.d_qk);
    fill(k, d.keys() * d.key_heads * d.d_qk);
    fill(v, d.keys() * d.value_heads * d.d_v);
  }
  const float* key(Index position, Index head) const {
    return &k[static_cast<std::size_t>((position * d_.key_heads + head) * d_.d_qk)];
  }
  const float* value(Index position, Index head) const {
    if (d_.values_in_keys) return key(position, head);
    return &v[static_cast<std::size_t>((position * d_.value_heads + head) * d_.d_v)];
  }
  const float* query(Index position, Index head) const {
    return &q[static_cast<std::size_t>((position * d_.query_heads + head) * d_.d_qk)];
  }

  /// O of one head of the token at `position` of a sequence, which sees its prefixes and what lies
  /// from the sequence's first token to itself; and behind it the LSE.
  std::vector<double> attention(Index sequence, Index position, Index head, double scale) const {
    const Index kh = head / (d_.query_heads / d_.key_heads);
    const Index vh = head / (d_.query_heads / d_.value_heads);
    std::vector<double> out(static_cast<std::size_t>(d_.d_v), 0);
    double sum = 0;
    const auto sees = [&](Index p) {
      for (const PrefixLevel& level : d_.prefixes) {
        for (std::size_t g = 0; g < level.groups(); ++g) {
          if (level.keys[g] <= p && p < level.keys[g + 1]) {
            return level.sequences[g] <= sequence && sequence < level.sequences[g + 1];
          }
        }
      }
      return d_.first(static_cast<std::size_t>(sequence)) <= p;
    };
    for (Index p = 0; p <= position; ++p) {
      if (!sees(p)) continue;
      double dot = 0;
      for (Index i = 0; i < d_.d_qk; ++i) {
        dot += static_cast<double>(query(position, head)[i]) * static_cast<double>(key(p, kh)[i]);
      }
      const double weight = std::exp(scale * dot);
      sum += weight;
      for (Index i = 0; i < d_.d_v; ++i) {
        out[static_cast<std::size_t>(i)] += weight * static_cast<double>(value(p, vh)[i]);
      }
    }
    for (double& x : out) x /= sum;
    out.push_back(std::log(sum));
    return out;
  }

 private:
  const Decoding& d_;
  std::vector<float> q, k, v;
};

/// Heads `heads` of a row as the type of the cache has them.
template <class Row>
void write(std::byte* to, const Ranges& heads, Index dim, Type type, const Row& row) {
  for (const Range range : heads) {
    for (Index h = range.begin; h < range.end; ++h) {
      for (Index i = 0; i < dim; ++i, to += bytes_of(type)) {
        const float x = row(h)[i];
        if (type == Type::bf16) {
          const BFloat16 narrow(x);
          std::memcpy(to, &narrow, sizeof narrow);
        } else {
          std::memcpy(to, &x, sizeof x);
        }
      }
    }
  }
}

void decode(const Batch& batch, const Strategy& form, std::optional<Mesh> mesh,
            comm::Loopback::Endpoint& end) {
  const Decoding& d = batch.decoding;
  const Numbers numbers(d, 5);
  const double scale = 1 / std::sqrt(static_cast<double>(d.d_qk));
  Decoder<comm::Loopback::Endpoint> decoder(d, form, mesh, end,
                                            {.score = {.scale = scale}, .checked = true});
  std::vector<Index> lengths = batch.start;
  const auto append = [&](Index position) {
    const auto row = decoder.cache().row_of(position);
    if (!row) return;
    write(decoder.cache().keys(*row), decoder.cache().heads(Kind::K), d.d_qk, d.type,
          [&](Index h) { return numbers.key(position, h); });
    if (d.values_in_keys) return;
    write(decoder.cache().values(*row), decoder.cache().heads(Kind::V), d.d_v, d.type,
          [&](Index h) { return numbers.value(position, h); });
  };
  for (Index position = 0; position < d.shared(); ++position) append(position);
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    for (Index t = 0; t < lengths[s]; ++t) append(d.first(s) + t);
  }
  double error = 0;
  double reference = 0;
  for (int step = 0; step < 2; ++step) {
    std::byte* q = decoder.queries().data();
    const Index q_row = size(decoder.asks()) * d.d_qk * bytes_of(d.type);
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      for (Index t = 0; t < d.queries; ++t, ++lengths[s], q += q_row) {
        const Index position = d.first(s) + lengths[s];
        append(position);
        write(q, decoder.asks(), d.d_qk, d.type,
              [&](Index h) { return numbers.query(position, h); });
      }
    }
    const RunTimes times = decoder.step(lengths);
    EXPECT_EQ(times.bytes_sent,
              decoder.rehearsal().bytes_sent[static_cast<std::size_t>(end.rank())]);
    // Partials meet in one collective, or by heads: a message from each rank of the group to each.
    const int others = decoder.problem().mesh().axes[0].size - 1;
    EXPECT_EQ(times.collectives, form.name == "tree" && others > 0 ? 1 : 0);
    if (form.name == "tree" || form.name == "heads") {
      EXPECT_EQ(times.messages, times.collectives);
    } else if (form.name == "helix" && d.query_heads >= end.size()) {
      EXPECT_EQ(times.messages, others);
    }
    const Index heads = size(decoder.gets());
    const Index rows = d.queries * static_cast<Index>(lengths.size());
    std::vector<float> o(static_cast<std::size_t>(rows * heads * d.d_v));
    std::vector<float> lse(static_cast<std::size_t>(rows * heads));
    decoder.result(o, lse);
    const float* got = o.data();
    const float* got_lse = lse.data();
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      for (Index t = 0; t < d.queries; ++t) {
        const Index position = d.first(s) + lengths[s] - d.queries + t;
        for (const Range range : decoder.gets()) {
          for (Index h = range.begin; h < range.end; ++h) {
            auto wanted = numbers.attention(static_cast<Index>(s), position, h, scale);
            EXPECT_NEAR(static_cast<double>(*got_lse++), wanted.back(), 1e-5) << batch.text;
            wanted.pop_back();
            for (const double want : wanted) {
              const double off = static_cast<double>(*got++) - want;
              error += off * off;
              reference += want * want;
            }
          }
        }
      }
    }
  }
  const double bound = d.type == Type::bf16 ? 4e-3 : 1e-6;
  EXPECT_LE(std::sqrt(error), bound * std::sqrt(reference))
      << form.name << ", " << batch.text << ", rank " << end.rank() << " of " << end.size();
}

TEST(Decoder, AgreesWithTheDefinitionInEveryForm) {
  for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
    if (kSanitized && ranks > 4) continue;
    for (const Strategy& form : decode_forms()) {
      for (const Batch& batch : batches()) {
        const Mode mode{"delayed", ranks % 2 == 0, 2};
        on_all_ranks(ranks, mode, 3, [&](comm::Loopback::Endpoint& end) {
          decode(batch, form, std::nullopt, end);
        });
      }
    }
  }
}

TEST(Decoder, TakesMeshesOfTokensAndHeads) {
  for (const char* name : {"helix", "tree"}) {
    for (const auto& [tokens, heads] : {std::pair{2, 2}, {1, 4}, {3, 2}, {2, 3}}) {
      const Mesh mesh{{{"tokens", tokens}, {"heads", heads}}};
      for (const Batch& batch : batches()) {
        on_all_ranks(mesh.ranks(), {"eager", false, 1}, 3, [&](comm::Loopback::Endpoint& end) {
          decode(batch, *find_decode_form(name), mesh, end);
        });
      }
    }
  }
}

TEST(Decoder, GivesEveryHeadToOneRankAndEveryTokenToOneOfEachColumn) {
  const Decoding d = batches()[0].decoding;
  const std::vector<Index> lengths{9, 21, 4};
  for (const Strategy& form : decode_forms()) {
    for (const int ranks : {1, 2, 3, 4, 6}) {
      const Problem problem = decoding_problem(d, form.mesh(ranks, {3, 56, 8, 2, 2, 8, 5}));
      const Plan plan = make_plan(form, problem);
      EXPECT_FALSE(rehearse(problem, plan).fault) << form.name << ", " << ranks;
      std::vector<Range> heads;
      Index count = 0;
      Index bytes = 0;
      for (const Program& program : plan) {
        const Ranges& own = program.result(Kind::O).block.heads;
        heads.insert(heads.end(), own.begin(), own.end());
        count += size(own);
        bytes += KvCache(problem, program, false).bytes(lengths, d);
      }
      EXPECT_EQ(union_of(heads), (Ranges{{0, 8}}));
      EXPECT_EQ(count, 8);
      // A key head is on as many ranks as share its query heads; of tokens nothing is there twice.
      const int columns = problem.mesh().axes[1].size;
      Index held = 0;
      for (const Ranges& column : problem.placement(columns).heads) {
        held += size(heads_touched(Kind::K, column, problem.shape()));
      }
      EXPECT_EQ(bytes, (9 + 21 + 4) * held * (8 + 5) * 4) << form.name << ", " << ranks;
    }
  }
}

TEST(Decoder, ComplainsOfWhatCannotBe) {
  const Decoding good = batches()[0].decoding;
  EXPECT_FALSE(complaint(good));
  const auto says = [](Decoding d, const char* what) {
    EXPECT_NE(complaint(d).value_or("").find(what), std::string::npos) << complaint(d).value_or("");
  };
  Decoding bad = good;
  bad.capacity = {};
  says(bad, "no sequence");
  bad = good;
  bad.queries = 10;
  says(bad, "cannot have 10 new ones");
  bad = good;
  bad.values_in_keys = true;
  bad.value_heads = 1;
  says(bad, "values lie in keys");
  bad = good;
  bad.prefixes = prefixes("levels=1x5", 4);
  says(bad, "prefixes of 4 sequences for a batch of 3");
  bad = good;
  bad.type = Type::f8;
  says(bad, "f4 or bf16");
}

}  // namespace
}  // namespace dattn::testing
