#pragma once

// Included by translation units that are compiled for one instruction set each: no library header
// and nothing inline, or the linker could keep a copy that this machine cannot run.
//
// What one thread does with a *panel* of query lanes and a *tile* of keys. A lane is one query row
// of one head; the query heads of a group (GQA, MQA) lie side by side in the lanes of a panel and
// read one pack of K and V. Everything is computed transposed, S^T = K Q^T, with queries in the
// vector lanes: maxima and sums of the softmax need no horizontal step, and the products of forward
// and backward read what the ones before them left, as it lies.
//
// Scores, maxima and LSEs in here are in the kernel's own unit, of Kernel::nats natural ones.

namespace dattn {

enum class Element : int { f4, bf16 };

/// Rows of one head as the caller holds them.
struct Rows {
  const void* data;
  long stride;  ///< numbers from row to row
  int count;
  int dim;
  Element element;
};

/// Keys [first, first + count) of a tile; `first` is a multiple of the kernel's granule.
struct Piece {
  int first;
  int count;
  bool masked;  ///< not all of its pairs are allowed: see Lanes
  /// Bit i: some lane of part i of the panel (Kernel::parts) sees some of the keys. What a kernel
  /// leaves out.
  static constexpr unsigned kAll = ~0u;
  unsigned live = kAll;
};

/// What a score is besides scale * q.k, for the lanes of a panel; absent parts are null or 0. In
/// order: soft cap, then ALiBi, the table by distance and the weight of the key are added.
struct ScoreRules {
  float cap;           ///< scores become cap * tanh(s); q is packed with 1 / cap. 0: no cap
  const float* slope;  ///< [lanes] ALiBi: - slope * abs(position of the key - of the query)
  const float* const*
      bias;  ///< [lanes] added: bias[lane][clamp(key - query, -reach, reach) + reach]
  int reach;
  const int* query;         ///< [lanes] positions, relative to any base; with slope or bias
  const int* key;           ///< [tile] positions, relative to the same base; with slope or bias
  const float* key_weight;  ///< [tile] log-weights of the keys
  float shift;              ///< added to every score of sigmoid attention; softmax does not read it
};

/// Which pairs of a tile are allowed where a piece is masked: intervals, or bits where some lane
/// sees more than one interval of the tile.
struct Lanes {
  const int* begin;  ///< [lanes] allowed keys of a lane are [begin, end), counted from the tile's
  const int* end;    ///< first key
  const unsigned* bits;  ///< [tile] bit `lane` of each key; null: the intervals hold
};

/// Softmax: weights exp(score - m), out the state (m, l, o). Sigmoid: weights 1 / (1 +
/// exp(-score)), out m = 0, l = sum of the weights.
enum class Normalizer : int { softmax, sigmoid };

/// One panel against live pieces of one tile: one step of the online softmax.
struct ForwardStep {
  const void* q;  ///< a packed panel
  const void* k;  ///< a packed tile of keys; or, with k_row, rows as they lie
  const void* v;  ///< a packed tile of values
  int d_qk;
  int d_v;
  const Piece* pieces;
  int piece_count;
  Lanes allowed;
  ScoreRules rules;
  Normalizer normalizer;
  void* scratch;  ///< Kernel::forward_scratch bytes, 64-byte aligned
  float* m;       ///< [lanes] running maximum, or any number near it; -inf before the first key
  double* l;      ///< [lanes] running sum of exp(score - m)
  float* o;       ///< [d_v][lanes] running sum of exp(score - m) * v
  bool first;     ///< o holds nothing yet, not even zeros
  /// Bytes from row to row of k where it is no pack, and the tile is a multiple of granule; see
  /// Kernel::lying_keys. 0: a pack.
  long k_row = 0;
};

/// A tile of queries (`panels` panels) against live pieces of one tile of keys.
struct BackwardStep {
  const void* q;    ///< packed queries (pack_q_backward)
  const void* d_o;  ///< packed dO, likewise
  const void* k;    ///< a packed tile (pack_k_backward)
  const void* v;    ///< a packed tile (pack_v_backward)
  int d_qk;
  int d_v;
  int panels;
  const Piece* const* pieces;  ///< [panels] lists
  const int* piece_counts;     ///< [panels]
  const Lanes* allowed;        ///< [panels]
  const ScoreRules* rules;     ///< [panels]
  Normalizer normalizer;
  void* scratch;       ///< Kernel::backward_scratch bytes, 64-byte aligned
  const float* lse;    ///< [panels * lanes]; +inf: the lane sees nothing. Sigmoid: not read
  const float* delta;  ///< [panels * lanes] sum of dO * O. Sigmoid: not read
  float* dq;           ///< [panels][d_qk][lanes] += dS K, without the scale
  float* dk;           ///< [tile][padded d_qk] += dS^T Q, without the scale
  float* dv;           ///< [tile][padded d_v] += P^T dO
};

/// A few queries of one group against keys as they lie in memory.
struct DecodeStep {
  const float* q;  ///< [lanes][d_qk], scale included, in the kernel's unit (or 1 / cap)
  int lanes;       ///< 1 .. Kernel::decode_lanes
  Rows k;          ///< any number of keys
  Rows v;
  int following;   ///< rows behind them in memory that the next call reads: worth asking for
  const Piece* pieces;  ///< `first` is any key here
  int piece_count;
  const int* begin;  ///< [lanes] as in Lanes, counted from the first key of k
  const int* end;
  const unsigned* bits;  ///< [k.count] or null
  ScoreRules rules;      ///< `lanes` entries; keys counted from the first of k
  Normalizer normalizer;
  float* m;  ///< [lanes] as in ForwardStep
  double* l;
  float* o;  ///< [lanes][d_v]
};

/// c = a b, or c += a b, of few rows of a float a and a bfloat16 b, which is read once, as it lies;
/// inner is at least 1.
struct NarrowProduct {
  const float* a;  ///< [rows][inner]
  long a_stride;   ///< numbers from row to row, as all strides
  const void* b;   ///< [inner][columns]; transposed: [columns][inner]
  long b_stride;
  bool transposed;
  float* c;  ///< [rows][columns]
  long c_stride;
  int rows;
  int columns;
  int inner;
  bool add;
};

/// The functions of one instruction set for one way to hold numbers. Packs and scratch are bytes
/// that only the kernel understands, 64-byte aligned; sizes are in bytes.
struct Kernel {
  double nats;          ///< of a score of 1 in here: 1, or ln 2 where powers of 2 are what is cheap
  int lanes;            ///< queries of a panel
  int parts;            ///< of a panel, of as many lanes each, that pieces tell apart: 1 or 2
  int granule;          ///< live pieces begin at multiples of it
  int tile;             ///< keys of a tile in forward, at most; a multiple of granule
  int backward_tile;    ///< the same in backward
  int backward_panels;  ///< panels of a tile of queries in backward, at most
  int pad;              ///< gradients of K and V are held in rows of a multiple of this many floats

  long (*q_size)(int d_qk);
  long (*k_size)(int d_qk);
  long (*v_size)(int d_v);
  long (*forward_scratch)(int d_qk, int d_v);
  /// A panel from single rows: row[lane] points to d_qk numbers, null: zeros.
  void (*pack_q)(const void* const* row, Element element, int d_qk, float factor, void* to);
  void (*pack_k)(const Rows& k, void* to);  ///< 1 .. tile rows
  void (*pack_v)(const Rows& v, void* to);
  void (*forward)(const ForwardStep& step);
  /// Where forward can read keys as they lie, which saves the pack where few panels meet it: their
  /// d_qk must be a multiple of this many numbers. 0: it cannot.
  int lying_keys = 0;
  /// row[lane][0 .. d_v) = row * keep[lane] + o[d_v][lane] * add[lane]; null rows are passed over.
  void (*give)(const float* o, int d_v, const float* keep, const float* add, float* const* row);

  long (*q_backward_size)(int dim);  ///< of a tile of backward_panels panels; for Q and for dO
  long (*k_backward_size)(int d_qk);
  long (*v_backward_size)(int d_v);
  long (*backward_scratch)(int d_qk, int d_v);
  /// A tile of queries: row[panels * lanes]. `factor` enters the scores only, not the products that
  /// make gradients of K or V.
  void (*pack_q_backward)(const void* const* row, int panels, Element element, int dim,
                          float factor, void* to);
  void (*pack_k_backward)(const Rows& k, void* to);  ///< 1 .. backward_tile rows
  void (*pack_v_backward)(const Rows& v, void* to);
  void (*backward)(const BackwardStep& step);
  /// row[lane][0 .. d_qk) += factor * panel[d_qk][lane]: a panel of dq; null rows are passed over.
  void (*add_panel)(const float* panel, int d_qk, float factor, float* const* row);

  /// Steps over the same number of keys; they take turns, so that heads which lie side by side in
  /// memory are read side by side.
  void (*decode)(const DecodeStep* steps, int count);
  int decode_lanes;  ///< of a DecodeStep, at most

  /// In the float kernel of an Isa only.
  void (*multiply_narrow)(const NarrowProduct& product) = nullptr;

  /// Prepares the calling thread (denormals count as zero, tile registers); `leave` gets what it
  /// returned and puts everything back. Every call of the other functions stands between the two.
  long (*enter)();
  void (*leave)(long before);
};

/// The functions of one instruction set, by what Q, K, V and dO are held as. Sums are float always.
struct Isa {
  const char* name;
  const Kernel* f4;
  const Kernel* bf16;
};

namespace portable {
const Kernel& kernel();
}
namespace avx2 {
const Kernel& kernel();
}
namespace avx512 {
const Kernel& kernel();
}
namespace amx {
const Kernel& kernel();  ///< bf16 only
}

}  // namespace dattn
