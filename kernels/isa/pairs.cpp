// The bfloat16 kernel for AVX-512 with BF16 instructions and no tiles: an instruction multiplies
// pairs of bfloat16 numbers and adds both products to a float, twice the work of a multiply-add.
// Forward only: backward and decode, whose numbers come from memory or must stay float, are those
// of avx512, which widens.
//
// As in fma.cpp every product is C[M][lanes] (+)= A[M][depth] B[depth][lanes], with pairs in place
// of numbers: of a row's neighbours in S^T = K Q^T, of neighbouring keys in O^T = V^T P^T.
#include "kernels/isa/pairs.hpp"

#include "kernels/isa/vector.inc"

namespace dattn::DATTN_ISA {
namespace {

constexpr int kN = 2;
constexpr int kM = 12;
constexpr int kPanel = kN * kW;  // lanes
constexpr unsigned kHalves = 3;  // parts of a panel, one vector each
constexpr int kGranule = 12;     // even, and a multiple of kM
constexpr int kTile = 192;
constexpr long kHeader = 64;  // bytes in front of packed queries
static_assert(kW == 16 && kGranule % kM == 0 && kGranule % 2 == 0 && kTile % kGranule == 0);

typedef unsigned short Halves __attribute__((vector_size(64)));

inline int half_of(int count) { return (count + 1) / 2; }
inline void store(int* p, Int v) { __builtin_memcpy(p, &v, sizeof v); }

/// Slabs of at most kM rows of accumulators that `d` numbers are cut into, evenly.
inline int slabs_of(int d) { return (d + kM - 1) / kM; }
inline int slab_begin(int d, int slab) {
  return static_cast<int>(static_cast<long>(slab) * d / slabs_of(d));
}

inline const char* row_of(const Rows& rows, int i) {
  return i < rows.count ? static_cast<const char*>(rows.data) + 2L * i * rows.stride : nullptr;
}

/// Pairs [i, i + kW) of a row of d numbers, zeros beyond them; null: zeros.
inline Int pairs_of(const void* row, int d, int i) {
  Int v{};
  const int left = d - 2 * i;
  if (row == nullptr || left <= 0) return v;
  const char* at = static_cast<const char*>(row) + 4L * i;
  if (left >= 2 * kW) {
    __builtin_memcpy(&v, at, sizeof v);
  } else {
    __builtin_memcpy(&v, at, 2 * static_cast<unsigned>(left));
  }
  return v;
}

/// Pairs [i, i + kW) of kW rows, turned: t[j] holds pair i + j of every row.
inline void turned(const void* const* row, int d, int i, Vec (&t)[kW]) {
#pragma GCC unroll 16
  for (int m = 0; m < kW; ++m) t[m] = (Vec)pairs_of(row[m], d, i);
  transpose(t);  // moves bits, computes nothing
}

// --- Packs
// ---------------------------------------------------------------------------------------

long q_bytes(int d) { return kHeader + 4L * kPanel * half_of(d); }
long k_bytes(int d) { return 4L * (static_cast<long>(kTile) * half_of(d) + kW); }
long v_bytes(int d) { return 4L * (static_cast<long>(kTile / 2) * d + kW); }
long forward_bytes(int, int) { return 4L * (kTile + kM) * kPanel; }

/// [pair][kPanel], behind the factor of scores: numbers would have to be rounded again with it.
void pack_q(const void* const* row, Element, int d, float factor, void* to) {
  __builtin_memcpy(to, &factor, sizeof factor);
  auto* out = reinterpret_cast<int*>(static_cast<char*>(to) + kHeader);
  const int pairs = half_of(d);
  for (int n = 0; n < kN; ++n, row += kW, out += kW) {
    for (int i = 0; i < pairs; i += kW) {
      Vec t[kW];
      turned(row, d, i, t);
      for (int j = 0; j < kW && i + j < pairs; ++j) store(out + (i + j) * kPanel, (Int)t[j]);
    }
  }
}

/// [key / kM][pair][kM], zeros behind the last key. A vector is longer than a column of kM: each
/// store overwrites what the one before wrote too much.
void pack_k(const Rows& k, void* to) {
  auto* out = static_cast<int*>(to);
  const int pairs = half_of(k.dim);
  for (int first = 0; first < k.count; first += kM, out += static_cast<long>(kM) * pairs) {
    const void* row[kW] = {};
    for (int m = 0; m < kM; ++m) row[m] = row_of(k, first + m);
    for (int i = 0; i < pairs; i += kW) {
      Vec t[kW];
      turned(row, k.dim, i, t);
      for (int j = 0; j < kW && i + j < pairs; ++j) store(out + (i + j) * kM, (Int)t[j]);
    }
  }
}

/// Numbers [i, i + kW) of a row, each in the low half of an Int; null: zeros.
inline Int wide(const char* row, int i) {
  if (row == nullptr) return Int{};
  return (Int)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row + 2L * i)));
}
inline int number(const char* row, int i) {
  unsigned short bits = 0;
  if (row != nullptr) __builtin_memcpy(&bits, row + 2L * i, sizeof bits);
  return bits;
}

/// [slab][pair of keys][numbers of the slab]; writes too much as pack_k does.
void pack_v(const Rows& v, void* to) {
  const int d = v.dim;
  for (int s = 0; s < slabs_of(d); ++s) {
    const int begin = slab_begin(d, s);
    const int size = slab_begin(d, s + 1) - begin;
    int* out = static_cast<int*>(to) + static_cast<long>(kTile / 2) * begin;
    for (int j = 0; j < v.count; j += 2, out += size) {
      const char* a = row_of(v, j);
      const char* b = row_of(v, j + 1);
      if (begin + kW <= d) {
        store(out, wide(a, begin) | wide(b, begin) << 16);
        continue;
      }
      for (int i = 0; i < size; ++i) {
        const auto high = static_cast<unsigned>(number(b, begin + i)) << 16;
        out[i] = number(a, begin + i) | static_cast<int>(high);
      }
    }
  }
}

// --- Products
// --------------------------------------------------------------------------------------

/// acc[M][lanes] += A[M][depth] b[depth][lanes] in pairs: A(m, i) = a[i * M + m].
template <int M>
inline void multiply(const int* a, const int* b, int depth, Vec (&acc)[M][kN]) {
  for (int i = 0; i < depth; ++i, a += M, b += kPanel) {
    Int column[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) column[n] = load(b + n * kW);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Int x = all(a[m]);
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        acc[m][n] = (Vec)_mm512_dpbf16_ps((__m512)acc[m][n], (__m512bh)x, (__m512bh)column[n]);
      }
    }
  }
}

template <int M>
inline void clear(Vec (&acc)[M][kN]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) acc[m][n] = Vec{};
  }
}

/// Scores of the keys of a piece, factor * q.k, into c[count][kPanel] and a few rows behind. Maxima
/// go to `top` where it is given.
inline void scores(const int* pack, int pairs, const int* panel, const Piece& piece, float factor,
                   float* c, Vec* top) {
  const int* a = pack + static_cast<long>(piece.first) * pairs;
  for (int j = 0; j < piece.count; j += kM, a += static_cast<long>(kM) * pairs) {
    Vec acc[kM][kN];
    clear(acc);
    multiply<kM>(a, panel, pairs, acc);
    float* to = c + j * kPanel;
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) store(to + (m * kN + n) * kW, acc[m][n] * factor);
    }
    if (top == nullptr) continue;
    const int keys = piece.count - j < kM ? piece.count - j : kM;
    for (int m = 0; m < keys; ++m) {
      for (int n = 0; n < kN; ++n) top[n] = max(load(to + (m * kN + n) * kW), top[n]);
    }
  }
}

/// o[M][kPanel] = o * decay + sum over the pairs of keys of the pieces of slab[pair][M]
/// p[pair][kPanel]; where `first`, o had nothing. Pairs of p follow on from piece to piece.
template <int M>
void by_slab(const ForwardStep& s, const int* slab, const int* p, const Vec* decay, float* o) {
  Vec acc[M][kN];
  clear(acc);
  for (int t = 0; t < s.piece_count; ++t) {
    const int pairs = half_of(s.pieces[t].count);
    multiply<M>(slab + static_cast<long>(s.pieces[t].first / 2) * M, p, pairs, acc);
    p += static_cast<long>(pairs) * kPanel;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      float* to = o + (m * kN + n) * kW;
      if (!s.first) acc[m][n] += load(to) * decay[n];
      store(to, acc[m][n]);
    }
  }
}

void values(const ForwardStep& s, const int* p, const Vec* decay) {
  for (int i = 0; i < slabs_of(s.d_v); ++i) {
    const int begin = slab_begin(s.d_v, i);
    const int* slab = static_cast<const int*>(s.v) + static_cast<long>(kTile / 2) * begin;
    float* to = s.o + begin * kPanel;
    switch (slab_begin(s.d_v, i + 1) - begin) {
#define DATTN_CASE(M)                  \
  case M:                              \
    by_slab<M>(s, slab, p, decay, to); \
    break;
      DATTN_CASE(1)
      DATTN_CASE(2)
      DATTN_CASE(3)
      DATTN_CASE(4)
      DATTN_CASE(5)
      DATTN_CASE(6)
      DATTN_CASE(7)
      DATTN_CASE(8)
      DATTN_CASE(9)
      DATTN_CASE(10)
      DATTN_CASE(11)
      DATTN_CASE(12)
#undef DATTN_CASE
      default:
        __builtin_unreachable();
    }
  }
}

// --- Forward
// ---------------------------------------------------------------------------------------

inline Vec exp(Vec x) { return exp2(x * kLog2E); }
inline Vec sigmoid(Vec x) { return sigmoid2(x * kLog2E); }

/// (low, high) of each lane, rounded to bfloat16.
inline Int weave(Vec low, Vec high) {
  const auto v = (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  constexpr Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Int)_mm512_permutexvar_epi16((__m512i)order, (__m512i)v);
}

/// Weights of `rows` scores of vector n of a panel: sums of them, and pairs in place of the scores,
/// row j those of rows 2 j and 2 j + 1.
template <class Weight>
inline Vec weigh(float* scores, int rows, int n, const Weight& weight) {
  Vec part[2] = {};
  float* at = scores + n * kW;
  auto* pairs = reinterpret_cast<int*>(at);
  int j = 0;
  for (; j + 2 <= rows; j += 2, at += 2 * kPanel, pairs += kPanel) {
    const Vec low = weight(load(at));
    const Vec high = weight(load(at + kPanel));
    part[0] += low;
    part[1] += high;
    store(pairs, weave(low, high));
  }
  if (j < rows) {
    const Vec low = weight(load(at));
    part[0] += low;
    store(pairs, weave(low, Vec{}));
  }
  return part[0] + part[1];
}

void forward(const ForwardStep& s) {
  auto* p = static_cast<float*>(s.scratch);
  float factor;
  __builtin_memcpy(&factor, s.q, sizeof factor);
  const auto* q = reinterpret_cast<const int*>(static_cast<const char*>(s.q) + kHeader);
  const auto* k = static_cast<const int*>(s.k);
  const bool plain = absent(s.rules);
  Vec top[kN];
  for (int n = 0; n < kN; ++n) top[n] = all(-kInf);
  int rows = 0;
  for (int t = 0; t < s.piece_count; ++t) {
    const Piece& piece = s.pieces[t];
    float* at = p + rows * kPanel;
    const bool whole = (piece.live & kHalves) == kHalves;
    const bool as_is = plain && !piece.masked && whole;
    scores(k, half_of(s.d_qk), q, piece, factor, at, as_is ? top : nullptr);
    if (!as_is) {
      if (!plain) apply_rules<kN>(s.rules, piece, 1, at, nullptr);
      if (piece.masked) forbid<kN>(s.allowed, piece, at);
      for (int n = 0; n < kN && !whole; ++n) {  // computed, but nobody there sees the keys
        if ((piece.live >> n & 1) != 0) continue;
        for (int j = 0; j < piece.count; ++j) store(at + (j * kN + n) * kW, all(-kInf));
      }
      for (int j = 0; j < piece.count; ++j) {
        for (int n = 0; n < kN; ++n) top[n] = max(load(at + (j * kN + n) * kW), top[n]);
      }
    }
    rows += piece.count;
  }
  Vec decay[kN];
  for (int n = 0; n < kN; ++n) {
    Vec sum;
    if (s.normalizer == Normalizer::softmax) {
      const Vec before = load(s.m + n * kW);
      const Vec now = max(top[n], before);
      store(s.m + n * kW, now);
      // A row that has met no key yet keeps -inf; subtracting 0 there keeps NaN away.
      const Vec base = now == all(-kInf) ? Vec{} : now;
      decay[n] = exp(before - base);
      sum = weigh(p, rows, n, [&](Vec x) { return exp(x - base); });
    } else {
      store(s.m + n * kW, Vec{});
      decay[n] = all(1.0f);
      sum = weigh(p, rows, n, [&](Vec x) { return sigmoid(x + s.rules.shift); });
    }
    for (int i = 0; i < kW; ++i) {
      double& l = s.l[n * kW + i];
      l = l * static_cast<double>(decay[n][i]) + static_cast<double>(sum[i]);
    }
  }
  values(s, reinterpret_cast<const int*>(p), decay);
}

}  // namespace

const Kernel& kernel() {
  static const Kernel table = [] {
    Kernel made = avx512::kernel();
    made.lanes = kPanel;
    static_assert(kN == 2);
    made.parts = kN;
    made.granule = kGranule;
    made.tile = kTile;
    made.q_size = q_bytes;
    made.k_size = k_bytes;
    made.v_size = v_bytes;
    made.forward_scratch = forward_bytes;
    made.pack_q = pack_q;
    made.pack_k = pack_k;
    made.pack_v = pack_v;
    made.forward = forward;
    return made;
  }();
  return table;
}

}  // namespace dattn::DATTN_ISA
