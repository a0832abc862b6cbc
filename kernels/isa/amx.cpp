// The bfloat16 kernel for AVX-512 with AMX. With DATTN_AMX_EMULATED the same code runs anywhere,
// on tiles in memory: only amx_tiles.inc differs.
//
// A panel has 32 lanes, two columns of 16 queries. Keys go in chunks of 32: S^T = K Q^T of a chunk
// goes through a staging buffer, its weights leave as the B tiles of O^T += V^T P^T. The staging is
// double: tile instructions for the next chunk stand between the vector instructions of this one,
// since the two overlap only where they are that close in the program.

#include "kernels/isa/vector.inc"
#ifdef DATTN_AMX_EMULATED
#include "kernels/isa/amx_emulated.hpp"
#endif

namespace dattn::DATTN_ISA {
namespace {

constexpr int kLanes = 32;
constexpr int kChunk = 32;  // keys, and numbers of a row that one tile instruction consumes
constexpr int kTile = 256;
constexpr int kTileChunks = kTile / kChunk;
constexpr int kBackwardTile = 128;
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
constexpr float kSlopeRoom = 32.0f;          // and under slopes so far beyond the maximum
static_assert(kW == 16 && kTile % kChunk == 0 && kBackwardTile % kChunk == 0);

#include "kernels/isa/amx_streams.inc"

// ------------------------------------------------------------------------------ scores of a chunk

/// Whether scores of these pairs are more than the factor away from what the tiles leave.
inline bool plain(const ScoreRules& rules, const Piece& piece) {
  return absent(rules) && !piece.masked && piece.count == kChunk;
}

/// Scores in base 2 from products, in place; -inf where there is no pair.
void finish_scores(const ScoreRules& rules, const Lanes& allowed, const Piece& piece, float factor,
                   float* s, float* derivative) {
  if (absent(rules)) {
    for (int i = 0; i < piece.count * 2; ++i) store(s + i * kW, load(s + i * kW) * factor);
  } else {
    apply_rules<2>(rules, piece, factor, s, derivative);
  }
  if (piece.masked) forbid<2>(allowed, piece, s);
  for (int i = piece.count * 2; i < kChunk * 2; ++i) store(s + i * kW, all(-kInf));
}

// ---------------------------------------------------------------------------------------- forward

/// What turns the scores of a chunk into weights, sums of them and B tiles.
template <Normalizer N>
struct Weigh {
  const float* s;
  char* p;
  float factor;
  float shift;
  Vec m[2];
  Vec sum[2];

  DATTN_INLINE void operator()(int slice) {
    for (int n = 0; n < 2; ++n) {
      const float* at = s + (4 * slice + n) * kW;
      const Vec low = weight(load(at), n);
      const Vec high = weight(load(at + kLanes), n);
      sum[n] = sum[n] + low;
      sum[n] = sum[n] + high;
      const Halves pairs = weave(low, high);
      __builtin_memcpy(p + n * kReg + slice * 64, &pairs, 64);
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
  char* p;
  float* spare;
  Piece chunks[kTileChunks];
  long v_at[kTileChunks];  // of the values of a chunk within v
  int count = 0;
  int done = 0;  // chunks whose products with V are in o
  bool empty;    // nothing is in o
  Vec m[2];
  Vec total[2] = {};

  explicit Forward(const ForwardStep& s)
      : step(s),
        p((char*)s.scratch + 2 * kStage),
        spare((float*)((char*)s.scratch + 2 * kStage + kTileChunks * kPairs)),
        empty(s.first) {
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
    for (int i = 0; i < end; ++i) p_at[i] = i * kPairs;
    if (done < end) {
      const Operand a{(const char*)step.v, kTileChunks * kReg, v_at + done};
      const Operand b{p, kReg, p_at + done};
      const auto add = empty ? accumulate_rows<true> : accumulate_rows<false>;
      add(step.o, step.d_v, spare, a, 2 * kTileChunks * kReg, b, end - done);
      empty = false;
    }
    done = end;
  }

  /// Raises m to the maxima of chunk c (scores s * factor): what is in o, l and total shrinks.
  /// Under slopes (ALiBi) scores grow from chunk to chunk, as queries come nearer, so m is raised
  /// further: weights are as exact far below 1.
  void raise(int c, const float* s, float factor) {
    const float room = step.rules.slope != nullptr ? kSlopeRoom : 0;
    add_values(c);
    Vec scale[2];
    for (int n = 0; n < 2; ++n) {
      Vec top = all(-kInf);
      for (int j = 0; j < kChunk; ++j) top = max(top, load(s + (2 * j + n) * kW) * factor);
      const Vec next = top > m[n] ? top + room : m[n];
      scale[n] = exp2(m[n] - next);
      m[n] = next;
      total[n] = total[n] * scale[n];
      for (int i = 0; i < kW; ++i) step.l[n * kW + i] *= (double)scale[n][i];
    }
    for (int i = 0; !empty && i < 2 * step.d_v; ++i) {
      store(step.o + i * kW, load(step.o + i * kW) * scale[i % 2]);
    }
  }
};

/// D is d_qk / 32, rounded up, or 0: any, and phases one after the other. Lying: keys are no pack.
template <Normalizer N, int D, bool Lying = false>
void forward_by(const ForwardStep& step) {
  constexpr bool kSoftmax = N == Normalizer::softmax;
  constexpr bool kAhead = D > 0;
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
  const auto keys_of = [&](int c) -> ChunkKeys<Lying> {
    const long first = f.chunks[c].first;
    if constexpr (Lying) return {keys + first * step.k_row, step.k_row};
    return {keys + first / kChunk * chunk_size};
  };
  const auto stage = [&](int c) { return (float*)((char*)step.scratch + (c & 1) * kStage); };
  if (f.count > 0) scores<Lying>(steps, keys_of(0), panel, stage(0));
  for (int c = 0; c < f.count; ++c) {
    float* s = stage(c);
    Weigh<N> weigh{};
    weigh.s = s;
    weigh.p = f.p + c * kPairs;
    weigh.factor = factor;
    weigh.shift = step.rules.shift;
    if (!plain(step.rules, f.chunks[c])) {
      finish_scores(step.rules, step.allowed, f.chunks[c], factor, s, nullptr);
      weigh.factor = 1;
    }
    if constexpr (kSoftmax) {
      if (c == 0 && any((f.m[0] == kNone) | (f.m[1] == kNone))) f.raise(c, s, weigh.factor);
      weigh.m[0] = f.m[0];
      weigh.m[1] = f.m[1];
    }
    const bool last = c + 1 == f.count;
    if constexpr (!kAhead) {
      interleave(Nothing{}, weigh);
    } else if (last) {
      interleave(Nothing{}, weigh);
    } else {
      interleave(ScoreStream<D, Lying>{keys_of(c + 1), panel, stage(c + 1)}, weigh);
    }
    if constexpr (kSoftmax) {
      // Also where a lane sees its first key: against kNone its weight was infinite.
      if (any((weigh.sum[0] > kRaise) | (weigh.sum[1] > kRaise))) {
        f.raise(c, s, weigh.factor);
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
      if (!last) scores<Lying>(steps, keys_of(c + 1), panel, stage(c + 1));
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
  const int d = chunks_of(step.d_qk);
  if (step.k_row != 0) {
    if (step.normalizer == Normalizer::sigmoid) {
      return forward_by<Normalizer::sigmoid, 0, true>(step);
    }
    if (d == 4) return forward_by<Normalizer::softmax, 4, true>(step);
#ifndef DATTN_AMX_EMULATED
    if (d == 10) return forward_by<Normalizer::softmax, 10, true>(step);  // latents: 256 and 64
    if (d == 18) return forward_by<Normalizer::softmax, 18, true>(step);  // 512 and 64
#endif
    return forward_by<Normalizer::softmax, 0, true>(step);
  }
  if (step.normalizer == Normalizer::sigmoid) return forward_by<Normalizer::sigmoid, 0>(step);
  if (d == 2) return forward_by<Normalizer::softmax, 2>(step);
  if (d == 4) return forward_by<Normalizer::softmax, 4>(step);
#ifndef DATTN_AMX_EMULATED
  if (d == 3) return forward_by<Normalizer::softmax, 3>(step);
  if (d == 6) return forward_by<Normalizer::softmax, 6>(step);
  if (d == 8) return forward_by<Normalizer::softmax, 8>(step);
#endif
  forward_by<Normalizer::softmax, 0>(step);
}

long forward_scratch(int, int) { return 2 * kStage + kTileChunks * kPairs + kStage; }

#include "kernels/isa/amx_backward.inc"
#include "kernels/isa/amx_decode.inc"

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
      .parts = 1,
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
      .lying_keys = kChunk,
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
