// The bfloat16 kernel for AVX-512 with AMX. With DATTN_AMX_EMULATED the same code runs anywhere,
// on tiles in memory: only the layer right below differs.
//
// A panel has 32 lanes, two columns of 16 queries. Keys go in chunks of 32: S^T = K Q^T of a chunk
// goes through a staging buffer, its weights leave as the B tiles of O^T += V^T P^T. The staging is
// double: tile instructions for the next chunk stand between the vector instructions of this one,
// since the two overlap only where they are that close in the program.

#include "kernels/isa/vector.inc"
#ifdef DATTN_AMX_EMULATED
#include "kernels/isa/amx_emulated.hpp"
#endif

// 0: phases one after the other, 1: scores of the next chunk during the softmax, 2: also the
// products with V of the chunks before.
#ifndef DATTN_AMX_PIPELINE
#define DATTN_AMX_PIPELINE 1
#endif
#ifndef DATTN_AMX_TILE
#define DATTN_AMX_TILE 256
#endif
#ifndef DATTN_AMX_BACKWARD_TILE
#define DATTN_AMX_BACKWARD_TILE 128
#endif
#ifndef DATTN_AMX_BACKWARD_PIPELINE
#define DATTN_AMX_BACKWARD_PIPELINE 1
#endif
// How many of the 16 slices of a softmax share the tile instructions: the stores should not be
// the last thing before the next chunk reads them.
#ifndef DATTN_AMX_SPREAD
#define DATTN_AMX_SPREAD 14
#endif
// 0: reduce + scalef, 1: two additions + scalef.
#ifndef DATTN_AMX_EXP
#define DATTN_AMX_EXP 0
#endif
#ifndef DATTN_AMX_PREFETCH
#define DATTN_AMX_PREFETCH 0
#endif

// Whether weights lie in rows 256 bytes apart, half a page from the scores they come from, so that
// no load of scores has the page offset of a store just before it.
#ifndef DATTN_AMX_WIDE
#define DATTN_AMX_WIDE 0
#endif
// Whether the queries stay in tile registers during the scores of 64 numbers (not with PIPELINE 2).
#ifndef DATTN_AMX_HOLD
#define DATTN_AMX_HOLD 0
#endif

#ifdef DATTN_AMX_EMULATED
#define DATTN_INLINE inline  // nothing to gain, and sanitizers multiply the code
#else
#define DATTN_INLINE inline __attribute__((always_inline))
#endif

namespace dattn::DATTN_ISA {
namespace {

constexpr int kLanes = 32;
constexpr int kChunk = 32;  // keys, and numbers of a row that one tile instruction consumes
constexpr int kTile = DATTN_AMX_TILE;
constexpr int kTileChunks = kTile / kChunk;
constexpr int kBackwardTile = DATTN_AMX_BACKWARD_TILE;
constexpr int kBackwardChunks = kBackwardTile / kChunk;
constexpr int kPanels = 4;
constexpr long kReg = 1024;                  // bytes of a tile register
constexpr long kStageRow = 4 * kLanes;       // bytes of a row of scores
constexpr long kStage = kChunk * kStageRow;  // scores of a chunk
constexpr long kPairs = 2 * kReg;            // bfloat16 weights of a chunk
constexpr long kHeader = 64;                 // in front of packed queries
constexpr int kSlices = kChunk / 2;          // of two keys
constexpr float kNone = -3.402823466e+38f;   // reference of a lane that has seen no key
constexpr float kRaise = 65536.0f;           // sums of a chunk beyond it raise the reference
constexpr bool kWide = DATTN_AMX_WIDE != 0;
constexpr long kWeightRow = kWide ? 256 : 64;      // bytes between rows of the weights of forward
constexpr long kWeightColumn = kWide ? 64 : kReg;  // and from queries 0..15 to 16..31
constexpr long kWeightSkew = kWide ? 2048 : 0;
/// Where the weights of chunk c of a tile begin.
constexpr long weights_at(int c) { return kWide ? c / 2 * 4096L + c % 2 * 128L : c * kPairs; }
static_assert(kW == 16 && kTile % (2 * kChunk) == 0 && kBackwardTile % kChunk == 0);

typedef unsigned short Halves __attribute__((vector_size(64)));

// ------------------------------------------------------------------ tiles: the layer that differs

#ifdef DATTN_AMX_EMULATED

struct alignas(64) Register {
  unsigned char bytes[16][64];
};
thread_local Register registers[8];

template <int T>
void tile_zero() {
  registers[T] = Register{};
}
template <int T>
void tile_load(const void* from, long stride) {
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(registers[T].bytes[row], (const char*)from + row * stride, 64);
  }
}
template <int T>
void tile_store(void* to, long stride) {
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy((char*)to + row * stride, registers[T].bytes[row], 64);
  }
}
/// C += A B: rows of A hold 16 pairs, row i of B the i-th pair of each of 16 columns.
template <int C, int A, int B>
void tile_dot() {
  for (int row = 0; row < 16; ++row) {
    Vec sum;
    __builtin_memcpy(&sum, registers[C].bytes[row], 64);
    for (int pair = 0; pair < 16; ++pair) {
      unsigned a;
      Int b;
      __builtin_memcpy(&a, &registers[A].bytes[row][4 * pair], 4);
      __builtin_memcpy(&b, registers[B].bytes[pair], 64);
      const Int low = all((int)(a << 16));
      const Int high = all((int)(a & 0xffff0000u));
      sum = sum + (Vec)low * (Vec)(b << 16);
      sum = sum + (Vec)high * (Vec)(b & (int)0xffff0000u);
    }
    __builtin_memcpy(registers[C].bytes[row], &sum, 64);
  }
}

/// 2^x, 0 far below and infinity far above; NaN stays NaN.
inline Vec power(Vec x) {
  const Vec magic = all(12582912.0f);
  const Vec top = all(128.0f);
  const Vec t = (x > top ? top : x) + magic;
  const Vec n = t - magic;
  Vec r = x - n;
  const Int below = r < 0.0f;  // r is in [0, 1), as for the instruction
  r = below ? r + 1.0f : r;
  Vec p = all(7.706813402e-02f);
  p = p * r + 2.276438029e-01f;
  p = p * r + 6.951170544e-01f;
  p = p * r + 1.0f;
  const Vec scaled = (Vec)((Bits)p + (((Bits)t + (Bits)below) << 23));
  return x >= top ? all(kInf) : x < all(-126.0f) ? Vec{} : scaled;
}

/// Rounds to bfloat16: `low` into the lower half.
inline Halves narrow(Vec low, Vec high) {
  Halves to;
  for (int i = 0; i < 32; ++i) {
    const float x = i < 16 ? low[i] : high[i - 16];
    unsigned u;
    __builtin_memcpy(&u, &x, 4);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    to[i] = (unsigned short)((nan ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  return to;
}

inline void pin(Vec&) {}

void configure() {}
void release() {}

#else

// Volatile, and memory counts as written: tile and vector instructions stay in the order of the
// source. The intrinsics of gcc 12 promise neither.
template <int T>
DATTN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
DATTN_INLINE void tile_load(const void* from, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
DATTN_INLINE void tile_store(void* to, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
DATTN_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

/// p * 2^floor(n). Zero-masking by all ones costs nothing; gcc 12 warns of the plain intrinsic.
inline Vec scale_by(Vec p, Vec n) {
  return (Vec)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)n);
}

/// 2^x, 0 far below and infinity far above; NaN stays NaN. scalef takes the floor of x itself.
inline Vec power(Vec x) {
#if DATTN_AMX_EXP == 0
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 for infinities
  Vec p = all(7.706813402e-02f);
  p = p * r + 2.276438029e-01f;
  p = p * r + 6.951170544e-01f;
  p = p * r + 1.0f;
  return scale_by(p, x);
#else
  const Vec magic = all(12582912.0f);
  const Vec n = (x + magic) - magic;
  const Vec r = x - n;
  Vec p = all(5.517166907e-02f);
  p = p * r + 2.426111222e-01f;
  p = p * r + 6.932609855e-01f;
  p = p * r + 9.999280735e-01f;
  return scale_by(p, n);  // NaN scaled by -inf is 0
#endif
}

inline Halves narrow(Vec low, Vec high) {
  return (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/// Computes v here: gcc would leave a chain of sums for the end and store every term until then.
inline void pin(Vec& v) { asm("" : "+v"(v)); }

struct alignas(64) Configuration {
  unsigned char palette = 1;
  unsigned char start_row = 0;
  unsigned char reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64);

void configure() {
  const Configuration c;
  asm volatile("ldtilecfg %0" ::"m"(c) : "memory");
}
void release() { asm volatile("tilerelease" ::: "memory"); }

#endif

// --------------------------------------------------------------------------- vectors of bfloat16

/// low[0], high[0], low[1], ...: a row of a B tile from two rows of weights.
inline Halves weave(Vec low, Vec high) {
  const Halves v = narrow(low, high);
  return __builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Halves weave_low(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8,
                                 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
}
inline Halves weave_high(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23,
                                 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31,
                                 63);
}

/// As many perfect shuffles as a number of a row has bits transpose: four of 16 rows of 16. With 8
/// rows it is three, of 8 rows of 8 pairs; [row][8][2] becomes [8][2][row].
template <int Rows>
inline void transpose(Int (&rows)[Rows]) {
  for (int stage = Rows; stage > 1; stage /= 2) {
    Int next[Rows];
    for (int i = 0; i < Rows / 2; ++i) {
      const Int a = rows[i];
      const Int b = rows[i + Rows / 2];
      next[2 * i] =
          __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
    __builtin_memcpy(rows, next, sizeof next);
  }
}

// ---------------------------------------------------------------------------------------- packing

constexpr int chunks_of(int count) { return (count + kChunk - 1) / kChunk; }

/// Numbers [from, from + 32) of a row of `dim`, zeros beyond it; null: zeros.
inline Halves row_part(const void* row, int from, int dim) {
  Halves v{};
  if (row == nullptr || from >= dim) return v;
  const char* at = (const char*)row + 2L * from;
  if (dim - from >= 32) {
    __builtin_memcpy(&v, at, 64);
  } else {
    __builtin_memcpy(&v, at, 2 * (unsigned)(dim - from));
  }
  return v;
}
inline const void* row_of(const Rows& rows, int i) {
  return i < rows.count ? (const char*)rows.data + 2L * i * rows.stride : nullptr;
}

/// B tiles of a panel over its numbers: [column][dim / 32][16 pairs][16 queries][2].
void pack_panel(const void* const* row, int dim, char* to) {
  for (int column = 0; column < 2; ++column) {
    for (int c = 0; c < chunks_of(dim); ++c, to += kReg) {
      Int words[16];
      for (int i = 0; i < 16; ++i) {
        words[i] = (Int)row_part(row[16 * column + i], c * kChunk, dim);
      }
      transpose(words);
      __builtin_memcpy(to, words, sizeof words);
    }
  }
}

/// B tiles of a panel over its queries: [dim / 16][16 pairs][16 numbers][2].
void pack_panel_rows(const void* const* row, int dim, char* to) {
  for (int c = 0; c < chunks_of(dim); ++c, to += 2 * kReg) {
    for (int pair = 0; pair < 16; ++pair) {
      const Halves a = row_part(row[2 * pair], c * kChunk, dim);
      const Halves b = row_part(row[2 * pair + 1], c * kChunk, dim);
      const Halves low = weave_low(a, b);
      const Halves high = weave_high(a, b);
      __builtin_memcpy(to + 64 * pair, &low, 64);
      __builtin_memcpy(to + kReg + 64 * pair, &high, 64);
    }
  }
}

/// A tiles: [key / 16][dim / 32][16 keys][32 numbers].
void pack_rows(const Rows& rows, char* to) {
  for (int key = 0; key < kChunk * chunks_of(rows.count); key += 16) {
    for (int c = 0; c < chunks_of(rows.dim); ++c, to += kReg) {
      for (int i = 0; i < 16; ++i) {
        const Halves part = row_part(row_of(rows, key + i), c * kChunk, rows.dim);
        __builtin_memcpy(to + 64 * i, &part, 64);
      }
    }
  }
}

/// A tiles of the transpose: [dim / 16][chunk of keys, `chunks` of them][16 numbers][32 keys].
void pack_columns(const Rows& rows, int chunks, char* to) {
  for (int j = 0; j < chunks_of(rows.count); ++j) {
    for (int c = 0; c < chunks_of(rows.dim); ++c) {
      Int low[16];
      Int high[16];
      for (int pair = 0; pair < 16; ++pair) {
        const int key = j * kChunk + 2 * pair;
        const Halves a = row_part(row_of(rows, key), c * kChunk, rows.dim);
        const Halves b = row_part(row_of(rows, key + 1), c * kChunk, rows.dim);
        low[pair] = (Int)weave_low(a, b);
        high[pair] = (Int)weave_high(a, b);
      }
      transpose(low);
      transpose(high);
      __builtin_memcpy(to + (2L * c * chunks + j) * kReg, low, sizeof low);
      __builtin_memcpy(to + ((2L * c + 1) * chunks + j) * kReg, high, sizeof high);
    }
  }
}

long panel_size(int dim) { return 2 * kReg * chunks_of(dim); }

long q_size(int d_qk) { return kHeader + panel_size(d_qk); }
long k_size(int d_qk) { return kTileChunks * 2 * kReg * chunks_of(d_qk); }
long v_size(int d_v) { return kTileChunks * 2 * kReg * chunks_of(d_v); }

// The factor stays out of the packed numbers, which would have to be rounded again.
void pack_q(const void* const* row, Element, int d_qk, float factor, void* to) {
  __builtin_memcpy(to, &factor, sizeof factor);
  pack_panel(row, d_qk, (char*)to + kHeader);
}
void pack_k(const Rows& k, void* to) { pack_rows(k, (char*)to); }
void pack_v(const Rows& v, void* to) { pack_columns(v, kTileChunks, (char*)to); }

// Queries of backward: the panels over their numbers, then over their queries.
long q_backward_size(int dim) { return kHeader + 2 * kPanels * panel_size(dim); }
long k_backward_size(int d_qk) { return 2 * kBackwardChunks * 2 * kReg * chunks_of(d_qk); }
long v_backward_size(int d_v) { return kBackwardChunks * 2 * kReg * chunks_of(d_v); }

void pack_q_backward(const void* const* row, int panels, Element, int dim, float factor, void* to) {
  const long size = panel_size(dim);
  __builtin_memcpy(to, &factor, sizeof factor);
  char* at = (char*)to + kHeader;
  for (int p = 0; p < panels; ++p) {
    pack_panel(row + p * kLanes, dim, at + p * size);
    pack_panel_rows(row + p * kLanes, dim, at + (kPanels + p) * size);
  }
}
void pack_k_backward(const Rows& k, void* to) {
  pack_rows(k, (char*)to);
  pack_columns(k, kBackwardChunks, (char*)to + k_backward_size(k.dim) / 2);
}
void pack_v_backward(const Rows& v, void* to) { pack_rows(v, (char*)to); }

// -------------------------------------------------------------------------- streams of tile work
//
// Work as a sequence of kOps single instructions, to be put between others.

struct Nothing {
  static constexpr int kOps = 0;
  template <int I>
  void op() const {}
};

template <class First, class Second>
struct Both {
  static constexpr int kOps = First::kOps + Second::kOps;
  First first;
  Second second;
  template <int I>
  DATTN_INLINE void op() const {
    if constexpr (I < First::kOps) {
      first.template op<I>();
    } else {
      second.template op<I - First::kOps>();
    }
  }
};

/// The n-th of the eight instructions that multiply 2 x 2 tiles: C 0..3, A 4 and 5, B 6 and 7.
template <int N, bool Zero>
DATTN_INLINE void block_op(const char* a, long a_next, const char* b, long b_next,
                           long b_row = 64) {
  if constexpr (N == 0) tile_load<4>(a, 64);
  if constexpr (N == 1) tile_load<6>(b, b_row);
  if constexpr (N == 2) {
    if constexpr (Zero) tile_zero<0>();
    tile_dot<0, 4, 6>();
  }
  if constexpr (N == 3) tile_load<7>(b + b_next, b_row);
  if constexpr (N == 4) {
    if constexpr (Zero) tile_zero<1>();
    tile_dot<1, 4, 7>();
  }
  if constexpr (N == 5) tile_load<5>(a + a_next, 64);
  if constexpr (N == 6) {
    if constexpr (Zero) tile_zero<2>();
    tile_dot<2, 5, 6>();
  }
  if constexpr (N == 7) {
    if constexpr (Zero) tile_zero<3>();
    tile_dot<3, 5, 7>();
  }
}

template <bool Zero>
DATTN_INLINE void block(const char* a, long a_next, const char* b, long b_next, long b_row = 64) {
  block_op<0, Zero>(a, a_next, b, b_next, b_row);
  block_op<1, Zero>(a, a_next, b, b_next, b_row);
  block_op<2, Zero>(a, a_next, b, b_next, b_row);
  block_op<3, Zero>(a, a_next, b, b_next, b_row);
  block_op<4, Zero>(a, a_next, b, b_next, b_row);
  block_op<5, Zero>(a, a_next, b, b_next, b_row);
  block_op<6, Zero>(a, a_next, b, b_next, b_row);
  block_op<7, Zero>(a, a_next, b, b_next, b_row);
}

template <int N>
DATTN_INLINE void load_c(const float* c, long stride) {
  tile_load<N>((const char*)c + (N >> 1) * 16 * stride + (N & 1) * 64, stride);
}
template <int N>
DATTN_INLINE void store_c(float* c, long stride) {
  tile_store<N>((char*)c + (N >> 1) * 16 * stride + (N & 1) * 64, stride);
}

/// s [32 keys][32 lanes] = a chunk of keys times a panel, over D * 32 numbers.
template <int D>
struct ScoreStream {
  static constexpr int kOps = 8 * D + 4;
  const char* keys;
  const char* panel;
  float* s;
  template <int I>
  DATTN_INLINE void op() const {
    constexpr int kStep = I / 8;
    if constexpr (kStep < D) {
      block_op<I % 8, kStep == 0>(keys + kStep * kReg, D * kReg, panel + kStep * kReg, D * kReg);
    } else {
      store_c<I - 8 * D>(s, kStageRow);
    }
  }
};

/// ScoreStream<2> with the panel in registers 4..7, where `hold` has put it.
struct HeldScoreStream {
  [[maybe_unused]] static constexpr int kOps = 16;
  const char* keys;
  const char* panel;
  float* s;
  static DATTN_INLINE void hold(const char* panel) {
    tile_load<4>(panel, 64);
    tile_load<5>(panel + kReg, 64);
    tile_load<6>(panel + 2 * kReg, 64);
    tile_load<7>(panel + 3 * kReg, 64);
  }
  template <int I>
  DATTN_INLINE void op() const {
    constexpr int kHalf = I / 8;
    const char* a = keys + 2 * kHalf * kReg;
    if constexpr (I % 8 == 0) tile_load<2>(a, 64);
    if constexpr (I % 8 == 1) {
      tile_zero<0>();
      tile_dot<0, 2, 4>();
    }
    if constexpr (I % 8 == 2) {
      tile_zero<1>();
      tile_dot<1, 2, 6>();
    }
    if constexpr (I % 8 == 3) tile_load<3>(a + kReg, 64);
    if constexpr (I % 8 == 4) tile_dot<0, 3, 5>();
    if constexpr (I % 8 == 5) tile_dot<1, 3, 7>();
    if constexpr (I % 8 == 6) tile_store<0>(s + kHalf * 16 * kLanes, kStageRow);
    if constexpr (I % 8 == 7) tile_store<1>(s + kHalf * 16 * kLanes + kW, kStageRow);
  }
};

template <bool Held, int D>
struct ScoreStreamOf {
  using Type = ScoreStream<D>;
};
template <int D>
struct ScoreStreamOf<true, D> {
  using Type = HeldScoreStream;
};

/// A block of 32 rows of O^T += V^T P^T over N chunks.
template <int N>
struct ValueStream {
  static constexpr int kOps = 8 * N + 8;
  const char* v;
  const long* v_at;
  const char* p;
  float* o;
  template <int I>
  DATTN_INLINE void op() const {
    if constexpr (I < 4) {
      load_c<I>(o, kStageRow);
    } else if constexpr (I < 8 * N + 4) {
      constexpr int kStep = (I - 4) / 8;
      block_op<(I - 4) % 8, false>(v + v_at[kStep], kTileChunks * kReg, p + weights_at(kStep),
                                   kWeightColumn, kWeightRow);
    } else {
      store_c<I - 8 * N - 4>(o, kStageRow);
    }
  }
};

template <int From, int To, class Stream>
DATTN_INLINE void run(const Stream& stream) {
  if constexpr (From < To) {
    stream.template op<From>();
    run<From + 1, To>(stream);
  }
}

/// slice(0) .. slice(15) with the stream in between.
template <int I = 0, class Stream, class Slice>
DATTN_INLINE void interleave(const Stream& stream, Slice& slice) {
  if constexpr (Stream::kOps == 0) {
    for (int i = 0; i < kSlices; ++i) slice(i);
  } else if constexpr (I < kSlices) {
    constexpr int kOps = Stream::kOps;
    constexpr int kFrom = I < DATTN_AMX_SPREAD ? I * kOps / DATTN_AMX_SPREAD : kOps;
    constexpr int kTo = I + 1 < DATTN_AMX_SPREAD ? (I + 1) * kOps / DATTN_AMX_SPREAD : kOps;
    run<kFrom, kTo>(stream);
    slice(I);
    interleave<I + 1>(stream, slice);
  }
}

/// The same as ScoreStream at once, for any number of steps.
DATTN_INLINE void scores(int steps, const char* keys, const char* panel, float* s) {
  const long next = steps * kReg;
  block<true>(keys, next, panel, next);
  for (int i = 1; i < steps; ++i) block<false>(keys + i * kReg, next, panel + i * kReg, next);
  store_c<0>(s, kStageRow);
  store_c<1>(s, kStageRow);
  store_c<2>(s, kStageRow);
  store_c<3>(s, kStageRow);
}

/// Pairs of tiles, one pair for each step of a sum: at + offset[i] and `next` bytes behind it.
struct Operand {
  const char* at;
  long next;
  const long* offset;
  long row = 64;  ///< bytes between rows; for the right one only
};

/// c [32][32] += A B over `steps` pairs.
void accumulate(float* c, long stride, const Operand& a, const Operand& b, int steps) {
  load_c<0>(c, stride);
  load_c<1>(c, stride);
  load_c<2>(c, stride);
  load_c<3>(c, stride);
  for (int i = 0; i < steps; ++i) {
    block<false>(a.at + a.offset[i], a.next, b.at + b.offset[i], b.next, b.row);
  }
  store_c<0>(c, stride);
  store_c<1>(c, stride);
  store_c<2>(c, stride);
  store_c<3>(c, stride);
}

/// c [rows][32] += A B, 32 rows at a time; the next 32 rows of A lie `a_block` bytes on. `spare`
/// takes the place of rows that c lacks.
void accumulate_rows(float* c, int rows, float* spare, Operand a, long a_block, const Operand& b,
                     int steps) {
  for (; rows > 0; rows -= 32, c += 32 * kLanes, a.at += a_block) {
    if (rows >= 32) {
      accumulate(c, kStageRow, a, b, steps);
    } else {
      const unsigned long bytes = (unsigned long)rows * kStageRow;
      __builtin_memcpy(spare, c, bytes);
      __builtin_memset((char*)spare + bytes, 0, kStage - bytes);
      accumulate(spare, kStageRow, a, b, steps);
      __builtin_memcpy(c, spare, bytes);
    }
  }
}

// ------------------------------------------------------------------------------ scores of a chunk

/// Whether scores of these pairs are more than the factor away from what the tiles leave.
inline bool plain(const ScoreRules& rules, const Piece& piece) {
  return absent(rules) && !piece.masked && piece.count == kChunk;
}

/// Scores in base 2 from products, in place; -inf where there is no pair.
void finish_scores(const ScoreRules& rules, const Lanes& allowed, const Piece& piece, float factor,
                   float* s, float* derivative) {
  for (int i = 0; i < piece.count * 2; ++i) store(s + i * kW, load(s + i * kW) * factor);
  apply_rules<2>(rules, piece, s, derivative);
  if (piece.masked) forbid<2>(allowed, piece, s);
  for (int i = piece.count * 2; i < kChunk * 2; ++i) store(s + i * kW, all(-kInf));
}

// ---------------------------------------------------------------------------------------- forward

/// What turns the scores of a chunk into weights, sums of them and B tiles.
template <Normalizer N>
struct Weigh {
  const float* s;
  char* p;
  const char* ahead;  // lines to fetch, `lines` for each slice
  int lines;
  float factor;
  float shift;
  Vec m[2];
  Vec sum[2];

  DATTN_INLINE void operator()(int slice) {
    if constexpr (DATTN_AMX_PREFETCH != 0) {
      for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + (slice * lines + i) * 64L);
    }
    for (int n = 0; n < 2; ++n) {
      const float* at = s + (4 * slice + n) * kW;
      const Vec low = weight(load(at), n);
      const Vec high = weight(load(at + kLanes), n);
      sum[n] = sum[n] + low;
      sum[n] = sum[n] + high;
      const Halves pairs = weave(low, high);
      __builtin_memcpy(p + n * kWeightColumn + slice * kWeightRow, &pairs, 64);
    }
    pin(sum[0]);
    pin(sum[1]);
  }
  DATTN_INLINE Vec weight(Vec x, int n) const {
    if constexpr (N == Normalizer::softmax) return power(x * factor - m[n]);
    return sigmoid2(x * factor + shift);
  }
};

struct Forward {
  const ForwardStep& step;
  int v_blocks;
  char* p;
  float* spare;
  Piece chunks[kTileChunks];
  long v_at[kTileChunks];  // of the values of a chunk within v
  int count = 0;
  int done = 0;   // chunks whose products with V are in o
  int visit = 0;  // see PIPELINE 2: finished parts of the group that begins at `done`
  Vec m[2];
  Vec total[2] = {};

  explicit Forward(const ForwardStep& s)
      : step(s),
        v_blocks(chunks_of(s.d_v)),
        p((char*)s.scratch + 2 * kStage + kWeightSkew),
        spare((float*)((char*)s.scratch + 2 * kStage + kWeightSkew + weights_at(kTileChunks))) {
    for (int i = 0; i < step.piece_count; ++i) {
      const Piece& piece = step.pieces[i];
      for (int at = 0; at < piece.count; at += kChunk) {
        const int left = piece.count - at;
        chunks[count] = {piece.first + at, left < kChunk ? left : kChunk, piece.masked};
        v_at[count++] = (piece.first + at) / kChunk * kReg;
      }
    }
  }

  /// Brings o up to the weights of the chunks before `end`.
  void add_values(int end) {
    long p_at[kTileChunks];
    for (int i = 0; i < end; ++i) p_at[i] = weights_at(i);
    if (visit > 0) finish_group(p_at);
    if (done < end) {
      const Operand a{(const char*)step.v, kTileChunks * kReg, v_at + done};
      accumulate_rows(step.o, step.d_v, spare, a, 2 * kTileChunks * kReg,
                      {p, kWeightColumn, p_at + done, kWeightRow}, end - done);
    }
    done = end;
  }

  /// The parts that ValueStream has not done of the group of four chunks at `done`.
  void finish_group(const long* p_at) {
    for (; visit < 4; ++visit) {
      const int half = v_blocks < 4 ? visit % 2 : 0;
      const int b = v_blocks < 4 ? visit / 2 : visit;
      const int first = done + 2 * half;
      const Operand a{(const char*)step.v + b * 2L * kTileChunks * kReg, kTileChunks * kReg,
                      v_at + first};
      accumulate(step.o + b * 32L * kLanes, kStageRow, a,
                 {p, kWeightColumn, p_at + first, kWeightRow}, v_blocks < 4 ? 2 : 4);
    }
    done += 4;
    visit = 0;
  }

  /// Raises m to the maxima of chunk c (scores s * factor): what is in o, l and total shrinks.
  void raise(int c, const float* s, float factor) {
    add_values(c);
    Vec scale[2];
    for (int n = 0; n < 2; ++n) {
      Vec top = all(-kInf);
      for (int j = 0; j < kChunk; ++j) top = max(top, load(s + (2 * j + n) * kW) * factor);
      const Vec next = top > m[n] ? top : m[n];
      scale[n] = exp2(m[n] - next);
      m[n] = next;
      total[n] = total[n] * scale[n];
      for (int i = 0; i < kW; ++i) step.l[n * kW + i] *= (double)scale[n][i];
    }
    for (int i = 0; i < 2 * step.d_v; ++i) {
      store(step.o + i * kW, load(step.o + i * kW) * scale[i % 2]);
    }
  }
};

/// D and V are d_qk / 32 and d_v / 32 where both are known and whole, or 0.
template <Normalizer N, int D, int V>
void forward_by(const ForwardStep& step) {
  constexpr bool kSoftmax = N == Normalizer::softmax;
  constexpr bool kAhead = D > 0 && DATTN_AMX_PIPELINE > 0;
  constexpr bool kValues = kAhead && (V == 2 || V == 4) && DATTN_AMX_PIPELINE > 1;
  constexpr bool kHold = kAhead && !kValues && D == 2 && DATTN_AMX_HOLD != 0;
  using Scores = typename ScoreStreamOf<kHold, D>::Type;
  Forward f(step);
  const int steps = D > 0 ? D : chunks_of(step.d_qk);
  const long chunk_size = 2 * steps * kReg;
  const char* keys = (const char*)step.k;
  const char* panel = (const char*)step.q + kHeader;
  float factor;
  __builtin_memcpy(&factor, step.q, sizeof factor);
  for (int n = 0; n < 2; ++n) {
    const Vec m = load(step.m + n * kW);
    f.m[n] = m == -kInf ? all(kNone) : m;
  }
  const auto hold = [&] {
    if constexpr (kHold) HeldScoreStream::hold(panel);
  };

  const auto keys_of = [&](int c) { return keys + f.chunks[c].first / kChunk * chunk_size; };
  const auto stage = [&](int c) { return (float*)((char*)step.scratch + (c & 1) * kStage); };
  if (f.count > 0) scores(steps, keys_of(0), panel, stage(0));
  for (int c = 0; c < f.count; ++c) {
    float* s = stage(c);
    Weigh<N> weigh{};
    weigh.s = s;
    weigh.p = f.p + weights_at(c);
    weigh.ahead = keys_of(c) + 2 * chunk_size;
    weigh.lines = 2 * steps;
    weigh.factor = factor;
    weigh.shift = step.rules.shift;
    if (!plain(step.rules, f.chunks[c])) {
      finish_scores(step.rules, step.allowed, f.chunks[c], factor, s, nullptr);
      weigh.factor = 1;
    }
    if constexpr (kSoftmax) {
      if (c == 0 && any((f.m[0] == kNone) | (f.m[1] == kNone))) f.raise(c, s, weigh.factor);
      if (c == 0) hold();
      weigh.m[0] = f.m[0];
      weigh.m[1] = f.m[1];
    }
    const bool last = c + 1 == f.count;
    if constexpr (!kAhead) {
      interleave(Nothing{}, weigh);
    } else if (last) {
      interleave(Nothing{}, weigh);
    } else {
      const Scores ahead{keys_of(c + 1), panel, stage(c + 1)};
      if constexpr (kValues) {
        if (c >= f.done + 4 && (!kWide || f.done % 2 == 0)) {  // see weights_at
          const int b = V < 4 ? f.visit / 2 : f.visit;
          const int first = f.done + (V < 4 ? 2 * (f.visit % 2) : 0);
          const ValueStream<V> values{(const char*)step.v + b * 2 * kTileChunks * kReg,
                                      f.v_at + first, f.p + weights_at(first),
                                      step.o + b * 32 * kLanes};
          interleave(Both<Scores, ValueStream<V>>{ahead, values}, weigh);
          if (++f.visit == 4) {
            f.visit = 0;
            f.done += 4;
          }
        } else {
          interleave(ahead, weigh);
        }
      } else {
        interleave(ahead, weigh);
      }
    }
    if constexpr (kSoftmax) {
      // Also where a lane sees its first key: against kNone its weight was infinite.
      if (any((weigh.sum[0] > kRaise) | (weigh.sum[1] > kRaise))) {
        f.raise(c, s, weigh.factor);
        hold();
        for (int n = 0; n < 2; ++n) {
          weigh.m[n] = f.m[n];
          weigh.sum[n] = Vec{};
        }
        interleave(Nothing{}, weigh);
      }
    }
    f.total[0] = f.total[0] + weigh.sum[0];
    f.total[1] = f.total[1] + weigh.sum[1];
    if constexpr (!kAhead) {
      if (!last) scores(steps, keys_of(c + 1), panel, stage(c + 1));
    }
  }
  f.add_values(f.count);

  for (int i = 0; i < kLanes; ++i) {
    step.l[i] += (double)f.total[i / kW][i % kW];
    if constexpr (kSoftmax) {
      const float m = f.m[i / kW][i % kW];
      step.m[i] = m == kNone && step.l[i] == 0 ? -kInf : m;  // a sum of NaN is a sum
    } else {
      step.m[i] = 0;
    }
  }
}

void forward(const ForwardStep& step) {
  constexpr bool kValues = DATTN_AMX_PIPELINE > 1;
  const int d = chunks_of(step.d_qk);
  if (step.normalizer == Normalizer::sigmoid) return forward_by<Normalizer::sigmoid, 0, 0>(step);
  if (kValues && step.d_v == 64 && d == 2) return forward_by<Normalizer::softmax, 2, 2>(step);
  if (kValues && step.d_v == 128 && d == 4) return forward_by<Normalizer::softmax, 4, 4>(step);
  if (d == 2) return forward_by<Normalizer::softmax, 2, 0>(step);
  if (d == 4) return forward_by<Normalizer::softmax, 4, 0>(step);
#ifndef DATTN_AMX_EMULATED
  if (d == 3) return forward_by<Normalizer::softmax, 3, 0>(step);
  if (d == 6) return forward_by<Normalizer::softmax, 6, 0>(step);
  if (d == 8) return forward_by<Normalizer::softmax, 8, 0>(step);
#endif
  forward_by<Normalizer::softmax, 0, 0>(step);
}

long forward_scratch(int, int) {
  return 2 * kStage + kWeightSkew + weights_at(kTileChunks) + kStage;
}

// --------------------------------------------------------------------------------------- backward

/// P and dS of a chunk from its scores and dP: rows of keys for the products with dO and Q, and
/// dS once more in pairs of keys for the product with K.
template <Normalizer N, bool Select>
struct Gradient {
  const float* s;
  const float* dp;
  const float* derivative;  // null: 1
  char* p_rows;
  char* ds_rows;
  char* ds_pairs;
  float factor;
  float shift;
  Vec lse[2];
  Vec delta[2];

  DATTN_INLINE void operator()(int slice) {
    Vec p[4];  // two keys of two vectors
    Vec ds[4];
    for (int i = 0; i < 4; ++i) {
      const int at = (4 * slice + i) * kW;
      const int n = i % 2;
      const Vec score = load(s + at);
      if constexpr (N == Normalizer::softmax) {
        p[i] = power(score * factor - lse[n]);
        ds[i] = p[i] * (load(dp + at) - delta[n]);
      } else {
        p[i] = sigmoid2(score * factor + shift);
        ds[i] = p[i] * (1.0f - p[i]) * load(dp + at);
      }
      if constexpr (Select) {
        if (derivative != nullptr) ds[i] = ds[i] * load(derivative + at);
        ds[i] = score == -kInf ? Vec{} : ds[i];  // dP of a forbidden pair may be anything
      }
    }
    for (int j = 0; j < 2; ++j) {
      const Halves p_row = narrow(p[2 * j], p[2 * j + 1]);
      const Halves ds_row = narrow(ds[2 * j], ds[2 * j + 1]);
      const Halves pairs = weave(ds[j], ds[j + 2]);
      __builtin_memcpy(p_rows + (2 * slice + j) * 64, &p_row, 64);
      __builtin_memcpy(ds_rows + (2 * slice + j) * 64, &ds_row, 64);
      __builtin_memcpy(ds_pairs + j * kReg + slice * 64, &pairs, 64);
    }
  }
};

/// A panel against a chunk, both alive.
struct Job {
  int panel;
  Piece piece;
};

// Scratch: scores and dP twice, the derivative of the cap, spare rows, P and dS of a chunk for all
// panels, dS in pairs of the whole tile for all panels.
struct BackwardScratch {
  float stage[2][2][kChunk * kLanes];
  float derivative[kChunk * kLanes];
  float spare[kChunk * kLanes];
  char p_rows[kPanels][kPairs];
  char ds_rows[kPanels][kPairs];
  char ds_pairs[kPanels][kBackwardChunks][kPairs];
};

long backward_scratch(int, int) { return sizeof(BackwardScratch); }

/// D and V are d_qk / 32 and d_v / 32, rounded up, or 0.
template <Normalizer N, int D, int V>
void backward_by(const BackwardStep& step) {
  constexpr bool kAhead = D > 0 && V > 0 && DATTN_AMX_BACKWARD_PIPELINE > 0;
  BackwardScratch& scratch = *(BackwardScratch*)step.scratch;
  const int q_steps = D > 0 ? D : chunks_of(step.d_qk);
  const int v_steps = V > 0 ? V : chunks_of(step.d_v);
  const long q_panel = 2 * q_steps * kReg;  // also bytes of a chunk of K
  const long v_panel = 2 * v_steps * kReg;
  const char* q = (const char*)step.q + kHeader;
  const char* d_o = (const char*)step.d_o + kHeader;
  const char* k = (const char*)step.k;
  const char* v = (const char*)step.v;
  float factor;
  __builtin_memcpy(&factor, step.q, sizeof factor);

  Job jobs[kBackwardChunks * kPanels];
  int job_count = 0;
  int chunk_end[kBackwardChunks];  // jobs of a chunk end here
  for (int c = 0; c < kBackwardChunks; ++c) {
    for (int panel = 0; panel < step.panels; ++panel) {
      for (int i = 0; i < step.piece_counts[panel]; ++i) {
        const Piece& piece = step.pieces[panel][i];
        const int left = piece.first + piece.count - c * kChunk;
        if (piece.first > c * kChunk || left <= 0) continue;
        jobs[job_count++] = {panel, {c * kChunk, left < kChunk ? left : kChunk, piece.masked}};
        break;
      }
    }
    chunk_end[c] = job_count;
  }

  const auto k_of = [&](const Job& job) { return k + job.piece.first / kChunk * q_panel; };
  const auto v_of = [&](const Job& job) { return v + job.piece.first / kChunk * v_panel; };
  const auto products = [&](int i) {
    const Job& job = jobs[i];
    auto& stage = scratch.stage[i & 1];
    scores(q_steps, k_of(job), q + job.panel * q_panel, stage[0]);
    scores(v_steps, v_of(job), d_o + job.panel * v_panel, stage[1]);
  };

  long chunk_at[kPanels][kBackwardChunks];  // live chunks of a panel: bytes into columns of K
  int live[kPanels] = {};
  long pairs_at[kBackwardChunks];
  for (int i = 0; i < kBackwardChunks; ++i) pairs_at[i] = i * kPairs;

  if (job_count > 0) products(0);
  for (int c = 0, i = 0; c < kBackwardChunks; ++c) {
    const int first = i;
    long rows_at[kPanels];
    long q_at[kPanels];  // of the rows of a panel
    long v_at[kPanels];
    for (; i < chunk_end[c]; ++i) {
      const Job& job = jobs[i];
      const ScoreRules& rules = step.rules[job.panel];
      auto& stage = scratch.stage[i & 1];
      const auto run_job = [&]<bool Select>() {
        Gradient<N, Select> g{};
        g.s = stage[0];
        g.dp = stage[1];
        g.derivative = Select && rules.cap != 0 ? scratch.derivative : nullptr;
        g.p_rows = scratch.p_rows[i - first];
        g.ds_rows = scratch.ds_rows[i - first];
        g.ds_pairs = scratch.ds_pairs[job.panel][live[job.panel]];
        g.factor = Select ? 1 : factor;
        g.shift = rules.shift;
        if constexpr (N == Normalizer::softmax) {
          for (int n = 0; n < 2; ++n) {
            g.lse[n] = load(step.lse + job.panel * kLanes + n * kW);
            g.delta[n] = load(step.delta + job.panel * kLanes + n * kW);
          }
        }
        if constexpr (Select) {
          finish_scores(rules, step.allowed[job.panel], job.piece, factor, stage[0],
                        scratch.derivative);
        }
        const bool last = i + 1 == job_count;
        if constexpr (kAhead && !Select) {
          if (!last) {
            const Job& next = jobs[i + 1];
            auto& ahead = scratch.stage[(i + 1) & 1];
            interleave(
                Both<ScoreStream<D>, ScoreStream<V>>{
                    {k_of(next), q + next.panel * q_panel, ahead[0]},
                    {v_of(next), d_o + next.panel * v_panel, ahead[1]}},
                g);
            return;
          }
        }
        interleave(Nothing{}, g);
        if (!last) products(i + 1);
      };
      if (plain(rules, job.piece)) {
        run_job.template operator()<false>();
      } else {
        run_job.template operator()<true>();
      }
      rows_at[i - first] = (i - first) * kPairs;
      q_at[i - first] = job.panel * q_panel;
      v_at[i - first] = job.panel * v_panel;
      chunk_at[job.panel][live[job.panel]++] = c * kReg;
    }
    const int panels = i - first;
    if (panels == 0) continue;
    const Operand p{scratch.p_rows[0], kReg, rows_at};
    const Operand ds{scratch.ds_rows[0], kReg, rows_at};
    for (int b = 0; b < v_steps; ++b) {
      const Operand rows{d_o + kPanels * v_panel + b * 2 * kReg, kReg, v_at};
      accumulate(step.dv + (c * kChunk * v_steps + b) * 32L, v_steps * 128L, p, rows, panels);
    }
    for (int b = 0; b < q_steps; ++b) {
      const Operand rows{q + kPanels * q_panel + b * 2 * kReg, kReg, q_at};
      accumulate(step.dk + (c * kChunk * q_steps + b) * 32L, q_steps * 128L, ds, rows, panels);
    }
  }

  const char* columns = k + kBackwardChunks * q_panel;
  for (int panel = 0; panel < step.panels; ++panel) {
    if (live[panel] == 0) continue;
    const Operand a{columns, kBackwardChunks * kReg, chunk_at[panel]};
    accumulate_rows(step.dq + (long)panel * step.d_qk * kLanes, step.d_qk, scratch.spare, a,
                    2 * kBackwardChunks * kReg, {scratch.ds_pairs[panel][0], kReg, pairs_at},
                    live[panel]);
  }
}

void backward(const BackwardStep& step) {
  if (step.normalizer == Normalizer::sigmoid) return backward_by<Normalizer::sigmoid, 0, 0>(step);
  const int d = chunks_of(step.d_qk);
  if (d == chunks_of(step.d_v)) {
    if (d == 2) return backward_by<Normalizer::softmax, 2, 2>(step);
    if (d == 4) return backward_by<Normalizer::softmax, 4, 4>(step);
#ifndef DATTN_AMX_EMULATED
    if (d == 3) return backward_by<Normalizer::softmax, 3, 3>(step);
#endif
  }
  backward_by<Normalizer::softmax, 0, 0>(step);
}

void add_panel(const float* panel, int d_qk, float factor, float* const* row) {
  float keep[kLanes];
  float add[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    keep[i] = 1;
    add[i] = factor;
  }
  give_rows<2>(panel, d_qk, keep, add, row);
}

// ----------------------------------------------------------------------------------------- decode
//
// Keys are read as they lie: 16 rows of K are an A tile, queries are the B tiles. What rounding a
// query to bfloat16 loses is a second query, its rest; up to kNarrow lanes have both in one tile.
// Weights become the rows of an A tile, the values its B tiles, in pairs of the keys j and j + 16.

constexpr int kDecodeLanes = kW;
constexpr int kNarrow = kW / 2;
constexpr int kHalf = kChunk / 2;

/// One step during one call; entries of lanes that there are not repeat others.
struct alignas(64) DecodeState {
  float m[kW];  // of up to kNarrow lanes: twice
  float slope[kW];
  int query[kW];
  int begin[kW];
  int end[kW];
  const float* bias[kW];
  ScoreRules rules;
  Lanes allowed;
  char* q;  // B tiles
};

/// Of a block; what grows with the rows lies in memory of the call.
struct alignas(64) DecodeScratch {
  float s[kChunk * kW];
  char p[kReg];
  char keys[2 * kReg];
  float decay[kW];
  float sum[kW];
  char* pairs;      // [d_v / 32][2] B tiles
  float* products;  // [d_v / 32][2][16 lanes][16]
};

/// Rows that are read soon.
struct Ahead {
  const char* data;
  long row;  // bytes
  long size;
  int count;
  Ahead(const Rows& rows, int first)
      : data((const char*)rows.data + 2L * first * rows.stride),
        row(2 * rows.stride),
        size(2L * rows.dim),
        count(rows.count - first < kChunk ? rows.count - first : kChunk) {}
  /// Asks for part c of every row. Into the second level: rows lie apart by powers of two, and
  /// would share few sets of the first.
  DATTN_INLINE void ask(int c) const {
    if (64L * c >= size) return;
    const char* at = data + 64L * c;
    int j = 0;
    for (; j + 8 <= count; j += 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, at += row) __builtin_prefetch(at, 0, 2);
    }
    for (; j < count; ++j, at += row) __builtin_prefetch(at, 0, 2);
  }
};

inline Vec low_halves(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}
inline Vec high_halves(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                 31);
}
inline Vec swap_halves(Vec v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Weaving within 128 bits takes one instruction; columns come out in this order and are put back
// in the sums.
inline Halves weave_quarters_low(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16,
                                 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
}
inline Halves weave_quarters_high(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47,
                                 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}
inline Vec quarters_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
}
inline Vec quarters_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30,
                                 31);
}

/// Floats [from, from + 16) of a row of `dim`, zeros beyond it.
inline Vec float_part(const float* row, int from, int dim) {
  if (dim - from >= kW) return load(row + from);
  Vec v{};
  if (from < dim) __builtin_memcpy(&v, row + from, 4 * (unsigned)(dim - from));
  return v;
}

constexpr long decode_q_size(int lanes, int d_qk) {
  return (lanes <= kNarrow ? 1 : 2) * kReg * chunks_of(d_qk);
}

/// [d_qk / 32] B tiles: lanes in columns 0..7 and their rests in columns 8..15, or two tiles each.
void pack_decode_q(const DecodeStep& step, char* to) {
  const bool narrow_lanes = step.lanes <= kNarrow;
  const int d = step.k.dim;
  for (int c = 0; c < chunks_of(d); ++c) {
    Int tiles[2][16] = {};
    for (int f = 0; f < step.lanes; ++f) {
      const float* row = step.q + (long)f * d;
      Vec part[2];
      for (int i = 0; i < 2; ++i) part[i] = float_part(row, c * kChunk + i * kW, d);
      const Halves q = narrow(part[0], part[1]);
      part[0] = part[0] - (Vec)weave_low(Halves{}, q);
      part[1] = part[1] - (Vec)weave_high(Halves{}, q);
      for (Vec& x : part) x = x == x ? x : Vec{};  // infinity has no rest
      const Halves rest = narrow(part[0], part[1]);
      tiles[0][f] = (Int)q;
      (narrow_lanes ? tiles[0][kNarrow + f] : tiles[1][f]) = (Int)rest;
    }
    for (int i = 0; i < (narrow_lanes ? 1 : 2); ++i, to += kReg) {
      transpose(tiles[i]);
      __builtin_memcpy(to, tiles[i], sizeof tiles[i]);
    }
  }
}

void begin_decode(const DecodeStep& step, DecodeState& state) {
  pack_decode_q(step, state.q);
  state.rules = step.rules;
  for (int i = 0; i < kW; ++i) {
    const int own = step.lanes <= kNarrow ? i % kNarrow : i;
    const int lane = own < step.lanes ? own : step.lanes - 1;
    state.m[i] = step.m[lane];
    if (step.rules.slope != nullptr) state.slope[i] = step.rules.slope[lane];
    if (step.rules.query != nullptr) state.query[i] = step.rules.query[lane];
    if (step.rules.bias != nullptr) state.bias[i] = step.rules.bias[lane];
    if (step.begin != nullptr) state.begin[i] = step.begin[lane];
    if (step.end != nullptr) state.end[i] = step.end[lane];
  }
  if (step.rules.slope != nullptr) state.rules.slope = state.slope;
  if (step.rules.query != nullptr) state.rules.query = state.query;
  if (step.rules.bias != nullptr) state.rules.bias = state.bias;
  state.allowed = {state.begin, state.end, step.bits};
}

/// Tiles 0 and 1 += part c of 32 keys, `row` bytes apart, times the queries.
template <bool Narrow>
DATTN_INLINE void decode_scores(const char* keys, long row, const char* q) {
  tile_load<6>(q, 64);
  if constexpr (!Narrow) tile_load<7>(q + kReg, 64);
  tile_load<4>(keys, row);
  tile_dot<0, 4, 6>();
  if constexpr (!Narrow) tile_dot<0, 4, 7>();
  tile_load<5>(keys + kHalf * row, row);
  tile_dot<1, 5, 6>();
  if constexpr (!Narrow) tile_dot<1, 5, 7>();
}

/// Part c of key j of a block.
inline Halves part_of(const Rows& rows, const Piece& block, int j, int c) {
  return row_part(j < block.count ? row_of(rows, block.first + j) : nullptr, c * kChunk, rows.dim);
}

/// The same as an A tile pair, zeros where there are no keys.
void copy_keys(const Rows& k, const Piece& block, int c, char* to) {
  for (int j = 0; j < kChunk; ++j, to += 64) {
    const Halves part = part_of(k, block, j, c);
    __builtin_memcpy(to, &part, 64);
  }
}

DATTN_INLINE void weave_pair(Halves a, Halves b, char* to) {
  const Halves low = weave_quarters_low(a, b);
  const Halves high = weave_quarters_high(a, b);
  __builtin_memcpy(to, &low, 64);
  __builtin_memcpy(to + kReg, &high, 64);
}

/// Part c of the values of a whole block, in pairs.
DATTN_INLINE void weave_values(const char* v, long row, char* to) {
  for (int j = 0; j < kHalf; ++j, v += row, to += 64) {
    Halves a;
    Halves b;
    __builtin_memcpy(&a, v, 64);
    __builtin_memcpy(&b, v + kHalf * row, 64);
    weave_pair(a, b, to);
  }
}

/// The same of any block. Where it is masked, numbers that are not finite are left out, and bits
/// of their keys are returned: a weight of 0 would not keep them out.
unsigned weave_some_values(const Rows& v, const Piece& block, int c, char* to) {
  unsigned left_out = 0;
  const auto part = [&](int j) {
    Halves x = part_of(v, block, j, c);
    if (block.masked) {
      const auto wild = (x & 0x7f80) == 0x7f80;
      if (any((Int)wild)) left_out |= 1u << j;
      x = wild ? Halves{} : x;
    }
    return x;
  };
  for (int j = 0; j < kHalf; ++j) weave_pair(part(j), part(j + kHalf), to + j * 64L);
  return left_out;
}

/// Scores [32][16] to weights: rows of p and, in place, [16] vectors of lanes of the keys
/// (0, 8), (1, 9) .. (7, 15), (16, 24) .. (23, 31) if Narrow, else [32] vectors of lanes.
template <bool Narrow>
DATTN_INLINE void decode_weights(const DecodeStep& step, DecodeState& state, const Piece& block,
                                 DecodeScratch& scratch) {
  constexpr int kVectors = Narrow ? kChunk / 2 : kChunk;
  constexpr int kKeysUp = kVectors / 2;  // from the vector of a key to that of its pair
  float* s = scratch.s;
  const bool finished = plain(step.rules, block);
  if (!finished) {
    for (int j = 0; Narrow && j < kChunk; ++j) {
      const Vec x = load(s + j * kW);
      store(s + j * kW, x + swap_halves(x));
    }
    apply_rules<1>(state.rules, block, s, nullptr);
    if (block.masked) forbid<1>(state.allowed, block, s);
    for (int j = block.count; j < kChunk; ++j) store(s + j * kW, all(-kInf));
  }
  Vec x[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    if constexpr (Narrow) {
      const float* at = s + (i + (i & 8)) * kW;
      const Vec a = load(at);
      const Vec b = load(at + 8 * kW);
      x[i] = low_halves(a, b);
      if (finished) x[i] = x[i] + high_halves(a, b);
    } else {
      x[i] = load(s + i * kW);
    }
  }

  Vec decay = all(1.0f);
  Vec sums[4] = {};
  if (step.normalizer == Normalizer::softmax) {
    Vec tops[4];
    for (Vec& top : tops) top = all(-kInf);
    for (int i = 0; i < kVectors; ++i) tops[i % 4] = max(x[i], tops[i % 4]);
    Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    if constexpr (Narrow) top = max(top, swap_halves(top));
    const Vec m = load(state.m);
    const Vec now = top > m ? top : m;
    const Vec base = now == -kInf ? Vec{} : now;
    decay = now == m ? decay : exp2(m - base);
    store(state.m, now);
    for (int i = 0; i < kVectors; ++i) {
      x[i] = exp2(x[i] - base);
      sums[i % 4] = sums[i % 4] + x[i];
    }
  } else {
    store(state.m, Vec{});
    for (int i = 0; i < kVectors; ++i) {
      x[i] = sigmoid2(x[i] + step.rules.shift);
      sums[i % 4] = sums[i % 4] + x[i];
    }
  }
  Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if constexpr (Narrow) sum = sum + swap_halves(sum);
  store(scratch.decay, decay);
  store(scratch.sum, sum);
  for (int f = 0; f < step.lanes; ++f) {
    step.l[f] = step.l[f] * (double)scratch.decay[f] + (double)scratch.sum[f];
  }
  if (block.masked) {
    for (int i = 0; i < kVectors; ++i) store(s + i * kW, x[i]);
  }

  Int rows[kKeysUp];
  for (int i = 0; i < kKeysUp; ++i) {
    if constexpr (Narrow) {
      const Halves v = narrow(x[i], x[i + kKeysUp]);
      rows[i] = (Int)__builtin_shufflevector(v, v, 0, 16, 8, 24, 1, 17, 9, 25, 2, 18, 10, 26, 3, 19,
                                             11, 27, 4, 20, 12, 28, 5, 21, 13, 29, 6, 22, 14, 30, 7,
                                             23, 15, 31);
    } else {
      rows[i] = (Int)weave(x[i], x[i + kKeysUp]);
    }
  }
  transpose(rows);
  __builtin_memcpy(scratch.p, rows, sizeof rows);
}

/// o = o * decay + products, which have their columns as weave_pair leaves them.
DATTN_INLINE void add_products(const DecodeStep& step, const DecodeScratch& scratch) {
  const int d = step.v.dim;
  for (int c = 0; c < chunks_of(d); ++c) {
    const float* from = scratch.products + c * 2L * kW * kW;
    float* to = step.o + c * kChunk;
    for (int f = 0; f < step.lanes; ++f, from += kW, to += d) {
      const Vec decay = all(scratch.decay[f]);
      const Vec a = load(from);
      const Vec b = load(from + kW * kW);
      const Vec sum[2] = {quarters_low(a, b), quarters_high(a, b)};
      if (d - c * kChunk >= kChunk) {
        store(to, load(to) * decay + sum[0]);
        store(to + kW, load(to + kW) * decay + sum[1]);
        continue;
      }
      for (int i = 0; i < 2 && c * kChunk + i * kW < d; ++i) {
        const int left = d - c * kChunk - i * kW;
        const Vec next = float_part(to + i * kW, 0, left) * decay + sum[i];
        __builtin_memcpy(to + i * kW, &next, 4 * (unsigned)(left < kW ? left : kW));
      }
    }
  }
}

/// What weave_some_values has left out.
template <bool Narrow>
void add_left_out(const DecodeStep& step, const Piece& block, const float* weights, unsigned keys) {
  const int d = step.v.dim;
  for (int j = 0; j < block.count; ++j) {
    if ((keys >> j & 1u) == 0) continue;
    const float* weight = weights + (Narrow ? ((j & 7) + (j >> 1 & 8)) * kW + (j & 8) : j * kW);
    const auto* row = (const unsigned short*)row_of(step.v, block.first + j);
    for (int f = 0; f < step.lanes; ++f) {
      for (int i = 0; i < d && weight[f] != 0; ++i) {
        if ((row[i] & 0x7f80) != 0x7f80) continue;
        const unsigned bits = (unsigned)row[i] << 16;
        float x;
        __builtin_memcpy(&x, &bits, 4);
        step.o[(long)f * d + i] += weight[f] * x;
      }
    }
  }
}

template <bool Narrow>
void decode_block(const DecodeStep& step, DecodeState& state, const Piece& block,
                  const Ahead& next_keys, const Ahead& next_values, DecodeScratch& scratch) {
  const int k_chunks = chunks_of(step.k.dim);
  const int v_chunks = chunks_of(step.v.dim);
  const bool whole_keys = block.count == kChunk && step.k.dim % kChunk == 0;
  const bool whole_values = block.count == kChunk && step.v.dim % kChunk == 0 && !block.masked;
  const auto* k = (const char*)row_of(step.k, block.first);
  const auto* v = (const char*)row_of(step.v, block.first);
  unsigned left_out = 0;
  tile_zero<0>();
  tile_zero<1>();
  // Values are woven while the tiles multiply.
  for (int c = 0; c < k_chunks || c < v_chunks; ++c) {
    next_keys.ask(c);
    if (c < k_chunks) {
      const char* q = state.q + c * (Narrow ? 1 : 2) * kReg;
      if (whole_keys) {
        decode_scores<Narrow>(k + c * 64L, 2 * step.k.stride, q);
      } else {
        copy_keys(step.k, block, c, scratch.keys);
        decode_scores<Narrow>(scratch.keys, 64, q);
      }
    }
    if (c < v_chunks) {
      char* pairs = scratch.pairs + c * kPairs;
      if (whole_values) {
        weave_values(v + c * 64L, 2 * step.v.stride, pairs);
      } else {
        left_out |= weave_some_values(step.v, block, c, pairs);
      }
    }
  }
  tile_store<0>(scratch.s, 64);
  tile_store<1>(scratch.s + kHalf * kW, 64);
  decode_weights<Narrow>(step, state, block, scratch);
  tile_load<6>(scratch.p, 64);
  for (int c = 0; c < v_chunks; ++c) {
    next_values.ask(c);
    const char* pairs = scratch.pairs + c * kPairs;
    float* products = scratch.products + c * 2L * kW * kW;
    tile_load<4>(pairs, 64);
    tile_zero<0>();
    tile_dot<0, 6, 4>();
    tile_load<5>(pairs + kReg, 64);
    tile_zero<1>();
    tile_dot<1, 6, 5>();
    if (++c < v_chunks) {
      next_values.ask(c);
      tile_load<4>(pairs + kPairs, 64);
      tile_zero<2>();
      tile_dot<2, 6, 4>();
      tile_load<5>(pairs + kPairs + kReg, 64);
      tile_zero<3>();
      tile_dot<3, 6, 5>();
    }
    tile_store<0>(products, 64);
    tile_store<1>(products + kW * kW, 64);
    if (c < v_chunks) {
      tile_store<2>(products + 2 * kW * kW, 64);
      tile_store<3>(products + 3 * kW * kW, 64);
    }
  }
  add_products(step, scratch);
  if (left_out != 0) add_left_out<Narrow>(step, block, scratch.s, left_out);
}

void decode(const DecodeStep* steps, int count) {
  long size = 64 + count * (long)sizeof(DecodeState);
  int d_v = 0;
  for (int i = 0; i < count; ++i) {
    size += decode_q_size(steps[i].lanes, steps[i].k.dim);
    d_v = steps[i].v.dim > d_v ? steps[i].v.dim : d_v;
  }
  void* memory = __builtin_malloc((unsigned long)(size + 2 * kPairs * chunks_of(d_v)));
  if (memory == nullptr) __builtin_trap();
  char* at = (char*)memory + (64 - (unsigned long)memory % 64);
  auto* states = (DecodeState*)at;
  at += count * (long)sizeof(DecodeState);
  for (int i = 0; i < count; ++i) {
    states[i].q = at;
    at += decode_q_size(steps[i].lanes, steps[i].k.dim);
  }
  DecodeScratch scratch{};
  scratch.pairs = at;
  scratch.products = (float*)(at + kPairs * chunks_of(d_v));

  const Ahead first_keys(steps[0].k, 0);
  const Ahead first_values(steps[0].v, 0);
  for (int c = 0; c < chunks_of(steps[0].k.dim); ++c) first_keys.ask(c);
  for (int c = 0; c < chunks_of(steps[0].v.dim); ++c) first_values.ask(c);
  for (int i = 0; i < count; ++i) begin_decode(steps[i], states[i]);
  for (int from = 0; from < steps[0].k.count; from += kChunk) {
    for (int i = 0; i < count; ++i) {
      const DecodeStep& step = steps[i];
      const bool wraps = i + 1 == count;
      const DecodeStep& next = steps[wraps ? 0 : i + 1];
      const Ahead next_keys(next.k, wraps ? from + kChunk : from);
      const Ahead next_values(next.v, wraps ? from + kChunk : from);
      const auto run_block = step.lanes <= kNarrow ? decode_block<true> : decode_block<false>;
      for (int t = 0; t < step.piece_count; ++t) {
        const Piece& piece = step.pieces[t];
        const int begin = piece.first > from ? piece.first : from;
        const int last = piece.first + piece.count;
        const int end = last < from + kChunk ? last : from + kChunk;
        if (begin >= end) continue;
        run_block(step, states[i], {begin, end - begin, piece.masked}, next_keys, next_values,
                  scratch);
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    for (int f = 0; f < steps[i].lanes; ++f) steps[i].m[f] = states[i].m[f];
  }
  __builtin_free(memory);
}

// ----------------------------------------------------------------------------------------- thread

#if defined(__x86_64__)
long enter() {
  configure();
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040u);  // denormals count as zero and become zero
  return (long)before;
}
void leave(long before) {
  release();
  __builtin_ia32_ldmxcsr((unsigned)before);
}
#else
long enter() { return 0; }
void leave(long) {}
#endif

}  // namespace

const Kernel& kernel() {
  static constexpr Kernel table{
      .nats = 0.69314718055994531,
      .lanes = kLanes,
      .granule = kChunk,
      .tile = kTile,
      .backward_tile = kBackwardTile,
      .backward_panels = kPanels,
      .pad = 32,
      .q_size = q_size,
      .k_size = k_size,
      .v_size = v_size,
      .forward_scratch = forward_scratch,
      .pack_q = pack_q,
      .pack_k = pack_k,
      .pack_v = pack_v,
      .forward = forward,
      .give = give_rows<2>,
      .q_backward_size = q_backward_size,
      .k_backward_size = k_backward_size,
      .v_backward_size = v_backward_size,
      .backward_scratch = backward_scratch,
      .pack_q_backward = pack_q_backward,
      .pack_k_backward = pack_k_backward,
      .pack_v_backward = pack_v_backward,
      .backward = backward,
      .add_panel = add_panel,
      .decode = decode,
      .decode_lanes = kDecodeLanes,
      .enter = enter,
      .leave = leave,
  };
  return table;
}

}  // namespace dattn::DATTN_ISA
