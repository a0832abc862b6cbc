// The kernels of kernels/isa/ behind their table, one by one, against plain sums in double.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/bfloat.hpp"
#include "kernels/isa.hpp"
#include "kernels/isa/amx_emulated.hpp"
#include "kernels/isa/kernel.hpp"
#include "kernels/range.hpp"
#include "tests/normal.hpp"
#include "tests/sanitized.hpp"

namespace dattn {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kInfF = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

struct Subject {
  std::string name;
  const Kernel* kernel;
  Element element;
};

std::vector<Subject> subjects() {
  std::vector<Subject> all;
  for (const Isa* isa : available_isas()) {
    const std::string name = isa->name;
    const bool again = std::any_of(all.begin(), all.end(), [&](const Subject& other) {
      return other.kernel == isa->f4 && other.element == Element::f4;
    });
    if (isa->f4 != nullptr && !again) all.push_back({name + "_f4", isa->f4, Element::f4});
    if (isa->bf16 != nullptr) all.push_back({name + "_bf16", isa->bf16, Element::bf16});
  }
  all.push_back({"amx_emulated_bf16", &amx_emulated::kernel(), Element::bf16});
  return all;
}

/// e to the power of a score in the kernel's unit, and back.
double power(const Kernel& kernel, double score) { return std::exp(score * kernel.nats); }
double score_of_sum(const Kernel& kernel, double sum) { return std::log(sum) / kernel.nats; }

std::size_t at(long i) { return static_cast<std::size_t>(i); }

/// Packs and scratch as kernels want them; full of NaN until written.
class Bytes {
 public:
  explicit Bytes(long size)
      : data_(static_cast<std::byte*>(::operator new (at(size), std::align_val_t{64}))) {
    std::memset(data_.get(), 0xff, at(size));
  }
  std::byte* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> data_;
};

/// A 64-byte aligned array of floats.
class Floats {
 public:
  Floats(long count, float value) : bytes_(4 * count), count_(count) {
    std::fill_n(get(), count, value);
  }
  float* get() const { return reinterpret_cast<float*>(bytes_.get()); }
  long size() const { return count_; }
  float& operator[](long i) const { return get()[i]; }

 private:
  Bytes bytes_;
  long count_;
};

/// Rows with a stride that is not their length, as doubles and as the kernel reads them.
class Matrix {
 public:
  Matrix(int rows, int numbers, Element of)
      : count(rows),
        dim(numbers),
        stride(dim + 3),
        element(of),
        values_(at(rows * stride)),
        floats_(values_.size()),
        halves_(values_.size()) {}
  void set(int row, int i, double x) {
    const std::size_t k = at(row * stride + i);
    floats_[k] = static_cast<float>(x);
    halves_[k] = BFloat16(x);
    values_[k] =
        element == Element::f4 ? static_cast<double>(floats_[k]) : static_cast<double>(halves_[k]);
  }
  double operator()(int row, int i) const { return values_[at(row * stride + i)]; }
  const void* row(int i) const {
    const std::size_t k = at(i * stride);
    return element == Element::f4 ? static_cast<const void*>(&floats_[k]) : &halves_[k];
  }
  Rows rows(int first, int n) const { return {row(first), stride, n, dim, element}; }

  int count;
  int dim;
  long stride;
  Element element;

 private:
  std::vector<double> values_;
  std::vector<float> floats_;
  std::vector<BFloat16> halves_;
};

enum class Holes { none, causal, window, random, dead_ends, halves };
enum Rule : unsigned { kCap = 1, kSlope = 2, kBias = 4, kWeight = 8 };

/// All sets of rules; under a sanitizer none, two, the other two and all.
constexpr unsigned kNextRules = kSanitized ? 5 : 1;

struct Case {
  int d_qk = 64;
  int d_v = 64;
  int keys = 300;
  Holes holes = Holes::none;
  unsigned rules = 0;
  Normalizer normalizer = Normalizer::softmax;
  double rise = 0;        ///< scores grow with the key
  double scale = 0.3;     ///< of q.k, against dim 1
  int null_lanes = 0;     ///< the last lanes are no queries
  bool infinite = false;  ///< a key that nobody may see makes infinite scores and dP
};

std::ostream& operator<<(std::ostream& out, const Subject& s) { return out << s.name; }

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "d " << c.d_qk << " " << c.d_v << " keys " << c.keys << " holes "
             << static_cast<int>(c.holes) << " rules " << c.rules << " normalizer "
             << static_cast<int>(c.normalizer) << " rise " << c.rise << " scale " << c.scale
             << " null " << c.null_lanes;
}

/// Queries (in panels), keys, what they may see and what a score is, with everything in double.
struct Problem {
  const Kernel& kernel;
  Case c;
  int queries;
  Matrix q, k, v, d_o;
  double factor;  ///< of q.k, into the kernel's unit (or into the cap)
  float cap = 0;
  int reach = 0;
  float shift = 0;
  std::vector<char> allowed;  ///< [queries][keys]
  std::vector<float> slope, key_weight;
  std::vector<std::vector<float>> bias;
  std::vector<const float*> bias_rows;
  std::vector<int> query_position, key_position;
  std::mt19937 random{7};

  Problem(const Subject& subject, const Case& of, int panels)
      : kernel(*subject.kernel),
        c(of),
        queries(panels * kernel.lanes),
        q(queries, c.d_qk, subject.element),
        k(c.keys, c.d_qk, subject.element),
        v(c.keys, c.d_v, subject.element),
        d_o(queries, c.d_v, subject.element) {
    const NormalNumbers normal;
    for (Matrix* m : {&q, &k, &v, &d_o}) {
      for (int i = 0; i < m->count; ++i) {
        for (int j = 0; j < m->dim; ++j) m->set(i, j, normal(random));
      }
    }
    if (c.rise != 0) {
      for (int i = 0; i < queries; ++i) q.set(i, 0, 1);
      for (int i = 0; i < c.keys; ++i) k.set(i, 0, c.rise * i);
    }
    for (int i = queries - c.null_lanes; i < queries; ++i) {
      for (int j = 0; j < c.d_qk; ++j) q.set(i, j, 0);
      for (int j = 0; j < c.d_v; ++j) d_o.set(i, j, 0);
    }
    const double scale = c.scale / std::sqrt(c.d_qk);
    factor = static_cast<float>(scale * kLog2E);
    if ((c.rules & kCap) != 0) {
      cap = static_cast<float>(1.5 * kLog2E);
      factor = static_cast<float>(scale / 1.5);
    }
    if (c.normalizer == Normalizer::sigmoid) shift = -3.25f;
    for (int i = 0; i < queries; ++i) {
      slope.push_back(0.01f * static_cast<float>(i % 7));
      query_position.push_back(3 * i + 5);
    }
    for (int j = 0; j < c.keys; ++j) {
      key_weight.push_back(static_cast<float>(normal(random)));
      key_position.push_back(j);
    }
    reach = 40;
    for (int i = 0; i < queries; ++i) {
      auto& row = bias.emplace_back();
      for (int j = 0; j <= 2 * reach; ++j) row.push_back(static_cast<float>(normal(random)));
    }
    for (const auto& row : bias) bias_rows.push_back(row.data());
    allowed.resize(at(queries * c.keys));
    for (int i = 0; i < queries; ++i) {
      for (int j = 0; j < c.keys; ++j) allowed[at(i * c.keys + j)] = sees(i, j) ? 1 : 0;
    }
    if (c.infinite) {
      for (int j = 0; j < c.d_qk; ++j) k.set(1, j, 3e38);
      for (int j = 0; j < c.d_v; ++j) v.set(1, j, 3e38);
    }
  }

  bool sees(int i, int j) {
    if (c.infinite && j == 1) return false;
    switch (c.holes) {
      case Holes::none:
        return true;
      case Holes::causal:
        return j <= 5 * i - 20;
      case Holes::window:  // lanes without a key, and pieces apart from each other
        return i % 5 != 0 && (i % 2 == 0 ? j >= i && j < i + 40 : j >= 160 + i && j < 200 + i);
      case Holes::random:
        return i % 6 != 1 && random() % 3 == 0;
      case Holes::dead_ends:  // panels alternate between halves
        return i % 3 != 2 && ((i / kernel.lanes) % 2 == 0) == (j < c.keys / 2);
      case Holes::halves:  // of a panel take turns: pieces that one sees whole and the other not
        return (2 * i / kernel.lanes + j / (2 * kernel.granule)) % 2 == 0;
    }
    return true;
  }

  bool may(int i, int j) const { return allowed[at(i * c.keys + j)] != 0; }

  /// A score, and its derivative by scale * q.k in natural units.
  double score(int i, int j, double* derivative = nullptr) const {
    double s = 0;
    for (int x = 0; x < c.d_qk; ++x) s += q(i, x) * k(j, x);
    s *= factor;
    if (derivative != nullptr) *derivative = 1;
    if (cap != 0) {
      const double t = std::tanh(s);
      if (derivative != nullptr) *derivative = 1 - t * t;
      s = static_cast<double>(cap) * t;
    }
    const int apart = key_position[at(j)] - query_position[at(i)];
    if ((c.rules & kSlope) != 0) s -= static_cast<double>(slope[at(i)]) * std::abs(apart);
    if ((c.rules & kBias) != 0) s += bias[at(i)][at(std::clamp(apart, -reach, reach) + reach)];
    if ((c.rules & kWeight) != 0) s += key_weight[at(j)];
    return s + static_cast<double>(shift);
  }

  ScoreRules rules(int first_query, int first_key) const {
    ScoreRules r{};
    r.cap = cap;
    if ((c.rules & kSlope) != 0) r.slope = &slope[at(first_query)];
    if ((c.rules & kBias) != 0) r.bias = &bias_rows[at(first_query)];
    if ((c.rules & (kSlope | kBias)) != 0) {
      r.query = &query_position[at(first_query)];
      r.key = &key_position[at(first_key)];
    }
    r.reach = reach;
    if ((c.rules & kWeight) != 0) r.key_weight = &key_weight[at(first_key)];
    r.shift = shift;
    return r;
  }

  std::vector<const void*> rows(const Matrix& m) const {
    std::vector<const void*> list;
    for (int i = 0; i < queries; ++i) {
      list.push_back(i < queries - c.null_lanes ? m.row(i) : nullptr);
    }
    return list;
  }
};

/// What a panel sees of a tile, as plans would say it.
struct View {
  std::vector<Piece> pieces;
  std::vector<int> begin, end;
  std::vector<unsigned> bits;
  bool intervals = true;

  View(const Problem& p, int first_query, int first_key, int count)
      : begin(at(p.kernel.lanes)), end(at(p.kernel.lanes)), bits(at(count)) {
    const int lanes = p.kernel.lanes;
    for (int i = 0; i < lanes; ++i) {
      int seen = 0;
      for (int j = 0; j < count; ++j) {
        if (!p.may(first_query + i, first_key + j)) continue;
        if (seen == 0) begin[at(i)] = j;
        if (seen > 0 && end[at(i)] != j) intervals = false;
        end[at(i)] = j + 1;
        ++seen;
        bits[at(j)] |= 1u << i;
      }
    }
    const int granule = p.kernel.granule;
    const unsigned full = lanes == 32 ? ~0u : (1u << lanes) - 1;
    for (int j = 0; j < count; j += granule) {
      const int size = std::min(granule, count - j);
      const auto of = bits.begin() + j;
      if (std::all_of(of, of + size, [](unsigned b) { return b == 0; })) continue;
      unsigned live = 0;
      bool masked = false;
      for (int part = 0; part < p.kernel.parts; ++part) {
        const int width = lanes / p.kernel.parts;
        const unsigned own = full >> (lanes - width) << (part * width);
        if (std::all_of(of, of + size, [&](unsigned b) { return (b & own) == 0; })) continue;
        live |= 1u << part;
        masked |= !std::all_of(of, of + size, [&](unsigned b) { return (b & own) == own; });
      }
      // Neighbours become one piece now and then.
      if (!pieces.empty() && pieces.back().first + pieces.back().count == j && j % 5 != 0) {
        pieces.back().count += size;
        pieces.back().masked |= masked || pieces.back().live != live;
        pieces.back().live |= live;
      } else {
        pieces.push_back({j, size, masked, live});
      }
    }
  }
  Lanes allowed() const {
    return intervals ? Lanes{begin.data(), end.data(), nullptr}
                     : Lanes{nullptr, nullptr, bits.data()};
  }
};

/// Groups of a few queries against keys as they lie: heads side by side, in a row of all of them.
struct DecodeCase {
  int d_qk = 64;
  int d_v = 64;
  int keys = 300;
  int lanes = 4;
  int groups = 2;
  Holes holes = Holes::none;  // dead_ends: no lane sees the second quarter
  unsigned rules = 0;
  Normalizer normalizer = Normalizer::softmax;
  double scale = 1;
  int calls = 1;
  bool wild = false;  ///< NaN and infinity in K and V of pairs that nobody may see
};

std::ostream& operator<<(std::ostream& out, const DecodeCase& c) {
  return out << "d " << c.d_qk << " " << c.d_v << " keys " << c.keys << " lanes " << c.lanes
             << " groups " << c.groups << " holes " << static_cast<int>(c.holes) << " rules "
             << c.rules << " normalizer " << static_cast<int>(c.normalizer) << " scale " << c.scale
             << " calls " << c.calls << " wild " << c.wild;
}

struct DecodeProblem {
  DecodeCase c;
  std::mt19937 random{11};
  NormalNumbers normal;
  std::vector<float> q;  ///< [groups][lanes][d_qk]
  Matrix k, v;           ///< [keys][groups][d]
  float cap = 0;
  float shift = 0;
  int reach = 30;
  std::vector<float> slope, key_weight;
  std::vector<std::vector<float>> bias;
  std::vector<const float*> bias_rows;
  std::vector<int> query_position, key_position;
  std::vector<char> allowed;  ///< [lanes][keys]

  DecodeProblem(Element element, const DecodeCase& of)
      : c(of), k(c.keys, c.groups * c.d_qk, element), v(c.keys, c.groups * c.d_v, element) {
    for (int i = 0; i < c.groups * c.lanes * c.d_qk; ++i) {
      q.push_back(static_cast<float>(normal(random) * c.scale / std::sqrt(c.d_qk)));
    }
    for (Matrix* m : {&k, &v}) {
      for (int i = 0; i < m->count; ++i) {
        for (int j = 0; j < m->dim; ++j) m->set(i, j, normal(random));
        for (long j = m->dim; j < m->stride && i + 1 < m->count; ++j) {
          m->set(i, static_cast<int>(j), std::numeric_limits<double>::quiet_NaN());
        }
      }
    }
    if ((c.rules & kCap) != 0) cap = 1.5f;
    if (c.normalizer == Normalizer::sigmoid) shift = -3.25f;
    for (int f = 0; f < c.lanes; ++f) {
      slope.push_back(0.01f * static_cast<float>(f + 1));
      query_position.push_back(7 * f + 5);
      auto& row = bias.emplace_back();
      for (int j = 0; j <= 2 * reach; ++j) row.push_back(static_cast<float>(normal(random)));
    }
    for (const auto& row : bias) bias_rows.push_back(row.data());
    for (int j = 0; j < c.keys; ++j) {
      key_weight.push_back(static_cast<float>(normal(random)));
      key_position.push_back(j);
    }
    for (int f = 0; f < c.lanes; ++f) {
      for (int j = 0; j < c.keys; ++j) allowed.push_back(sees(f, j) ? 1 : 0);
    }
    if (c.wild) make_wild();
  }

  bool sees(int f, int j) {
    switch (c.holes) {
      case Holes::none:
        return true;
      case Holes::causal:
        return j < c.keys - 9 * f;
      case Holes::window:
        return f % 3 != 2 && j >= 20 * f && j < 20 * f + 77;
      case Holes::random:
        return f % 6 != 1 && random() % 3 == 0;
      case Holes::dead_ends:
        return j < c.keys / 4 || j >= c.keys / 2;
      case Holes::halves:
        return (f + j / 50) % 2 == 0;
    }
    return true;
  }
  bool may(int f, int j) const { return allowed[at(f * c.keys + j)] != 0; }
  bool seen(int j) const {
    for (int f = 0; f < c.lanes; ++f) {
      if (may(f, j)) return true;
    }
    return false;
  }

  void make_wild() {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    for (int j = 0; j < c.keys; ++j) {
      if (seen(j)) continue;
      for (int i = j % 3; i < k.dim; i += 3) k.set(j, i, j % 2 == 0 ? kNan : kInf);
      for (int i = j % 5; i < v.dim; i += 5) v.set(j, i, j % 2 == 0 ? kNan : -kInf);
    }
  }

  double score(int group, int f, int j) const {
    double s = 0;
    for (int x = 0; x < c.d_qk; ++x) {
      s +=
          static_cast<double>(q[at((group * c.lanes + f) * c.d_qk + x)]) * k(j, group * c.d_qk + x);
    }
    if (cap != 0) s = static_cast<double>(cap) * std::tanh(s);
    const int apart = key_position[at(j)] - query_position[at(f)];
    if ((c.rules & kSlope) != 0) s -= static_cast<double>(slope[at(f)]) * std::abs(apart);
    if ((c.rules & kBias) != 0) s += bias[at(f)][at(std::clamp(apart, -reach, reach) + reach)];
    if ((c.rules & kWeight) != 0) s += key_weight[at(j)];
    return s + static_cast<double>(shift);
  }

  ScoreRules rules(int first_key) const {
    ScoreRules r{};
    r.cap = cap;
    if ((c.rules & kSlope) != 0) r.slope = slope.data();
    if ((c.rules & kBias) != 0) r.bias = bias_rows.data();
    if ((c.rules & (kSlope | kBias)) != 0) {
      r.query = query_position.data();
      r.key = &key_position[at(first_key)];
    }
    r.reach = reach;
    if ((c.rules & kWeight) != 0) r.key_weight = &key_weight[at(first_key)];
    r.shift = shift;
    return r;
  }
};

/// What the lanes see of the keys [first, first + count), in pieces that begin anywhere.
struct DecodeView {
  std::vector<Piece> pieces;
  std::vector<int> begin, end;
  std::vector<unsigned> bits;
  bool intervals = true;

  DecodeView(const DecodeProblem& p, int first, int count)
      : begin(at(p.c.lanes)), end(at(p.c.lanes)), bits(at(count)) {
    const unsigned full = (1u << p.c.lanes) - 1;
    for (int f = 0; f < p.c.lanes; ++f) {
      bool none = true;
      for (int j = 0; j < count; ++j) {
        if (!p.may(f, first + j)) continue;
        if (none) begin[at(f)] = j;
        if (!none && end[at(f)] != j) intervals = false;
        end[at(f)] = j + 1;
        none = false;
        bits[at(j)] |= 1u << f;
      }
    }
    constexpr int kSizes[] = {16, 5, 40, 1, 33, 64};
    for (int j = 0, n = 0; j < count; ++n) {
      const int size = std::min(kSizes[n % 6], count - j);
      const auto of = bits.begin() + j;
      const bool dead = std::all_of(of, of + size, [](unsigned b) { return b == 0; });
      const bool masked = !std::all_of(of, of + size, [&](unsigned b) { return b == full; });
      if (!dead && !pieces.empty() && pieces.back().first + pieces.back().count == j &&
          pieces.back().masked == masked) {
        pieces.back().count += size;
      } else if (!dead) {
        pieces.push_back({j, size, masked});
      }
      j += size;
    }
  }
};

double distance(const std::vector<double>& want, const std::function<double(std::size_t)>& found) {
  double difference = 0;
  double size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (want[i] - found(i)) * (want[i] - found(i));
    size += want[i] * want[i];
  }
  // Against 0.1 at least: gradients of rows with one key are 0.
  return std::sqrt(difference / std::max(size, 0.01 * static_cast<double>(want.size() + 1)));
}

class KernelTable : public testing::TestWithParam<Subject> {
 protected:
  void SetUp() override { before_ = kernel().enter(); }
  void TearDown() override { kernel().leave(before_); }
  const Kernel& kernel() const { return *GetParam().kernel; }
  bool half() const { return GetParam().element == Element::bf16; }

  /// Whether keys as they lie were a case of the kernel, too.
  bool check_forward(const Case& c);
  bool check_forward(const Case& c, bool lying);
  void check_backward(const Case& c, int panels);
  void check_decode(const DecodeCase& c);
  /// Whether decode multiplies rounded weights.
  bool tiles() const { return half() && GetParam().name.starts_with("amx"); }

 private:
  long before_ = 0;
};

bool KernelTable::check_forward(const Case& c) {
  check_forward(c, false);
  return check_forward(c, true);
}

bool KernelTable::check_forward(const Case& c, bool lying) {
  SCOPED_TRACE(testing::PrintToString(c) + (lying ? " lying" : ""));
  const Kernel& table = kernel();
  if (lying &&
      (table.lying_keys == 0 || c.d_qk % table.lying_keys != 0 || c.keys % table.granule != 0)) {
    return false;
  }
  const Problem p(GetParam(), c, 1);
  const int lanes = table.lanes;
  const bool softmax = c.normalizer == Normalizer::softmax;
  const Bytes q(table.q_size(c.d_qk));
  const Bytes k(table.k_size(c.d_qk));
  const Bytes v(table.v_size(c.d_v));
  const Bytes scratch(table.forward_scratch(c.d_qk, c.d_v));
  table.pack_q(p.rows(p.q).data(), GetParam().element, c.d_qk, static_cast<float>(p.factor),
               q.get());
  const Floats m(lanes, softmax ? -kInfF : 0);
  const Floats o(static_cast<long>(c.d_v) * lanes, std::numeric_limits<float>::quiet_NaN());
  std::vector<double> l(at(lanes));
  bool begun = false;
  for (int first = 0; first < c.keys; first += table.tile) {
    const int count = std::min(table.tile, c.keys - first);
    const Rows keys = p.k.rows(first, count);
    if (!lying) table.pack_k(keys, k.get());
    table.pack_v(p.v.rows(first, count), v.get());
    const View view(p, 0, first, count);
    table.forward({.q = q.get(),
                   .k = lying ? keys.data : k.get(),
                   .v = v.get(),
                   .d_qk = c.d_qk,
                   .d_v = c.d_v,
                   .pieces = view.pieces.data(),
                   .piece_count = static_cast<int>(view.pieces.size()),
                   .allowed = view.allowed(),
                   .rules = p.rules(0, first),
                   .normalizer = c.normalizer,
                   .scratch = scratch.get(),
                   .m = m.get(),
                   .l = l.data(),
                   .o = o.get(),
                   .first = !begun,
                   .k_row = lying ? 2 * keys.stride : 0});
    begun = begun || !view.pieces.empty();
  }
  if (!begun) std::fill_n(o.get(), static_cast<long>(c.d_v) * lanes, 0.0f);

  std::vector<double> want, found;
  double largest = 0;  // score: a float of that size is off by that much, and weights are 2^score
  for (int i = 0; i < lanes; ++i) {
    SCOPED_TRACE("lane " + std::to_string(i));
    double top = softmax ? -kInf : 0;
    for (int j = 0; softmax && j < c.keys; ++j) {
      if (p.may(i, j)) top = std::max(top, p.score(i, j));
    }
    double sum = 0;
    std::vector<double> row(at(c.d_v));
    for (int j = 0; j < c.keys; ++j) {
      if (!p.may(i, j)) continue;
      const double s = p.score(i, j);
      largest = std::max(largest, std::abs(s));
      const double w = softmax ? power(table, s - top) : 1 / (1 + power(table, -s));
      sum += w;
      for (int x = 0; x < c.d_v; ++x) row[at(x)] += w * p.v(j, x);
    }
    if (sum == 0) {
      EXPECT_EQ(m[i], softmax ? -kInfF : 0);
      EXPECT_EQ(l[at(i)], 0);
      for (int x = 0; x < c.d_v; ++x) EXPECT_EQ(o[x * lanes + i], 0);
      continue;
    }
    if (softmax) {
      EXPECT_NEAR(static_cast<double>(m[i]) + score_of_sum(table, l[at(i)]),
                  top + score_of_sum(table, sum), (half() ? 3e-4 : 2e-5) + 1e-6 * std::abs(top));
    } else {
      EXPECT_EQ(m[i], 0);
      EXPECT_NEAR(l[at(i)], sum, (half() ? 3e-4 : 2e-6) * sum);
    }
    for (int x = 0; x < c.d_v; ++x) {
      want.push_back(softmax ? row[at(x)] / sum : row[at(x)]);
      found.push_back(static_cast<double>(o[x * lanes + i]) / (softmax ? l[at(i)] : 1));
    }
  }
  EXPECT_LT(distance(want, [&](std::size_t i) { return found[i]; }),
            half() ? 4e-3 : 1e-6 + 3e-7 * largest);
  return true;
}

void KernelTable::check_backward(const Case& c, int panels) {
  SCOPED_TRACE(testing::PrintToString(c) + " panels " + std::to_string(panels));
  const Kernel& table = kernel();
  const Problem p(GetParam(), c, panels);
  const int lanes = table.lanes;
  const int tile = table.backward_tile;
  const int queries = p.queries;
  const bool softmax = c.normalizer == Normalizer::softmax;
  const auto padded = [&](int d) { return (d + table.pad - 1) / table.pad * table.pad; };
  const long k_row = padded(c.d_qk);
  const long v_row = padded(c.d_v);

  // What must come out, on top of what is there already.
  std::vector<double> lse(at(queries)), delta(at(queries));
  std::vector<double> dq(at(queries * c.d_qk)), dk(at(c.keys * c.d_qk)), dv(at(c.keys * c.d_v));
  for (int i = 0; i < queries; ++i) {
    std::vector<double> weights(at(c.keys)), d_weights(at(c.keys)), derivative(at(c.keys));
    double top = -kInf;
    double sum = 0;
    for (int j = 0; j < c.keys; ++j) {
      if (p.may(i, j)) weights[at(j)] = p.score(i, j, &derivative[at(j)]);
      if (p.may(i, j)) top = std::max(top, weights[at(j)]);
    }
    for (int j = 0; j < c.keys; ++j) {
      if (p.may(i, j)) sum += power(table, weights[at(j)] - top);
    }
    lse[at(i)] = sum == 0 ? kInf : top + score_of_sum(table, sum);
    for (int j = 0; j < c.keys; ++j) {
      if (!p.may(i, j)) continue;
      double& w = weights[at(j)];
      w = softmax ? power(table, w - lse[at(i)]) : 1 / (1 + power(table, -w));
      for (int x = 0; x < c.d_v; ++x) d_weights[at(j)] += p.d_o(i, x) * p.v(j, x);
      if (softmax) delta[at(i)] += w * d_weights[at(j)];
    }
    for (int j = 0; j < c.keys; ++j) {
      if (!p.may(i, j)) continue;
      const double w = weights[at(j)];
      const double ds =
          (softmax ? w * (d_weights[at(j)] - delta[at(i)]) : w * (1 - w) * d_weights[at(j)]) *
          derivative[at(j)];
      for (int x = 0; x < c.d_v; ++x) dv[at(j * c.d_v + x)] += w * p.d_o(i, x);
      for (int x = 0; x < c.d_qk; ++x) dk[at(j * c.d_qk + x)] += ds * p.q(i, x);
      for (int x = 0; x < c.d_qk; ++x) dq[at(i * c.d_qk + x)] += ds * p.k(j, x);
    }
  }

  const Bytes q(table.q_backward_size(c.d_qk));
  const Bytes d_o(table.q_backward_size(c.d_v));
  const Bytes k(table.k_backward_size(c.d_qk));
  const Bytes v(table.v_backward_size(c.d_v));
  const Bytes scratch(table.backward_scratch(c.d_qk, c.d_v));
  table.pack_q_backward(p.rows(p.q).data(), panels, GetParam().element, c.d_qk,
                        static_cast<float>(p.factor), q.get());
  table.pack_q_backward(p.rows(p.d_o).data(), panels, GetParam().element, c.d_v, 1, d_o.get());
  const Floats lse_float(queries, 0);
  const Floats delta_float(queries, 0);
  for (int i = 0; i < queries; ++i) {
    lse_float[i] = static_cast<float>(lse[at(i)]);
    delta_float[i] = static_cast<float>(delta[at(i)]);
  }
  const float kThere = 0.5f;
  const Floats dq_found(static_cast<long>(queries) * c.d_qk, kThere);
  const int key_rows = (c.keys + tile - 1) / tile * tile;
  const Floats dk_found(key_rows * k_row, kThere);
  const Floats dv_found(key_rows * v_row, kThere);
  for (int first = 0; first < c.keys; first += tile) {
    const int count = std::min(tile, c.keys - first);
    table.pack_k_backward(p.k.rows(first, count), k.get());
    table.pack_v_backward(p.v.rows(first, count), v.get());
    std::vector<View> views;
    for (int i = 0; i < panels; ++i) views.emplace_back(p, i * lanes, first, count);
    std::vector<const Piece*> pieces;
    std::vector<int> counts;
    std::vector<Lanes> allowed;
    std::vector<ScoreRules> rules;
    for (int i = 0; i < panels; ++i) {
      pieces.push_back(views[at(i)].pieces.data());
      counts.push_back(static_cast<int>(views[at(i)].pieces.size()));
      allowed.push_back(views[at(i)].allowed());
      rules.push_back(p.rules(i * lanes, first));
    }
    table.backward({.q = q.get(),
                    .d_o = d_o.get(),
                    .k = k.get(),
                    .v = v.get(),
                    .d_qk = c.d_qk,
                    .d_v = c.d_v,
                    .panels = panels,
                    .pieces = pieces.data(),
                    .piece_counts = counts.data(),
                    .allowed = allowed.data(),
                    .rules = rules.data(),
                    .normalizer = c.normalizer,
                    .scratch = scratch.get(),
                    .lse = lse_float.get(),
                    .delta = delta_float.get(),
                    .dq = dq_found.get(),
                    .dk = dk_found.get() + first * k_row,
                    .dv = dv_found.get() + first * v_row});
  }

  const double tolerance = half() ? 6e-3 : 3e-4;  // little next to what the buffers held
  const auto value = [&](float x) { return static_cast<double>(x - kThere); };
  EXPECT_LT(distance(dq,
                     [&](std::size_t n) {
                       const long i = static_cast<long>(n) / c.d_qk;
                       const long x = static_cast<long>(n) % c.d_qk;
                       return value(dq_found[(i / lanes * c.d_qk + x) * lanes + i % lanes]);
                     }),
            tolerance);
  EXPECT_LT(distance(dk,
                     [&](std::size_t n) {
                       const long j = static_cast<long>(n);
                       return value(dk_found[j / c.d_qk * k_row + j % c.d_qk]);
                     }),
            tolerance);
  EXPECT_LT(distance(dv,
                     [&](std::size_t n) {
                       const long j = static_cast<long>(n);
                       return value(dv_found[j / c.d_v * v_row + j % c.d_v]);
                     }),
            tolerance);
  for (int j = c.keys; j < key_rows; ++j) {
    for (int x = 0; x < c.d_qk; ++x) EXPECT_EQ(dk_found[j * k_row + x], kThere);
    for (int x = 0; x < c.d_v; ++x) EXPECT_EQ(dv_found[j * v_row + x], kThere);
  }
}

/// Everything a decode leaves, of all lanes of all groups.
struct Decoded {
  std::vector<float> m;
  std::vector<double> l;
  std::vector<float> o;
  Decoded(long lanes, long d_v, Normalizer normalizer)
      : m(at(lanes), normalizer == Normalizer::softmax ? -kInfF : 0),
        l(at(lanes)),
        o(at(lanes * d_v)) {}
};

void run_decode(const Kernel& kernel, const DecodeProblem& p, Range keys, Decoded& found) {
  const DecodeCase& c = p.c;
  const int first = static_cast<int>(keys.begin);
  const int count = static_cast<int>(keys.size());
  const DecodeView view(p, first, count);
  std::vector<DecodeStep> steps;
  for (int g = 0; g < c.groups; ++g) {
    Rows k = p.k.rows(first, count);
    Rows v = p.v.rows(first, count);
    const long size = k.element == Element::f4 ? 4 : 2;
    k.data = static_cast<const char*>(k.data) + size * g * c.d_qk;
    v.data = static_cast<const char*>(v.data) + size * g * c.d_v;
    k.dim = c.d_qk;
    v.dim = c.d_v;
    const long lane = static_cast<long>(g) * c.lanes;
    steps.push_back({.q = &p.q[at(lane * c.d_qk)],
                     .lanes = c.lanes,
                     .k = k,
                     .v = v,
                     .following = static_cast<int>(c.keys - keys.end),
                     .pieces = view.pieces.data(),
                     .piece_count = static_cast<int>(view.pieces.size()),
                     .begin = view.intervals ? view.begin.data() : nullptr,
                     .end = view.intervals ? view.end.data() : nullptr,
                     .bits = view.intervals ? nullptr : view.bits.data(),
                     .rules = p.rules(first),
                     .normalizer = c.normalizer,
                     .m = &found.m[at(lane)],
                     .l = &found.l[at(lane)],
                     .o = &found.o[at(lane * c.d_v)]});
  }
  kernel.decode(steps.data(), c.groups);
}

void KernelTable::check_decode(const DecodeCase& c) {
  SCOPED_TRACE(testing::PrintToString(c));
  const DecodeProblem p(GetParam().element, c);
  const bool softmax = c.normalizer == Normalizer::softmax;
  Decoded all(static_cast<long>(c.groups) * c.lanes, c.d_v, c.normalizer);
  for (int call = 0; call < c.calls; ++call) {
    run_decode(kernel(), p, {c.keys * call / c.calls, c.keys * (call + 1) / c.calls}, all);
  }

  std::vector<double> want, found;
  for (int lane = 0; lane < c.groups * c.lanes; ++lane) {
    SCOPED_TRACE("lane " + std::to_string(lane));
    const int f = lane % c.lanes;
    const int g = lane / c.lanes;
    const float* o = &all.o[at(lane * c.d_v)];
    const double m = static_cast<double>(all.m[at(lane)]);
    const double l = all.l[at(lane)];
    std::vector<double> scores;
    double top = softmax ? -kInf : 0;
    for (int j = 0; j < c.keys; ++j) {
      scores.push_back(p.may(f, j) ? p.score(g, f, j) : -kInf);
      if (softmax) top = std::max(top, scores.back());
    }
    double sum = 0;
    std::vector<double> row(at(c.d_v));
    for (int j = 0; j < c.keys; ++j) {
      if (!p.may(f, j)) continue;
      const double s = scores[at(j)];
      const double w = softmax ? power(kernel(), s - top) : 1 / (1 + power(kernel(), -s));
      sum += w;
      for (int x = 0; x < c.d_v; ++x) row[at(x)] += w * p.v(j, g * c.d_v + x);
    }
    if (sum == 0) {
      EXPECT_EQ(m, softmax ? -kInf : 0);
      EXPECT_EQ(l, 0);
      for (int x = 0; x < c.d_v; ++x) EXPECT_EQ(o[x], 0);
      continue;
    }
    if (softmax) {
      EXPECT_NEAR(m + score_of_sum(kernel(), l), top + score_of_sum(kernel(), sum),
                  (tiles() ? 3e-5 : 2e-6) * (1 + std::abs(top)));
    } else {
      EXPECT_EQ(m, 0);
      EXPECT_NEAR(l, sum, (tiles() ? 3e-5 : 2e-6) * sum);
    }
    for (int x = 0; x < c.d_v; ++x) {
      want.push_back(softmax ? row[at(x)] / sum : row[at(x)]);
      found.push_back(static_cast<double>(o[x]) / (softmax ? l : 1));
    }
  }
  EXPECT_LT(distance(want, [&](std::size_t i) { return found[i]; }), tiles() ? 4e-3 : 2e-6);
}

const std::vector<Holes> kHoles{Holes::none,   Holes::causal,    Holes::window,
                                Holes::random, Holes::dead_ends, Holes::halves};

TEST_P(KernelTable, ForwardOfEveryWidth) {
  for (const int d : {1, 2, 17, 32, 64, 80, 96, 128, 192, 576}) {
    check_forward({.d_qk = d, .d_v = d});
  }
  check_forward({.d_qk = 64, .d_v = 128});
  check_forward({.d_qk = 128, .d_v = 17});
  check_forward({.d_qk = 1, .d_v = 80});
  check_forward({.d_qk = 192, .d_v = 128});
  check_forward({.d_qk = 256, .d_v = 33});
}

TEST_P(KernelTable, ForwardOfAnyNumberOfKeys) {
  bool lying = false;
  for (const int keys : {1, 31, 32, 33, 64, kernel().tile - 1, kernel().tile, kernel().tile + 1,
                         3 * kernel().tile + 7}) {
    for (const int d : {64, 128, 40}) {
      if (check_forward({.d_qk = d, .d_v = d, .keys = keys})) lying = true;
    }
  }
  EXPECT_EQ(lying, kernel().lying_keys != 0);
}

TEST_P(KernelTable, ForwardUnderMasks) {
  for (const Holes holes : kHoles) {
    for (const int d : {64, 128, 40}) {
      for (const int keys : {100, 320, 2 * kernel().tile + 90}) {
        check_forward({.d_qk = d, .d_v = d, .keys = keys, .holes = holes, .null_lanes = 3});
      }
    }
    check_forward({.holes = holes, .infinite = true});
  }
}

TEST_P(KernelTable, ForwardWithEveryRule) {
  for (unsigned rules = 0; rules < 16; rules += kNextRules) {
    for (const Normalizer normalizer : {Normalizer::softmax, Normalizer::sigmoid}) {
      for (const Holes holes : {Holes::none, Holes::causal, Holes::random}) {
        check_forward({.d_qk = 40,
                       .d_v = 64,
                       .holes = holes,
                       .rules = rules,
                       .normalizer = normalizer,
                       .scale = 1.5});
      }
    }
  }
}

TEST_P(KernelTable, ForwardOfScoresThatGrow) {
  for (const double rise : {0.5, -0.5, 40.0, -40.0}) {
    for (const int d : {64, 128, 40}) {
      for (const Holes holes : {Holes::none, Holes::causal}) {
        check_forward({.d_qk = d,
                       .d_v = d,
                       .keys = 3 * kernel().tile + 40,
                       .holes = holes,
                       .rise = rise,
                       .scale = 1});
        check_forward(
            {.d_qk = d, .d_v = d, .keys = 500, .holes = holes, .rise = rise, .scale = -1});
      }
    }
  }
}

TEST_P(KernelTable, ForwardOfScoresFarFromZero) {
  for (const unsigned rules : {0u, unsigned{kSlope}}) {
    check_forward({.rules = rules, .scale = 300});
    check_forward({.d_qk = 128, .d_v = 128, .holes = Holes::random, .rules = rules, .scale = 40});
  }
}

TEST_P(KernelTable, NanStaysInTheLanesThatSeeIt) {
  const Kernel& table = kernel();
  const int lanes = table.lanes;
  const int d = 64;
  for (const int keys : {32, 100}) {
    Problem p(GetParam(), {.d_qk = d, .d_v = d, .keys = keys}, 1);
    p.q.set(2, 5, std::numeric_limits<double>::quiet_NaN());
    // Lane 1 sees all but the last key, whose K is NaN; the others see none but the first ten.
    p.k.set(keys - 1, 5, std::numeric_limits<double>::quiet_NaN());
    std::vector<int> begin(at(lanes)), end(at(lanes), 10);
    end[0] = keys;
    end[1] = keys - 1;
    const Bytes q(table.q_size(d));
    const Bytes k(table.k_size(d));
    const Bytes v(table.v_size(d));
    const Bytes scratch(table.forward_scratch(d, d));
    table.pack_q(p.rows(p.q).data(), GetParam().element, d, 0.1f, q.get());
    const Floats m(lanes, -kInfF);
    const Floats o(static_cast<long>(d) * lanes, 0);
    std::vector<double> l(at(lanes));
    for (int first = 0; first < keys; first += table.tile) {
      const int count = std::min(table.tile, keys - first);
      table.pack_k(p.k.rows(first, count), k.get());
      table.pack_v(p.v.rows(first, count), v.get());
      const Piece piece{0, count, true};
      std::vector<int> from, to;
      for (int i = 0; i < lanes; ++i) {
        from.push_back(std::clamp(begin[at(i)] - first, 0, count));
        to.push_back(std::clamp(end[at(i)] - first, 0, count));
      }
      table.forward({.q = q.get(),
                     .k = k.get(),
                     .v = v.get(),
                     .d_qk = d,
                     .d_v = d,
                     .pieces = &piece,
                     .piece_count = 1,
                     .allowed = {from.data(), to.data(), nullptr},
                     .rules = {},
                     .normalizer = Normalizer::softmax,
                     .scratch = scratch.get(),
                     .m = m.get(),
                     .l = l.data(),
                     .o = o.get(),
                     .first = false});
    }
    for (int i = 0; i < lanes; ++i) {
      SCOPED_TRACE("keys " + std::to_string(keys) + " lane " + std::to_string(i));
      const bool nan = i == 0 || i == 2;
      EXPECT_EQ(std::isnan(l[at(i)]), nan);
      EXPECT_TRUE(nan || m[i] > -kInfF);
      for (int x = 0; x < d; ++x) EXPECT_EQ(std::isnan(o[x * lanes + i]), nan);
    }
  }
}

TEST_P(KernelTable, DecodeOfEveryWidth) {
  for (const int d : {1, 17, 32, 64, 80, 96, 128, 200, 576}) check_decode({.d_qk = d, .d_v = d});
  check_decode({.d_qk = 64, .d_v = 128});
  check_decode({.d_qk = 128, .d_v = 17});
  check_decode({.d_qk = 17, .d_v = 128});
  check_decode({.d_qk = 576, .d_v = 512, .lanes = kernel().decode_lanes, .groups = 1});
}

TEST_P(KernelTable, DecodeOfEveryNumberOfLanesGroupsAndKeys) {
  for (int lanes = 1; lanes <= kernel().decode_lanes; ++lanes) {
    for (const int keys : {1, 31, 32, 33, 100}) {
      check_decode({.keys = keys, .lanes = lanes, .groups = lanes % 4 + 1});
    }
    check_decode({.d_qk = 128, .d_v = 128, .keys = 512, .lanes = lanes, .calls = 3});
  }
}

TEST_P(KernelTable, DecodeUnderMasks) {
  int turn = 0;
  for (const Holes holes : kHoles) {
    for (const int d : {128, 40}) {
      for (const int lanes : {1, 3, 8, kernel().decode_lanes}) {
        for (const int calls : {1, 2}) {
          if (turn++ % (kSanitized ? 3 : 1) != 0) continue;
          check_decode({.d_qk = d,
                        .d_v = d,
                        .lanes = lanes,
                        .groups = 3,
                        .holes = holes,
                        .calls = calls,
                        .wild = calls == 1});
        }
      }
    }
  }
}

TEST_P(KernelTable, DecodeWithEveryRule) {
  for (unsigned rules = 0; rules < 16; rules += kNextRules) {
    for (const Normalizer normalizer : {Normalizer::softmax, Normalizer::sigmoid}) {
      for (const Holes holes : {Holes::none, Holes::causal, Holes::random}) {
        for (const int lanes : {5, kernel().decode_lanes}) {
          check_decode({.d_qk = 40,
                        .lanes = lanes,
                        .holes = holes,
                        .rules = rules,
                        .normalizer = normalizer,
                        .scale = 0.3,
                        .calls = 2});
        }
      }
    }
  }
}

TEST_P(KernelTable, DecodeOfScoresFarFromZero) {
  check_decode({.scale = 30});
  check_decode({.keys = 1000, .lanes = kernel().decode_lanes, .scale = 30, .calls = 2});
}

TEST_P(KernelTable, DecodeKeepsNanInTheLanesThatSeeIt) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr int kAt = 17;  // a number of V
  for (const int lanes : {3, 8, kernel().decode_lanes}) {
    for (const double wild : {kNan, kInf, -kInf}) {
      for (const int d : {64, 40}) {
        SCOPED_TRACE(std::to_string(lanes) + " lanes, " + std::to_string(wild));
        DecodeProblem p(GetParam().element, {.d_qk = d, .d_v = d, .keys = 100, .lanes = lanes});
        const auto forbid = [&](int f, int j) { p.allowed[at(f * p.c.keys + j)] = 0; };
        // Lane 0 sees a wild value, lane 1 a wild key, lane 2 asks for NaN.
        for (const int j : {5, 45, 77}) {
          for (int f = 1; f < lanes; ++f) forbid(f, j);
        }
        for (int f = 0; f < lanes; ++f) {
          if (f != 1) forbid(f, 50);
        }
        Decoded tame(2L * lanes, d, Normalizer::softmax);
        run_decode(kernel(), p, {0, p.c.keys}, tame);
        for (const int j : {5, 45, 77}) p.v.set(j, kAt, wild);
        p.k.set(50, 3, kNan);
        p.q[at(2 * d + 1)] = static_cast<float>(kNan);
        Decoded found(2L * lanes, d, Normalizer::softmax);
        run_decode(kernel(), p, {0, p.c.keys}, found);
        for (int lane = 0; lane < 2 * lanes; ++lane) {
          SCOPED_TRACE("lane " + std::to_string(lane));
          const bool nan = lane == 1 || lane == 2;
          const bool value = lane == 0;
          EXPECT_EQ(std::isnan(found.l[at(lane)]), nan);
          for (int x = 0; x < d; ++x) {
            const float o = found.o[at(lane * d + x)];
            if (nan) {
              EXPECT_TRUE(std::isnan(o));
            } else if (value && x == kAt) {
              EXPECT_EQ(testing::PrintToString(std::fabs(o)),
                        testing::PrintToString(std::fabs(static_cast<float>(wild))));
            } else {
              EXPECT_EQ(o, tame.o[at(lane * d + x)]);
            }
          }
        }
      }
    }
  }
}

TEST_P(KernelTable, DecodeKeepsNanInTheColumnThatHasIt) {
  constexpr int kKeys = 192;
  for (const int lanes : {3, kernel().decode_lanes}) {
    for (const double wild : {std::numeric_limits<double>::quiet_NaN(), kInf, -kInf}) {
      SCOPED_TRACE(std::to_string(lanes) + " lanes, " + std::to_string(wild));
      DecodeProblem p(GetParam().element, {.d_qk = 64, .d_v = 64, .keys = kKeys, .lanes = lanes});
      const auto run = [&](Decoded& found) {
        for (const int begin : {0, 96}) run_decode(kernel(), p, {begin, begin + 96}, found);
      };
      Decoded tame(2L * lanes, 64, Normalizer::softmax);
      run(tame);
      // Neighbours in a row, in blocks in the middle and at the end.
      for (const auto& [key, column] : {std::pair{70, 6}, {70, 63}, {kKeys - 1, 17}}) {
        p.v.set(key, column, wild);
      }
      Decoded found(2L * lanes, 64, Normalizer::softmax);
      run(found);
      for (int lane = 0; lane < 2 * lanes; ++lane) {  // the first half is of the first head
        for (int x = 0; x < 64; ++x) {
          const float o = found.o[at(lane * 64 + x)];
          if (lane >= lanes) {
            EXPECT_EQ(o, tame.o[at(lane * 64 + x)]) << "lane " << lane << " column " << x;
          } else if (x == 6 || x == 63 || x == 17) {
            EXPECT_EQ(testing::PrintToString(std::fabs(o)),
                      testing::PrintToString(std::fabs(static_cast<float>(wild))));
          } else {
            EXPECT_EQ(o, tame.o[at(lane * 64 + x)]) << "lane " << lane << " column " << x;
          }
        }
      }
    }
  }
}

TEST_P(KernelTable, BackwardOfEveryWidth) {
  const int panels = kernel().backward_panels;
  for (const int d : {1, 2, 17, 32, 64, 80, 96, 128, 192, 576}) {
    check_backward({.d_qk = d, .d_v = d, .keys = d > 128 ? 150 : 300}, d > 128 ? 1 : panels);
  }
  check_backward({.d_qk = 64, .d_v = 128}, panels);
  check_backward({.d_qk = 128, .d_v = 17}, panels);
  check_backward({.d_qk = 1, .d_v = 80}, panels);
}

TEST_P(KernelTable, BackwardOfAnyNumberOfKeysAndPanels) {
  for (int panels = 1; panels <= kernel().backward_panels; ++panels) {
    for (const int keys : {1, 31, 32, 33, kernel().backward_tile, kernel().backward_tile + 1}) {
      check_backward({.keys = keys, .null_lanes = 2}, panels);
    }
  }
}

TEST_P(KernelTable, BackwardUnderMasks) {
  const int panels = kernel().backward_panels;
  for (const Holes holes : kHoles) {
    for (const int d : {64, 128, 40}) {
      check_backward({.d_qk = d, .d_v = d, .holes = holes, .null_lanes = 3}, panels);
    }
    check_backward({.holes = holes, .infinite = true}, panels);
  }
}

TEST_P(KernelTable, BackwardWithEveryRule) {
  for (unsigned rules = 0; rules < 16; rules += kNextRules) {
    for (const Normalizer normalizer : {Normalizer::softmax, Normalizer::sigmoid}) {
      for (const Holes holes : {Holes::none, Holes::random}) {
        check_backward({.d_qk = 40,
                        .d_v = 24,
                        .keys = 150,
                        .holes = holes,
                        .rules = rules,
                        .normalizer = normalizer,
                        .scale = 1.5},
                       2);
      }
    }
  }
}

TEST_P(KernelTable, PanelsAreAddedToTheRowsThatExist) {
  const int lanes = kernel().lanes;
  for (const int d : {1, 15, 16, 17, 64, 80}) {
    SCOPED_TRACE(d);
    const Floats panel(static_cast<long>(d) * lanes, 0);
    for (long i = 0; i < panel.size(); ++i) panel[i] = static_cast<float>(i);
    std::vector<std::vector<float>> there(at(lanes), std::vector<float>(at(d + 1), 100));
    std::vector<float*> rows;
    for (auto& row : there) rows.push_back(row.data());
    rows[1] = nullptr;
    kernel().add_panel(panel.get(), d, 0.5f, rows.data());
    for (int i = 0; i < lanes; ++i) {
      for (int x = 0; x < d; ++x) {
        const float added = i == 1 ? 0 : 0.5f * static_cast<float>(x * lanes + i);
        EXPECT_EQ(there[at(i)][at(x)], 100 + added);
      }
      EXPECT_EQ(there[at(i)][at(d)], 100);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, KernelTable, testing::ValuesIn(subjects()),
                         [](const auto& subject) { return subject.param.name; });

}  // namespace
}  // namespace dattn
