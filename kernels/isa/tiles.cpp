// The tile step, compiled once per instruction set: DATTN_ISA is the namespace, DATTN_LANES the
// floats of a vector register, DATTN_VECTORS how many of them a row of accumulators spans.
//
// Scores are computed transposed, S^T = K Q^T, with query rows in the lanes: maxima and sums then
// run down the lanes and need no horizontal step, Q is transposed once per tile of queries, and K
// and V are read as they lie.
#include "kernels/isa/tiles.hpp"

namespace dattn::DATTN_ISA {
namespace {

constexpr int kW = DATTN_LANES;
constexpr int kN = DATTN_VECTORS;
constexpr int kColumns = kW * kN;
// Sums over d are cut into pieces this long and the pieces added: rounding then grows with the
// square root of the pieces, not of d.
constexpr int kPiece = 32;

typedef float Vec __attribute__((vector_size(4 * kW)));
typedef int Int __attribute__((vector_size(4 * kW)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return x - Vec{}; }  // x - 0 is x for every x: no arithmetic left
inline Vec pick(Int where, Vec a, Vec b) { return (Vec)(((Int)a & where) | ((Int)b & ~where)); }
inline Vec max(Vec a, Vec b) { return pick(a > b, a, b); }

/// exp(x) for x <= 0 within about 1 ulp, 0 below -87.3; NaN stays NaN. Cody-Waite reduction and a
/// polynomial of degree 6.
inline Vec exp(Vec x) {
  const Int tiny = x < all(-87.3f);
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = pick(tiny, all(-87.3f), x);
  const Vec t = clamped * 1.44269504088896341f + magic;
  const Vec n = t - magic;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = (Vec)(((Int)t - (Int)magic + 127) << 23);
  return pick(tiny, Vec{}, p * power);
}

/// s[M][columns] (+)= k[M][depth] q[depth][columns]
template <int M>
inline void scores(const float* q, const float* k, long k_stride, int depth, bool add, float* s) {
  Vec acc[M][kN] = {};
  for (int i = 0; i < depth; ++i) {
    Vec column[kN];
    for (int n = 0; n < kN; ++n) column[n] = load(q + i * kTileQueries + n * kW);
    for (int m = 0; m < M; ++m) {
      const Vec key = all(k[m * k_stride + i]);
      for (int n = 0; n < kN; ++n) acc[m][n] += key * column[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kN; ++n) {
      float* to = s + m * kTileQueries + n * kW;
      store(to, add ? load(to) + acc[m][n] : acc[m][n]);
    }
  }
}

/// o[M][columns] = o * decay + sum over keys of v[key][M] p[key][columns]
template <int M>
inline void values(const float* p, const float* v, long v_stride, int keys, const float* decay,
                   float* o) {
  Vec acc[M][kN] = {};
  for (int j = 0; j < keys; ++j) {
    Vec column[kN];
    for (int n = 0; n < kN; ++n) column[n] = load(p + j * kTileQueries + n * kW);
    for (int m = 0; m < M; ++m) {
      const Vec value = all(v[j * v_stride + m]);
      for (int n = 0; n < kN; ++n) acc[m][n] += value * column[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kN; ++n) {
      float* to = o + m * kTileQueries + n * kW;
      store(to, load(to) * load(decay + n * kW) + acc[m][n]);
    }
  }
}

void all_scores(const TileStep& s) {
  for (int c = 0; c < kTileQueries; c += kColumns) {
    for (int from = 0; from < s.d_qk; from += kPiece) {
      const int depth = s.d_qk - from < kPiece ? s.d_qk - from : kPiece;
      const float* q = s.q + from * kTileQueries + c;
      for (int j = 0; j < s.keys; j += 4) {
        const float* k = s.k + j * s.k_stride + from;
        float* to = s.p + j * kTileQueries + c;
        switch (s.keys - j) {
          case 1:
            scores<1>(q, k, s.k_stride, depth, from > 0, to);
            break;
          case 2:
            scores<2>(q, k, s.k_stride, depth, from > 0, to);
            break;
          case 3:
            scores<3>(q, k, s.k_stride, depth, from > 0, to);
            break;
          default:
            scores<4>(q, k, s.k_stride, depth, from > 0, to);
        }
      }
    }
  }
}

/// p <- exp(p + bias - m) with the new maximum m; l and decay follow.
void soften(const TileStep& s, float* decay) {
  const float inf = __builtin_inff();
  for (int c = 0; c < kTileQueries; c += kW) {
    const Vec before = load(s.m + c);
    Vec top = before;
    for (int j = 0; j < s.keys; ++j) {
      float* at = s.p + j * kTileQueries + c;
      Vec score = load(at);
      if (s.bias != nullptr) {
        // Chosen, not added: NaN or inf + -inf would be NaN.
        const Vec bias = load(s.bias + j * kTileQueries + c);
        score = pick(bias == all(-inf), bias, score);
        store(at, score);
      }
      top = max(score, top);
    }
    // A row that has met no key yet keeps -inf; subtracting 0 there keeps NaN away.
    const Vec base = pick(top == all(-inf), Vec{}, top);
    const Vec factor = exp(before - base);
    // Short sums in float, long ones in double: LSE is held to 1e-6 absolute.
    Vec part[4] = {};
    for (int j = 0; j < s.keys; ++j) {
      float* at = s.p + j * kTileQueries + c;
      const Vec weight = exp(load(at) - base);
      store(at, weight);
      part[j & 3] += weight;
    }
    const Vec sum = (part[0] + part[1]) + (part[2] + part[3]);
    store(s.m + c, top);
    store(decay + c, factor);
    for (int i = 0; i < kW; ++i) {
      s.l[c + i] = s.l[c + i] * static_cast<double>(factor[i]) + static_cast<double>(sum[i]);
    }
  }
}

void all_values(const TileStep& s, const float* decay) {
  for (int c = 0; c < kTileQueries; c += kColumns) {
    const float* p = s.p + c;
    for (int i = 0; i < s.d_v; i += 4) {
      const float* v = s.v + i;
      float* o = s.o + i * kTileQueries + c;
      switch (s.d_v - i) {
        case 1:
          values<1>(p, v, s.v_stride, s.keys, decay + c, o);
          break;
        case 2:
          values<2>(p, v, s.v_stride, s.keys, decay + c, o);
          break;
        case 3:
          values<3>(p, v, s.v_stride, s.keys, decay + c, o);
          break;
        default:
          values<4>(p, v, s.v_stride, s.keys, decay + c, o);
      }
    }
  }
}

void step(const TileStep& s) {
  float decay[kTileQueries];
  all_scores(s);
  soften(s, decay);
  all_values(s, decay);
}

#define DATTN_TEXT(x) DATTN_TEXT_(x)
#define DATTN_TEXT_(x) #x
constexpr Tiles kTiles{DATTN_TEXT(DATTN_ISA), step};

}  // namespace

const Tiles& tiles() { return kTiles; }

}  // namespace dattn::DATTN_ISA
