#include "parallel/decoder.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "kernels/check.hpp"
#include "parallel/served.hpp"

namespace dattn {
namespace {

/// What a sequence shares with others, level by level.
std::vector<Range> prefixes_of(const Decoding& decoding, std::size_t sequence) {
  std::vector<Range> found;
  for (const PrefixLevel& level : decoding.prefixes) {
    append(found, 0, level.keys_of(level.group_of(static_cast<Index>(sequence))));
  }
  return found;
}

/// Each new token sees its prefixes, and what its sequence has in the cache, up to itself.
class Filled final : public Mask {
 public:
  Filled(const Decoding& decoding, std::span<const Index> lengths)
      : new_(decoding.queries),
        first_query_(decoding.keys() - new_ * static_cast<Index>(lengths.size())) {
    Index first = decoding.shared();
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      shared_.push_back(prefixes_of(decoding, s));
      firsts_.push_back(first);
      lengths_.push_back(lengths[s]);
      first += decoding.capacity[s];
    }
  }

  bool allows(Index, Index query, Index key) const override {
    const auto holds = [&](Range some) { return some.contains(key); };
    const std::vector<Range>& shared = shared_[sequence(query)];
    return own(query).contains(key) || std::any_of(shared.begin(), shared.end(), holds);
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const std::size_t first = out.size();
    for (const Range some : shared_[sequence(query)]) append(out, first, intersect(some, keys));
    append(out, first, intersect(own(query), keys));
  }
  Index variant(Index) const override { return 0; }
  Index heads() const override { return 1; }
  std::string spec() const override { return "filled"; }

 private:
  std::size_t sequence(Index query) const {
    return static_cast<std::size_t>((query - first_query_) / new_);
  }
  Range own(Index query) const {
    const std::size_t s = sequence(query);
    return {firsts_[s], firsts_[s] + lengths_[s] - new_ + (query - first_query_) % new_ + 1};
  }

  Index new_;
  Index first_query_;
  std::vector<std::vector<Range>> shared_;  ///< by sequence
  std::vector<Index> firsts_, lengths_;
};

MaskPtr filled(const Decoding& decoding, std::span<const Index> lengths) {
  if (!decoding.masks.empty()) return seen_of_batch(decoding, lengths);
  return std::make_shared<const Filled>(decoding, lengths);
}

std::string count(Index n) { return std::to_string(n); }

Shape shape_of(const Decoding& d) {
  return {d.queries * static_cast<Index>(d.capacity.size()),
          d.keys(),
          d.query_heads,
          d.key_heads,
          d.value_heads,
          d.d_qk,
          d.d_v};
}

}  // namespace

Index Decoding::shared() const { return prefixes.empty() ? 0 : prefixes.back().keys.back(); }

Index Decoding::keys() const { return first(capacity.size()); }

Index Decoding::first(std::size_t sequence) const {
  return std::accumulate(capacity.begin(), capacity.begin() + static_cast<std::ptrdiff_t>(sequence),
                         shared());
}

Index Decoding::before(std::size_t sequence) const {
  Index tokens = 0;
  for (const Range prefix : prefixes_of(*this, sequence)) tokens += prefix.size();
  return tokens;
}

std::vector<Stretch> Decoding::stretches(std::span<const Index> lengths) const {
  std::vector<Stretch> found;
  std::vector<Index> before(capacity.size(), 0);  // of each sequence, the levels so far
  for (const PrefixLevel& level : prefixes) {
    for (std::size_t g = 0; g < level.groups(); ++g) {
      const Range sharing = level.sequences_of(g);
      if (sharing.empty()) continue;
      const Index so_far = before[static_cast<std::size_t>(sharing.begin)];
      found.push_back({level.keys_of(g), sharing, so_far});
      for (Index s = sharing.begin; s < sharing.end; ++s) {
        before[static_cast<std::size_t>(s)] += level.keys_of(g).size();
      }
    }
  }
  Index begin = shared();
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    const auto n = static_cast<Index>(s);
    found.push_back({{begin, begin + lengths[s]}, {n, n + 1}, before[s]});
    begin += capacity[s];
  }
  return found;
}

std::vector<Range> Decoding::seen(std::size_t sequence, Index token) const {
  std::vector<Range> found = prefixes_of(*this, sequence);
  append(found, 0, {first(sequence), first(sequence) + token + 1});
  return found;
}

std::optional<std::string> complaint(const Decoding& d) {
  if (d.capacity.empty()) return "there is no sequence: give one at least";
  if (d.queries < 1) return "new tokens of a step: at least 1, not " + count(d.queries);
  for (const Index tokens : d.capacity) {
    if (tokens >= d.queries) continue;
    return "a sequence of " + count(tokens) + " tokens cannot have " + count(d.queries) +
           " new ones: give it more";
  }
  if (d.values_in_keys && (d.key_heads != d.value_heads || d.d_v > d.d_qk)) {
    return "values lie in keys, so heads must be the same and d_v at most d_qk";
  }
  if (!d.masks.empty() && (d.masks.size() != d.capacity.size() || d.values_in_keys)) {
    return "masks are of sequences, one each, whose values do not lie in keys";
  }
  if (!d.masks.empty() && !d.prefixes.empty()) {
    return "sequences under masks share no prefixes";
  }
  if (d.type == Type::f8) return "the cache is f4 or bf16, not f8";
  const auto sequences = static_cast<Index>(d.capacity.size());
  for (const PrefixLevel& level : d.prefixes) {
    if (level.sequences.back() == sequences) continue;
    return "prefixes of " + count(level.sequences.back()) + " sequences for a batch of " +
           count(sequences) + ": give those of as many";
  }
  return complaint(shape_of(d));
}

Problem decoding_problem(const Decoding& decoding, const Mesh& mesh) {
  const Problem even =
      Problem(shape_of(decoding),
              decoding.masks.empty() ? filled(decoding, decoding.capacity) : may_be_seen(decoding),
              mesh, "striped", decoding.type)
          .caching(true);
  if (decoding.speeds.equal()) return even;
  CHECK(decoding.speeds.size() == mesh.ranks() && mesh.axes.size() == 2, mesh.text());
  constexpr int kHeads = 1;
  std::vector<double> speeds;
  for (int r = 0; r < mesh.ranks(); ++r) {
    double slowest = 1;
    for (const int other : mesh.group(r, kHeads)) {
      slowest = std::min(slowest, decoding.speeds.of(other));
    }
    speeds.push_back(slowest);
  }
  return even.with_keys_by(Speeds(speeds));
}

KvCache::KvCache(const Problem& problem, const Program& program, bool values_in_keys)
    : values_in_keys_(values_in_keys), rows_(static_cast<std::size_t>(problem.shape().keys), -1) {
  for (const Kind kind : {Kind::K, Kind::V}) {
    const auto i = static_cast<std::size_t>(kind == Kind::V);
    blocks_[i] = program.slots[static_cast<std::size_t>(program.input(kind))].block;
    row_bytes_[i] = blocks_[i].head_count() * record_bytes(kind, problem.shape(), problem.type());
    if (kind == Kind::V && values_in_keys) break;
    memory_[i] = Reserved(bytes_of(blocks_[i], problem.shape(), problem.type()), true);
  }
  Index row = 0;
  for (const Run& run : problem.keys().positions(blocks_[0].rows)) {
    for (Index n = 0; n < run.count; ++n) rows_[static_cast<std::size_t>(run.at(n))] = row++;
  }
}

std::optional<Index> KvCache::row_of(Index position) const {
  const Index row = rows_[static_cast<std::size_t>(position)];
  return row < 0 ? std::nullopt : std::optional(row);
}

std::byte* KvCache::keys(Index row) { return memory_[0].get() + row * row_bytes_[0]; }

std::byte* KvCache::values(Index row) {
  CHECK(!values_in_keys_);
  return memory_[1].get() + row * row_bytes_[1];
}

Index KvCache::row_bytes(Kind kind) const { return row_bytes_[kind == Kind::V ? 1 : 0]; }

const Ranges& KvCache::heads(Kind kind) const { return blocks_[kind == Kind::V ? 1 : 0].heads; }

Index KvCache::bytes(std::span<const Index> lengths, const Decoding& decoding) const {
  const auto held = [&](Range positions) {
    return std::count_if(rows_.begin() + positions.begin, rows_.begin() + positions.end,
                         [](Index row) { return row >= 0; });
  };
  Index rows = held({0, decoding.shared()});
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    rows += held({decoding.first(s), decoding.first(s) + lengths[s]});
  }
  return rows * (row_bytes_[0] + (values_in_keys_ ? 0 : row_bytes_[1]));
}

namespace {

Plan proved(const Strategy& form, const Problem& problem, bool merges, Rehearsal& rehearsal) {
  if (const auto why = form.refuses(problem)) {
    throw std::invalid_argument(std::string(form.name) + " " + *why);
  }
  Plan plan = make_plan(form, problem);
  rehearsal = rehearse(problem, plan);
  if (rehearsal.fault) throw std::logic_error(rehearsal.fault->text());
  if (merges) return plan;
  CHECK(form.name == "sequence", form.name);
  for (Program& program : plan) program = partials_program(problem, program.rank);
  return plan;
}

}  // namespace

template <comm::Transport T>
Decoder<T>::Decoder(const Decoding& decoding, const Strategy& form, std::optional<Mesh> mesh,
                    T& transport, EngineOptions options, const Hosts& hosts, bool merges)
    : decoding_(decoding),
      rank_(transport.rank()),
      problem_(
          decoding_problem(decoding, mesh ? *mesh : form.mesh(transport.size(), shape_of(decoding)))
              .across(hosts)),
      plan_(proved(form, problem_, merges, rehearsal_)),
      engine_([&] {
        // What sequences share is read once for all of them: the kernel finds who reads what.
        options.rows_at_once = decoding.prefixes.empty() ? decoding.queries : 0;
        if (!decoding.masks.empty()) {
          ragged_.emplace(decoding_, problem_, program());
          options.attend = attends_ragged();
        } else if (!options.score.alibi.empty() || !options.score.bias.empty()) {
          options.attend = attends_by_distance();
        }
        return std::make_unique<Engine<T>>(problem_, program(), transport, options);
      }()) {
  const Program& mine = program();
  if (ragged_) {  // nobody reads what is bound here
    static constexpr std::byte kNothing{};
    engine_->bind(mine.input(Kind::K), &kNothing, decoding.d_qk * bytes_of(decoding.type));
    engine_->bind(mine.input(Kind::V), &kNothing, decoding.d_v * bytes_of(decoding.type));
    return;
  }
  cache_.emplace(problem_, mine, decoding.values_in_keys);
  const Index keys = cache_->row_bytes(Kind::K);
  engine_->bind(mine.input(Kind::K), cache_->keys(), keys);
  if (decoding.values_in_keys) {
    engine_->bind(mine.input(Kind::V), cache_->keys(), keys);
  } else {
    engine_->bind(mine.input(Kind::V), cache_->values(), cache_->row_bytes(Kind::V));
  }
}

template <comm::Transport T>
auto Decoder<T>::attends_ragged() const -> decltype(EngineOptions::attend) {
  return [this](const Attend& step, const std::byte* q, const std::byte*, std::byte* out,
                const Mask&, const Work& work) {
    const Block& block = program().slots[static_cast<std::size_t>(step.q)].block;
    const auto as = [&]<class E>(E) {
      const View<const E> queries{reinterpret_cast<const E*>(q), block.row_count(),
                                  block.head_count(), decoding_.d_qk};
      const View<float> records{reinterpret_cast<float*>(out), block.row_count(),
                                block.head_count(), decoding_.d_v + 2};
      ragged_->attend(queries, records, block.heads, lengths_, work);
    };
    decoding_.type == Type::bf16 ? as(BFloat16{}) : as(float{});
  };
}

template <comm::Transport T>
auto Decoder<T>::attends_by_distance() const -> decltype(EngineOptions::attend) {
  CHECK(!decoding_.values_in_keys);
  Shape longest = shape_of(decoding_);
  longest.queries = longest.keys;  // no token stands behind so many
  return [this, up_to_itself = parse_mask("causal", longest)](
             const Attend& step, const std::byte* q, const std::byte*, std::byte* out, const Mask&,
             const Work& work) {
    const auto as = [&]<class E>(E) {
      for (const Served& s : served(program(), problem_, step, {})) {
        attend_by_distance<E>(step, q, out, s, *up_to_itself, work);
      }
    };
    decoding_.type == Type::bf16 ? as(BFloat16{}) : as(float{});
  };
}

template <comm::Transport T>
template <class E>
void Decoder<T>::attend_by_distance(const Attend& step, const std::byte* q, std::byte* out,
                                    const Served& s, const Mask& up_to_itself,
                                    const Work& work) const {
  const auto heads = [&](SlotId slot) {
    return program().slots[static_cast<std::size_t>(slot)].block.head_count();
  };
  const Index new_tokens = decoding_.queries;
  const Index rows = new_tokens * std::ssize(lengths_);
  const auto view = [](const std::byte* memory, Index rows_in, Index heads_in, Index dim) {
    return View<const E>{reinterpret_cast<const E*>(memory), rows_in, heads_in, dim};
  };
  const Index held = size(s.where.keys);
  const View<const E> queries = view(q, rows, heads(step.q), decoding_.d_qk).only(s.q);
  const View<const E> keys = view(cache_->keys(), held, heads(step.k), decoding_.d_qk).only(s.k);
  const View<const E> values = view(cache_->values(), held, heads(step.v), decoding_.d_v).only(s.v);
  const View<float> records =
      View<float>{reinterpret_cast<float*>(out), rows, heads(step.out), decoding_.d_v + 2}.only(
          s.q);
  for (const Stretch& stretch : decoding_.stretches(lengths_)) {
    Where where = s.where;
    where.queries.clear();
    for (Index n = stretch.sequences.begin; n < stretch.sequences.end; ++n) {
      const auto sequence = static_cast<std::size_t>(n);
      const Index token = decoding_.before(sequence) + lengths_[sequence] - new_tokens;
      where.queries.push_back({token, new_tokens, 1});
    }
    const Range some{stretch.sequences.begin * new_tokens, stretch.sequences.end * new_tokens};
    Index row = 0;  // of the cache
    for (const Run& run : s.where.keys) {
      const Range members = run.inside(stretch.keys);
      const Range there{row + members.begin, row + members.end};
      row += run.count;
      if (there.empty()) continue;
      where.keys = {stretch.tokens(run.part(members))};
      dattn::attend(queries.part(some), keys.part(there), values.part(there), records.part(some),
                    where, up_to_itself, work);
    }
  }
}

template <comm::Transport T>
const Ranges& Decoder<T>::asks() const {
  const Program& mine = program();
  return mine.slots[static_cast<std::size_t>(mine.input(Kind::Q))].block.heads;
}

template <comm::Transport T>
const Ranges& Decoder<T>::gets() const {
  return program().result(Kind::O).block.heads;
}

template <comm::Transport T>
std::span<std::byte> Decoder<T>::queries() {
  return engine_->input(program().input(Kind::Q));
}

template <comm::Transport T>
RunTimes Decoder<T>::step(std::span<const Index> lengths) {
  CHECK(lengths.size() == decoding_.capacity.size(), lengths.size(), decoding_.capacity.size());
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    CHECK(decoding_.queries <= lengths[s] && lengths[s] <= decoding_.capacity[s], s, lengths[s],
          decoding_.capacity[s]);
  }
  lengths_.assign(lengths.begin(), lengths.end());
  filled_ = filled(decoding_, lengths);
  engine_->narrow(*filled_);
  return engine_->run();
}

template class Decoder<comm::Communicator>;
template class Decoder<comm::Loopback::Endpoint>;

}  // namespace dattn
