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
constexpr int kGranule = 6;      // every kM is a multiple
constexpr int kTile = 192;
constexpr int kBackwardTile = 96;
constexpr int kBackwardLanes = 64;  // row length of P^T and dS^T in backward
constexpr int kBackwardPanels = kBackwardLanes / kPanel;
static_assert(kM % kGranule == 0 && kTile % kM == 0 && kBackwardTile % kM == 0);

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
#include "kernels/isa/fma_products.inc"

// --- Forward
// ---------------------------------------------------------------------------------------

/// Whether vector n of the panel sees some of the piece.
inline bool lives(const Piece& piece, int n) { return (piece.live >> n & 1u) != 0; }

/// Scores become weights, in place, rows kPanel apart; they add up in `part`.
template <class Weight>
inline void weigh(const Weight& weight, int rows, float* at, Vec (&part)[4]) {
  int j = 0;
  for (; j + 4 <= rows; j += 4, at += 4 * kPanel) {
    for (int i = 0; i < 4; ++i) {
      const Vec x = weight(load(at + i * kPanel));
      store(at + i * kPanel, x);
      part[i] += x;
    }
  }
  for (; j < rows; ++j, at += kPanel) {
    const Vec x = weight(load(at));
    store(at, x);
    part[0] += x;
  }
}

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
      if (!plain) apply_rules<kN>(s.rules, piece, 1, at, nullptr);
      if (piece.masked) forbid<kN>(s.allowed, piece, at);
      for (int n = 0; n < kN; ++n) {
        if (!lives(piece, n)) continue;
        for (int j = 0; j < piece.count; ++j) top[n] = max(load(at + (j * kN + n) * kW), top[n]);
      }
    }
    rows += piece.count;
  }

  Vec decay[kN];
  for (int n = 0; n < kN; ++n) {
    // Short sums in float, long ones in double: LSE is held to 1e-6 absolute.
    Vec part[4] = {};
    const bool softmax = s.normalizer == Normalizer::softmax;
    Vec base{};
    if (softmax) {
      const Vec before = load(s.m + n * kW);
      const Vec now = max(top[n], before);
      store(s.m + n * kW, now);
      // A row that has met no key yet keeps -inf; subtracting 0 there keeps NaN away.
      base = now == all(-kInf) ? Vec{} : now;
      decay[n] = exp(before - base);
    } else {
      store(s.m + n * kW, Vec{});
      decay[n] = all(1.0f);
    }
    float* at = p + n * kW;
    for (int t = 0; t < s.piece_count;) {
      if (!lives(s.pieces[t], n)) {
        at += static_cast<long>(s.pieces[t++].count) * kPanel;
        continue;
      }
      int count = 0;
      while (t < s.piece_count && lives(s.pieces[t], n)) count += s.pieces[t++].count;
      if (softmax) {
        weigh([&](Vec x) { return exp(x - base); }, count, at, part);
      } else {
        weigh([&](Vec x) { return sigmoid(x + s.rules.shift); }, count, at, part);
      }
      at += static_cast<long>(count) * kPanel;
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

/// c[M][width] += a[M][depth] b[depth][width]; rows of a are kBackwardLanes apart.
template <int M>
void by_lane(const float* a, const float* b, int depth, int width, float* c) {
  for (int col = 0; col < width; col += kPanel) {
    Vec acc[M][kN];
    clear(acc);
    multiply<M, kBackwardLanes, 1, 0, kN>(a, b + col, width, depth, acc);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
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
    if (!lives(piece, n)) continue;
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

  // Of each granule of keys the vectors of the tile of queries that see some of it.
  unsigned live[kBackwardTile / kGranule] = {};
  for (int p = 0; p < s.panels; ++p) {
    for (int t = 0; t < s.piece_counts[p]; ++t) {
      const Piece& piece = s.pieces[p][t];
      const unsigned vectors = (piece.live & ((1u << kN) - 1)) << (p * kN);
      const int end = (piece.first + piece.count + kGranule - 1) / kGranule;
      for (int g = piece.first / kGranule; g < end; ++g) live[g] |= vectors;
    }
  }
  const auto clear = [&](int j, int end, int vector) {
    for (; j < end; ++j) {
      store(pt + j * kBackwardLanes + vector * kW, Vec{});
      store(dst + j * kBackwardLanes + vector * kW, Vec{});
    }
  };

  for (int p = 0; p < s.panels; ++p) {
    for (int t = 0; t < s.piece_counts[p]; ++t) {
      const Piece& piece = s.pieces[p][t];
      scores(k, s.d_qk, q + static_cast<long>(p) * kPanel * s.d_qk, piece, score, nullptr);
      scores(v, s.d_v, d_o + static_cast<long>(p) * kPanel * s.d_v, piece, dp, nullptr);
      apply_rules<kN>(s.rules[p], piece, 1, score, derivative);
      if (piece.masked) forbid<kN>(s.allowed[p], piece, score);
      const auto run = piece.masked ? differentiate<true> : differentiate<false>;
      run(s, piece, score, dp, s.rules[p].cap != 0 ? derivative : nullptr, s.rules[p].shift,
          s.lse + p * kPanel, s.delta + p * kPanel, pt + piece.first * kBackwardLanes + p * kPanel,
          dst + piece.first * kBackwardLanes + p * kPanel);
      const int end = piece.first + piece.count;
      for (int n = 0; n < kN; ++n) clear(end, up(end, kGranule), p * kN + n);
    }
    values<kBackwardLanes, false>(s.pieces[p], s.piece_counts[p],
                                  k + static_cast<long>(kBackwardTile) * s.d_qk, s.d_qk,
                                  kBackwardTile, dst + p * kPanel, nullptr, false,
                                  s.dq + static_cast<long>(p) * s.d_qk * kPanel);
  }

  const int width_q = up(s.d_qk, kPanel);
  const int width_v = up(s.d_v, kPanel);
  constexpr int kGranules = kM / kGranule;  // that a product takes together
  for (int first = 0; first < kBackwardTile / kGranule; first += kGranules) {
    unsigned vectors = 0;
    int granules = 0;
    int g = first;  // the last one alive
    for (int i = 0; i < kGranules; ++i) {
      vectors |= live[first + i];
      if (live[first + i] == 0) continue;
      ++granules;
      g = first + i;
    }
    if (granules == 0) continue;
    if (granules == kGranules) g = first;
    // Between the first vector alive and the last one rows are zero where they are not filled.
    const int begin = __builtin_ctz(vectors);
    const int end = 32 - __builtin_clz(vectors);
    for (int i = g; i < g + granules; ++i) {
      for (int n = begin; n < end; ++n) {
        if ((live[i] >> n & 1u) == 0) clear(i * kGranule, (i + 1) * kGranule, n);
      }
    }
    const int j = g * kGranule;
    const long at = static_cast<long>(j) * kBackwardLanes + begin * kW;
    const int depth = (end - begin) * kW;
    const auto product = granules == kGranules ? by_lane<kM> : by_lane<kGranule>;
    product(pt + at, d_o + panels_floats(s.d_v) + static_cast<long>(begin) * kW * width_v, depth,
            width_v, s.dv + static_cast<long>(j) * width_v);
    product(dst + at, q + panels_floats(s.d_qk) + static_cast<long>(begin) * kW * width_q, depth,
            width_q, s.dk + static_cast<long>(j) * width_q);
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
    .parts = kN,
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
