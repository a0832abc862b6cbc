// Attention by fused multiply-add, compiled once per instruction set: DATTN_ISA is the namespace,
// DATTN_LANES the floats of a vector register, DATTN_KEYS how many rows of accumulators a product
// keeps in registers (two vectors each).
//
// Every product is C[M][lanes] (+)= A[M][depth] B[depth][lanes]: B is read as vectors, A number by
// number. Packs lay A out in the order in which it is read.
#include "kernels/isa/vector.inc"

namespace dattn::DATTN_ISA {
namespace {

constexpr int kN = 2;
constexpr int kM = DATTN_KEYS;
constexpr int kPanel = kN * kW;  // lanes
constexpr int kGranule = 12;     // a multiple of every kM
constexpr int kTile = 192;
constexpr int kBackwardTile = 96;
constexpr int kBackwardLanes = 64;  // row length of P^T and dS^T in backward
constexpr int kBackwardPanels = kBackwardLanes / kPanel;
static_assert(kGranule % kM == 0 && kTile % kGranule == 0 && kBackwardTile % kGranule == 0);

typedef unsigned short Half __attribute__((vector_size(2 * kW)));

inline float get(const void* row, Element element, long i) {
  if (element == Element::f4) return static_cast<const float*>(row)[i];
  const unsigned bits = static_cast<unsigned>(static_cast<const unsigned short*>(row)[i]) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline Vec get_vector(const void* row, Element element, long i) {
  if (element == Element::f4) return load(static_cast<const float*>(row) + i);
#if DATTN_LANES == 16 && defined(__AVX512F__)
  const void* at = static_cast<const unsigned short*>(row) + i;
  const auto* half = static_cast<const __m256i*>(at);
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(half)), 16);
#elif DATTN_LANES == 8 && defined(__AVX2__)
  const void* at = static_cast<const unsigned short*>(row) + i;
  const auto* half = static_cast<const __m128i*>(at);
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), 16);
#else
  Half h;
  __builtin_memcpy(&h, static_cast<const unsigned short*>(row) + i, sizeof h);
  return (Vec)(__builtin_convertvector(h, Int) << 16);
#endif
}

inline const void* row_of(const Rows& rows, long i) {
  const long size = rows.element == Element::f4 ? 4 : 2;
  return static_cast<const char*>(rows.data) + i * rows.stride * size;
}

/// e^x for x <= 0: the maximum weighs exactly 1, and scores stay what q.k made them.
inline Vec exp(Vec x) { return exp2(x * kLog2E); }
/// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) { return sigmoid2(x * kLog2E); }

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }

#include "kernels/isa/fma_pack.inc"

// --- Products
// --------------------------------------------------------------------------------------

template <int M>
inline void clear(Vec (&acc)[M][kN]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) acc[m][n] = Vec{};
  }
}

constexpr int kPiece = 48;  // numbers of a row that are summed in registers, at most

/// acc[M][lanes] += A[M][depth] b[depth][lanes]: A(m, i) = a[m * Row + i * Column], rows of b are
/// `step` apart. Every product of this file.
template <int M, int Row, int Column>
inline void multiply(const float* a, const float* b, long step, int depth, Vec (&acc)[M][kN]) {
  for (int i = 0; i < depth; ++i, a += Column, b += step) {
    Vec column[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) column[n] = load(b + n * kW);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec x = all(a[m * Row]);
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) acc[m][n] += x * column[n];
    }
  }
}

/// c[kM][kPanel] = a[depth][kM]^T b[depth][kPanel], or += if Add; top <- max(top, c) if Top.
template <bool Top, bool Add>
inline void by_row_piece(const float* a, const float* b, int depth, float* c, Vec* top) {
  Vec acc[kM][kN];
  clear(acc);
  multiply<kM, 1, kM>(a, b, kPanel, depth, acc);
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      float* to = c + (m * kN + n) * kW;
      if constexpr (Add) acc[m][n] += load(to);
      store(to, acc[m][n]);
      if constexpr (Top) top[n] = max(acc[m][n], top[n]);
    }
  }
}

/// The same over any depth, piece by piece: rounding grows with the square root of the pieces then,
/// not of the depth, and a score is held to 1e-6.
template <bool Top>
inline void by_row(const float* a, const float* b, int depth, float* c, Vec* top) {
  const int pieces = (depth + kPiece - 1) / kPiece;
  if (pieces <= 1) return by_row_piece<Top, false>(a, b, depth, c, top);
  const int even = (depth + pieces - 1) / pieces;
  by_row_piece<false, false>(a, b, even, c, nullptr);
  int from = even;
  for (; depth - from > even; from += even) {
    by_row_piece<false, true>(a + from * kM, b + from * kPanel, even, c, nullptr);
  }
  by_row_piece<Top, true>(a + from * kM, b + from * kPanel, depth - from, c, top);
}

/// Rows [first, first + count) of a pack by row against a panel, into c[count][kPanel] and a few
/// rows behind. Maxima over all rows go to `top` where it is given.
inline void scores(const float* pack, int d, const float* panel, const Piece& piece, float* c,
                   Vec* top) {
  const float* a = pack + static_cast<long>(piece.first) * d;
  int j = 0;
  for (; j + kM <= piece.count; j += kM, a += static_cast<long>(kM) * d) {
    if (top != nullptr) {
      by_row<true>(a, panel, d, c + j * kPanel, top);
    } else {
      by_row<false>(a, panel, d, c + j * kPanel, top);
    }
  }
  if (j == piece.count) return;
  by_row<false>(a, panel, d, c + j * kPanel, nullptr);
  if (top == nullptr) return;
  for (; j < piece.count; ++j) {
    for (int n = 0; n < kN; ++n) top[n] = max(load(c + (j * kN + n) * kW), top[n]);
  }
}

/// o[M][kPanel] = o * decay + sum over the keys of the pieces of slab[key][M] p[key][kPanel]; where
/// `first`, o had nothing. Rows of p are `Stride` apart; Packed: they follow on from piece to
/// piece, else they stand at their key.
template <int M, int Stride, bool Packed>
void by_slab(const Piece* pieces, int count, const float* slab, const float* p, const Vec* decay,
             bool first, float* o) {
  Vec acc[M][kN];
  clear(acc);
  const float* b = p;
  for (int t = 0; t < count; ++t) {
    const float* a = slab + static_cast<long>(pieces[t].first) * M;
    if constexpr (!Packed) b = p + pieces[t].first * Stride;
    multiply<M, 1, M>(a, b, Stride, pieces[t].count, acc);
    if constexpr (Packed) b += static_cast<long>(pieces[t].count) * Stride;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      float* to = o + (m * kN + n) * kW;
      if (!first) acc[m][n] += decay != nullptr ? load(to) * decay[n] : load(to);
      store(to, acc[m][n]);
    }
  }
}

/// o[d][kPanel] = o * decay + (pack by slab)^T p: see by_slab.
template <int Stride, bool Packed>
void values(const Piece* pieces, int count, const float* pack, int d, int tile, const float* p,
            const Vec* decay, bool first, float* o) {
  const Slabs slabs(d);
  for (int s = 0; s < slabs.count; ++s) {
    const int begin = slabs.begin(s);
    const float* slab = pack + static_cast<long>(tile) * begin;
    float* to = o + begin * kPanel;
    switch (slabs.begin(s + 1) - begin) {
#define DATTN_CASE(M)                                                     \
  case M:                                                                 \
    by_slab<M, Stride, Packed>(pieces, count, slab, p, decay, first, to); \
    break;
      DATTN_CASE(1)
      DATTN_CASE(2)
      DATTN_CASE(3)
      DATTN_CASE(4)
      DATTN_CASE(5)
      DATTN_CASE(6)
#if DATTN_KEYS > 6
      DATTN_CASE(7)
      DATTN_CASE(8)
      DATTN_CASE(9)
      DATTN_CASE(10)
      DATTN_CASE(11)
      DATTN_CASE(12)
#endif
#undef DATTN_CASE
      default:
        __builtin_unreachable();
    }
  }
}

// --- Forward
// ---------------------------------------------------------------------------------------

void forward(const ForwardStep& s) {
  auto* p = static_cast<float*>(s.scratch);
  const auto* q = static_cast<const float*>(s.q);
  const auto* k = static_cast<const float*>(s.k);
  const bool plain = absent(s.rules);
  Vec top[kN];
  for (int n = 0; n < kN; ++n) top[n] = all(-kInf);
  int rows = 0;
  for (int t = 0; t < s.piece_count; ++t) {
    const Piece& piece = s.pieces[t];
    float* at = p + rows * kPanel;
    const bool as_is = plain && !piece.masked;
    scores(k, s.d_qk, q, piece, at, as_is ? top : nullptr);
    if (!as_is) {
      if (!plain) apply_rules<kN>(s.rules, piece, at, nullptr);
      if (piece.masked) forbid<kN>(s.allowed, piece, at);
      for (int j = 0; j < piece.count; ++j) {
        for (int n = 0; n < kN; ++n) top[n] = max(load(at + (j * kN + n) * kW), top[n]);
      }
    }
    rows += piece.count;
  }

  Vec decay[kN];
  for (int n = 0; n < kN; ++n) {
    // Short sums in float, long ones in double: LSE is held to 1e-6 absolute.
    Vec part[4] = {};
    float* at = p + n * kW;
    if (s.normalizer == Normalizer::softmax) {
      const Vec before = load(s.m + n * kW);
      const Vec now = max(top[n], before);
      store(s.m + n * kW, now);
      // A row that has met no key yet keeps -inf; subtracting 0 there keeps NaN away.
      const Vec base = now == all(-kInf) ? Vec{} : now;
      decay[n] = exp(before - base);
      int j = 0;
      for (; j + 4 <= rows; j += 4, at += 4 * kPanel) {
        for (int i = 0; i < 4; ++i) {
          const Vec weight = exp(load(at + i * kPanel) - base);
          store(at + i * kPanel, weight);
          part[i] += weight;
        }
      }
      for (; j < rows; ++j, at += kPanel) {
        const Vec weight = exp(load(at) - base);
        store(at, weight);
        part[0] += weight;
      }
    } else {
      store(s.m + n * kW, Vec{});
      decay[n] = all(1.0f);
      for (int j = 0; j < rows; ++j, at += kPanel) {
        const Vec weight = sigmoid(load(at) + s.rules.shift);
        store(at, weight);
        part[j & 3] += weight;
      }
    }
    const Vec sum = (part[0] + part[1]) + (part[2] + part[3]);
    for (int i = 0; i < kW; ++i) {
      double& l = s.l[n * kW + i];
      l = l * static_cast<double>(decay[n][i]) + static_cast<double>(sum[i]);
    }
  }
  values<kPanel, true>(s.pieces, s.piece_count, static_cast<const float*>(s.v), s.d_v, kTile, p,
                       decay, s.first, s.o);
}

// --- Backward
// --------------------------------------------------------------------------------------

// A pack of a tile of queries, or of their dO: panels for products over d, then rows, padded, for
// those over queries.
long panels_floats(int d) { return static_cast<long>(kBackwardLanes) * d; }
long q_backward_bytes(int d) {
  return 4L * (panels_floats(d) + static_cast<long>(kBackwardLanes) * up(d, kPanel));
}
// A pack of a tile of keys: by row, then by slab. Of values: by row.
long k_backward_bytes(int d) { return 4L * (2 * kBackwardTile * d + kW); }
long v_backward_bytes(int d) { return 4L * (kBackwardTile * d + kW); }

constexpr long kStage = static_cast<long>(kBackwardTile + kM) * kPanel;
constexpr long kWeights = static_cast<long>(kBackwardTile) * kBackwardLanes;
long backward_bytes(int, int) { return 4L * (3 * kStage + 2 * kWeights); }

void pack_q_backward(const void* const* row, int panels, Element element, int d, float factor,
                     void* to) {
  auto* out = static_cast<float*>(to);
  for (int p = 0; p < panels; ++p) {
    pack_panel(row + p * kPanel, element, d, factor, out + static_cast<long>(p) * kPanel * d);
  }
  out += panels_floats(d);
  const int width = up(d, kPanel);
  for (int lane = 0; lane < panels * kPanel; ++lane, out += width) {
    int i = 0;
    if (row[lane] != nullptr) {
      for (; i + kW <= d; i += kW) store(out + i, get_vector(row[lane], element, i));
      for (; i < d; ++i) out[i] = get(row[lane], element, i);
    }
    for (; i < width; ++i) out[i] = 0;
  }
}

void pack_k_backward(const Rows& k, void* to) {
  auto* out = static_cast<float*>(to);
  pack_by_row(k, out);
  pack_by_slab(k, kBackwardTile, out + static_cast<long>(kBackwardTile) * k.dim);
}
void pack_v_backward(const Rows& v, void* to) { pack_by_row(v, static_cast<float*>(to)); }

/// c[kM][width] += a[kM][depth] b[depth][width]; rows of a are kBackwardLanes apart.
void by_lane(const float* a, const float* b, int depth, int width, float* c) {
  for (int col = 0; col < width; col += kPanel) {
    Vec acc[kM][kN];
    clear(acc);
    multiply<kM, kBackwardLanes, 1>(a, b + col, width, depth, acc);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        float* to = c + static_cast<long>(m) * width + col + n * kW;
        store(to, load(to) + acc[m][n]);
      }
    }
  }
}

/// From scores and dP to P and dS of one piece, rows kBackwardLanes apart in pt, dst.
template <bool Masked>
void differentiate(const BackwardStep& s, const Piece& piece, const float* score, const float* dp,
                   const float* derivative, float shift, const float* lse, const float* delta,
                   float* pt, float* dst) {
  for (int n = 0; n < kN; ++n) {
    const bool softmax = s.normalizer == Normalizer::softmax;
    const Vec base = softmax ? load(lse + n * kW) : Vec{};
    const Vec mean = softmax ? load(delta + n * kW) : Vec{};
    for (int j = 0; j < piece.count; ++j) {
      const int at = (j * kN + n) * kW;
      const Vec x = load(score + at);
      const Vec weight = softmax ? exp(x - base) : sigmoid(x + shift);
      Vec ds = weight * (load(dp + at) - mean);
      if (!softmax) ds = ds * (1.0f - weight);
      if (derivative != nullptr) ds = ds * load(derivative + at);
      // A forbidden pair has weight 0; its dP may be anything.
      if constexpr (Masked) ds = weight == Vec{} ? Vec{} : ds;
      store(pt + j * kBackwardLanes + n * kW, weight);
      store(dst + j * kBackwardLanes + n * kW, ds);
    }
  }
}

void add_panel(const float* panel, int d, float factor, float* const* row) {
  float keep[kPanel];
  float add[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    keep[i] = 1;
    add[i] = factor;
  }
  give_rows<kN>(panel, d, keep, add, row);
}

void backward(const BackwardStep& s) {
  auto* score = static_cast<float*>(s.scratch);
  float* dp = score + kStage;
  float* derivative = dp + kStage;
  float* pt = derivative + kStage;
  float* dst = pt + kWeights;
  const auto* q = static_cast<const float*>(s.q);
  const auto* d_o = static_cast<const float*>(s.d_o);
  const auto* k = static_cast<const float*>(s.k);
  const auto* v = static_cast<const float*>(s.v);

  // Rows of P^T and dS^T that some panel fills are zero in the panels that do not.
  bool live[kBackwardTile / kGranule] = {};
  for (int p = 0; p < s.panels; ++p) {
    for (int t = 0; t < s.piece_counts[p]; ++t) {
      const Piece& piece = s.pieces[p][t];
      const int end = (piece.first + piece.count + kGranule - 1) / kGranule;
      for (int g = piece.first / kGranule; g < end; ++g) live[g] = true;
    }
  }
  const auto clear = [&](int p, int begin, int end) {
    for (int j = begin; j < end; ++j) {
      if (!live[j / kGranule]) continue;
      for (int n = 0; n < kN; ++n) {
        store(pt + j * kBackwardLanes + p * kPanel + n * kW, Vec{});
        store(dst + j * kBackwardLanes + p * kPanel + n * kW, Vec{});
      }
    }
  };

  for (int p = 0; p < s.panels; ++p) {
    int filled = 0;
    for (int t = 0; t < s.piece_counts[p]; ++t) {
      const Piece& piece = s.pieces[p][t];
      clear(p, filled, piece.first);
      filled = piece.first + piece.count;
      scores(k, s.d_qk, q + static_cast<long>(p) * kPanel * s.d_qk, piece, score, nullptr);
      scores(v, s.d_v, d_o + static_cast<long>(p) * kPanel * s.d_v, piece, dp, nullptr);
      apply_rules<kN>(s.rules[p], piece, score, derivative);
      if (piece.masked) forbid<kN>(s.allowed[p], piece, score);
      const auto run = piece.masked ? differentiate<true> : differentiate<false>;
      run(s, piece, score, dp, s.rules[p].cap != 0 ? derivative : nullptr, s.rules[p].shift,
          s.lse + p * kPanel, s.delta + p * kPanel, pt + piece.first * kBackwardLanes + p * kPanel,
          dst + piece.first * kBackwardLanes + p * kPanel);
    }
    clear(p, filled, kBackwardTile);
    values<kBackwardLanes, false>(s.pieces[p], s.piece_counts[p],
                                  k + static_cast<long>(kBackwardTile) * s.d_qk, s.d_qk,
                                  kBackwardTile, dst + p * kPanel, nullptr, false,
                                  s.dq + static_cast<long>(p) * s.d_qk * kPanel);
  }

  const int width_q = up(s.d_qk, kPanel);
  const int width_v = up(s.d_v, kPanel);
  const int depth = s.panels * kPanel;
  for (int j = 0; j < kBackwardTile; j += kM) {
    if (!live[j / kGranule]) continue;
    by_lane(pt + j * kBackwardLanes, d_o + panels_floats(s.d_v), depth, width_v,
            s.dv + static_cast<long>(j) * width_v);
    by_lane(dst + j * kBackwardLanes, q + panels_floats(s.d_qk), depth, width_q,
            s.dk + static_cast<long>(j) * width_q);
  }
}

#include "kernels/isa/fma_decode.inc"
#include "kernels/isa/fma_narrow.inc"

// --- Table
// -----------------------------------------------------------------------------------------

#if defined(__x86_64__)
constexpr unsigned kDenormalsAreZero = 0x8040;  // FTZ and DAZ of MXCSR
long enter() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kDenormalsAreZero);
  return static_cast<long>(before);
}
void leave(long before) { _mm_setcsr(static_cast<unsigned>(before)); }
#elif defined(__aarch64__)
long enter() {
  unsigned long before;
  asm volatile("mrs %0, fpcr" : "=r"(before));
  asm volatile("msr fpcr, %0" : : "r"(before | (1ul << 24)));  // FZ
  return static_cast<long>(before);
}
void leave(long before) { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
long enter() { return 0; }
void leave(long) {}
#endif

constexpr Kernel kKernel{
    .nats = 1,
    .lanes = kPanel,
    .granule = kGranule,
    .tile = kTile,
    .backward_tile = kBackwardTile,
    .backward_panels = kBackwardPanels,
    .pad = kPanel,
    .q_size = panel_bytes,
    .k_size = k_bytes,
    .v_size = v_bytes,
    .forward_scratch = forward_bytes,
    .pack_q = pack_q,
    .pack_k = pack_k,
    .pack_v = pack_v,
    .forward = forward,
    .give = give_rows<kN>,
    .q_backward_size = q_backward_bytes,
    .k_backward_size = k_backward_bytes,
    .v_backward_size = v_backward_bytes,
    .backward_scratch = backward_bytes,
    .pack_q_backward = pack_q_backward,
    .pack_k_backward = pack_k_backward,
    .pack_v_backward = pack_v_backward,
    .backward = backward,
    .add_panel = add_panel,
    .decode = decode,
    .decode_lanes = kDecodeLanes,
    .multiply_narrow = multiply_narrow,
    .enter = enter,
    .leave = leave,
};

}  // namespace

const Kernel& kernel() { return kKernel; }

}  // namespace dattn::DATTN_ISA
