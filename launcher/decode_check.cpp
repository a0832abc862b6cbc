#include "launcher/decode_check.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernels/latent/reference.hpp"
#include "kernels/random.hpp"
#include "launcher/row_sum.hpp"
#include "parallel/latent_prefill.hpp"

namespace dattn {
namespace {

/// Rows that are read at a time.
constexpr Index kRows = 256;

DecodeVerdict joined(comm::Communicator& world, double error, double norm, double bound) {
  std::array<double, 2> sums{error, norm};
  world.all_reduce_sum(std::span<double>(sums));
  return {sums[1] > 0 ? std::sqrt(sums[0] / sums[1]) : std::sqrt(sums[0]), bound};
}

/// Some heads of a row that has all.
template <class E>
E* copy_heads(const E* row, const Ranges& heads, Index dim, E* to) {
  for (const Range r : heads) to = std::copy_n(row + r.begin * dim, r.size() * dim, to);
  return to;
}

/// Where the tokens of each sequence, counted from the first of its prefixes, lie in the cache.
class Places {
 public:
  explicit Places(const Decoding& decoding) {
    for (std::size_t s = 0; s < decoding.capacity.size(); ++s) {
      sequences_.push_back(decoding.seen(s, decoding.capacity[s] - 1));
    }
  }
  /// Calls f with the positions of these tokens, run by run.
  template <class F>
  void of(std::size_t sequence, const Runs& tokens, const F& f) const {
    for (const Run& run : tokens) {
      Index before = 0;
      for (const Range some : sequences_[sequence]) {
        const Range here = run.inside({before, before + some.size()});
        const Run part = run.part(here);
        if (!here.empty()) f(Run{some.begin + part.first - before, part.count, part.step});
        before += some.size();
      }
    }
  }

 private:
  std::vector<std::vector<Range>> sequences_;
};

}  // namespace

Hidden hidden_states(Index model, const Decoding& decoding, std::int64_t seed) {
  const std::uint64_t stream = mixed(static_cast<std::uint64_t>(seed) + 1);
  return [=, places = Places(decoding)](std::size_t sequence, const Runs& tokens, float* x) {
    places.of(sequence, tokens, [&](const Run& run) {
      for (Index i = 0; i < run.count; ++i) {
        const Index base = run.at(i) * model;
        for (Index d = 0; d < model; ++d) {
          *x++ = static_cast<float>(normal(stream, static_cast<std::uint64_t>(base + d)));
        }
      }
    });
  };
}

Hidden hidden_states(std::shared_ptr<const NpyReader> file, const Decoding& decoding) {
  return [file = std::move(file), places = Places(decoding)](std::size_t sequence,
                                                             const Runs& tokens, float* x) {
    places.of(sequence, tokens, [&](const Run& run) {
      file->read_rows(run.first, run.count, run.step, x);
      x += run.count * file->row_size();
    });
  };
}

template <class E>
void DecodeTensors::append_ragged(RaggedCache& cache, std::size_t sequence, Range tokens) const {
  const Index first = decoding_.first(sequence);
  std::vector<E> k(static_cast<std::size_t>(decoding_.key_heads * decoding_.d_qk));
  std::vector<E> v(static_cast<std::size_t>(decoding_.value_heads * decoding_.d_v));
  for (Index t = tokens.begin; t < tokens.end; ++t) {
    if (!cache.wants(sequence, t)) continue;
    source_.read(Kind::K, {{first + t, 1, 1}}, k.data());
    source_.read(Kind::V, {{first + t, 1, 1}}, v.data());
    cache.append(sequence, t, reinterpret_cast<const std::byte*>(k.data()),
                 reinterpret_cast<const std::byte*>(v.data()));
  }
}

template <class E>
void DecodeTensors::append_as(Decoder<comm::Communicator>& decoder, Range positions) const {
  KvCache& cache = decoder.cache();
  std::vector<E> row(static_cast<std::size_t>(
      std::max(decoding_.key_heads * decoding_.d_qk, decoding_.value_heads * decoding_.d_v)));
  for (Index p = positions.begin; p < positions.end; ++p) {
    const auto at = cache.row_of(p);
    if (!at) continue;
    const Runs position{{p, 1, 1}};
    source_.read(Kind::K, position, row.data());
    copy_heads(row.data(), cache.heads(Kind::K), decoding_.d_qk,
               reinterpret_cast<E*>(cache.keys(*at)));
    source_.read(Kind::V, position, row.data());
    copy_heads(row.data(), cache.heads(Kind::V), decoding_.d_v,
               reinterpret_cast<E*>(cache.values(*at)));
  }
}

void DecodeTensors::append_at(Decoder<comm::Communicator>& decoder, Range positions) const {
  decoding_.type == Type::bf16 ? append_as<BFloat16>(decoder, positions)
                               : append_as<float>(decoder, positions);
}

void DecodeTensors::append_prefixes(Decoder<comm::Communicator>& decoder) const {
  append_at(decoder, {0, decoding_.shared()});
}

void DecodeTensors::append(Decoder<comm::Communicator>& decoder, std::size_t sequence,
                           Range tokens) const {
  if (RaggedCache* ragged = decoder.ragged()) {
    decoding_.type == Type::bf16 ? append_ragged<BFloat16>(*ragged, sequence, tokens)
                                 : append_ragged<float>(*ragged, sequence, tokens);
    return;
  }
  const Index first = decoding_.first(sequence);
  append_at(decoder, {first + tokens.begin, first + tokens.end});
}

template <class E>
void DecodeTensors::ask_as(Decoder<comm::Communicator>& decoder,
                           std::span<const Index> lengths) const {
  std::vector<E> row(static_cast<std::size_t>(decoding_.query_heads * decoding_.d_qk));
  E* to = reinterpret_cast<E*>(decoder.queries().data());
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    for (Index t = lengths[s] - decoding_.queries; t < lengths[s]; ++t) {
      source_.read(Kind::Q, {{decoding_.first(s) + t, 1, 1}}, row.data());
      to = copy_heads(row.data(), decoder.asks(), decoding_.d_qk, to);
    }
  }
}

void DecodeTensors::ask(Decoder<comm::Communicator>& decoder,
                        std::span<const Index> lengths) const {
  decoding_.type == Type::bf16 ? ask_as<BFloat16>(decoder, lengths)
                               : ask_as<float>(decoder, lengths);
}

DecodeVerdict check_heads(comm::Communicator& world, const Decoder<comm::Communicator>& decoder,
                          const DecodeTensors& tensors, std::span<const Index> lengths,
                          const Scoring& scoring) {
  const Decoding& d = decoder.decoding();
  const Source& source = tensors.source();
  const Index heads = size(decoder.gets());
  const auto d_v = static_cast<std::size_t>(d.d_v);
  const Index rows = d.queries * static_cast<Index>(lengths.size());
  std::vector<float> o(static_cast<std::size_t>(rows * heads) * d_v);
  std::vector<float> lse(static_cast<std::size_t>(rows * heads));
  decoder.result(o, lse);
  struct Row {
    std::size_t sequence;
    Index token;
    std::vector<Range> seen;
    std::vector<double> q;
    std::vector<RowSum> sums;  ///< of the heads of gets()
  };
  std::vector<Row> all;
  for (std::size_t s = 0; s < lengths.size() && heads > 0; ++s) {
    for (Index t = lengths[s] - d.queries; t < lengths[s]; ++t) {
      std::vector<double> q(static_cast<std::size_t>(d.query_heads * d.d_qk));
      source.read(Kind::Q, {{d.first(s) + t, 1, 1}}, q.data());
      all.push_back({s, t, d.seen(s, t), std::move(q),
                     std::vector<RowSum>(static_cast<std::size_t>(heads),
                                         RowSum{.values = std::vector<double>(d_v)})});
    }
  }
  std::vector<double> k(static_cast<std::size_t>(kRows * d.key_heads * d.d_qk));
  std::vector<double> v(static_cast<std::size_t>(kRows * d.value_heads * d.d_v));
  // `place`: how many tokens the first of `keys` has before it in the row's sequence.
  const auto meet = [&](Row& row, Index first, Range keys, Index place) {
    const Index own = d.before(row.sequence) + row.token;
    const Mask* mask = d.masks.empty() ? nullptr : d.masks[row.sequence].get();
    const Index begin = d.first(row.sequence);
    auto sum = row.sums.begin();
    for (const Range range : decoder.gets()) {
      for (Index h = range.begin; h < range.end; ++h, ++sum) {
        const Index kh = h / (d.query_heads / d.key_heads);
        const Index vh = h / (d.query_heads / d.value_heads);
        for (Index i = keys.begin - first; i < keys.end - first; ++i) {
          if (mask != nullptr && !mask->allows(h, row.token, first + i - begin)) continue;
          const double* key = &k[static_cast<std::size_t>((i * d.key_heads + kh) * d.d_qk)];
          double product = 0;
          for (Index n = 0; n < d.d_qk; ++n) {
            product += row.q[static_cast<std::size_t>(h * d.d_qk + n)] * key[n];
          }
          const Index key_place = place + i - (keys.begin - first);
          const double score = score_of(scoring.score, h, own, key_place, product, 0).value;
          sum->add(score, &v[static_cast<std::size_t>((i * d.value_heads + vh) * d.d_v)]);
        }
      }
    }
  };
  // Keys that many rows see are read once for all of them.
  for (Range keys{0, 0}; keys.end < d.keys();) {
    keys = {keys.end, std::min(d.keys(), keys.end + kRows)};
    bool is_read = false;
    for (Row& row : all) {
      Index before = 0;
      for (const Range span : row.seen) {
        const Range some = intersect(span, keys);
        const Index place = before + some.begin - span.begin;
        before += span.size();
        if (some.empty()) continue;
        if (!is_read) {
          source.read(Kind::K, {{keys.begin, keys.size(), 1}}, k.data());
          source.read(Kind::V, {{keys.begin, keys.size(), 1}}, v.data());
          is_read = true;
        }
        meet(row, keys.begin, some, place);
      }
    }
  }
  for (Row& row : all) {
    auto sum = row.sums.begin();
    for (const Range range : decoder.gets()) {
      for (Index h = range.begin; h < range.end; ++h, ++sum) {
        if (scoring.sinks.empty()) continue;
        sum->add(static_cast<double>(scoring.sinks[static_cast<std::size_t>(h)]));
      }
    }
  }
  double error = 0;
  double norm = 0;
  const float* got = o.data();
  for (const Row& row : all) {
    for (const RowSum& sum : row.sums) {
      for (const double x : sum.values) {
        const double want = sum.weight > 0 ? x / sum.weight : 0;
        const double off = static_cast<double>(*got++) - want;
        error += off * off;
        norm += want * want;
      }
    }
  }
  return joined(world, error, norm, d.type == Type::bf16 ? 4e-3 : 1e-6);
}

DecodeVerdict check_latent(comm::Communicator& world, const MakeWeights& make,
                           const Decoding& decoding, std::span<const Index> lengths,
                           const Hidden& hidden, std::span<const float> y) {
  double error = 0;
  double norm = 0;
  std::optional<LatentWeights> weights;
  const Index model =
      static_cast<Index>(y.size()) / static_cast<Index>(lengths.size()) / decoding.queries;
  const auto part = static_cast<std::size_t>(decoding.queries * model);
  for (std::size_t s = static_cast<std::size_t>(world.rank()); s < lengths.size();
       s += static_cast<std::size_t>(world.size())) {
    if (!weights) weights = make({0, decoding.query_heads});
    const Index tokens = decoding.before(s) + lengths[s];
    std::vector<float> x(static_cast<std::size_t>(tokens * model));
    hidden(s, {{0, tokens, 1}}, x.data());
    const auto want = latent_reference(*weights, {x.data(), tokens, 1, model}, decoding.queries);
    for (std::size_t i = 0; i < part; ++i) {
      const double off = static_cast<double>(y[s * part + i]) - want[i];
      error += off * off;
      norm += want[i] * want[i];
    }
  }
  return joined(world, error, norm, decoding.type == Type::bf16 ? 8e-3 : 1e-5);
}

DecodeVerdict check_prefill(comm::Communicator& world, const MakeWeights& make,
                            const Decoding& decoding, std::span<const Index> lengths,
                            const Hidden& hidden, std::span<const float> y) {
  double error = 0;
  double norm = 0;
  const LatentWeights weights = make({0, decoding.query_heads});
  const Index model = weights.sizes.model;
  auto got = y.begin();
  for (const Stretch& stretch : decoding.stretches(lengths)) {
    const Run own = stretch.tokens(own_positions(stretch.keys, world.size(), world.rank()));
    if (own.count == 0) continue;
    const Index seen = own.at(own.count - 1) + 1;
    std::vector<float> x(static_cast<std::size_t>(seen * model));
    hidden(stretch.sequence(), {{0, seen, 1}}, x.data());
    for (const double want : latent_reference(weights, {x.data(), seen, 1, model}, Runs{own})) {
      const double off = static_cast<double>(*got++) - want;
      error += off * off;
      norm += want * want;
    }
  }
  return joined(world, error, norm, decoding.type == Type::bf16 ? 8e-3 : 1e-5);
}

}  // namespace dattn
