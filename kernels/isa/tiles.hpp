#pragma once

// Included by translation units that are compiled for one instruction set each: no library header
// and nothing inline, or the linker could keep a copy that this machine cannot run.

namespace dattn {

/// Query rows of a tile: the vector lanes of every array below.
constexpr int kTileQueries = 64;
/// Keys of a tile, at most.
constexpr int kTileKeys = 96;

/// One step of the online softmax: a tile of queries of one head against a tile of keys.
struct TileStep {
  const float* q;     ///< [d_qk][64]: queries, transposed, scale included
  const float* k;     ///< `keys` rows of d_qk numbers, k_stride apart
  const float* v;     ///< `keys` rows of d_v numbers, v_stride apart
  const float* bias;  ///< [keys][64]: 0 where allowed; -inf where not, whatever k holds; null: all
  long k_stride;
  long v_stride;
  int keys;  ///< 1 .. kTileKeys
  int d_qk;
  int d_v;
  float* p;   ///< [kTileKeys][64] scratch
  float* m;   ///< [64] running maximum, in and out
  double* l;  ///< [64] running sum of exp(score - m), in and out
  float* o;   ///< [d_v][64] running sum of exp(score - m) * v, in and out
};

/// The functions of one instruction set.
struct Tiles {
  const char* name;
  void (*step)(const TileStep& s);
};

namespace portable {
const Tiles& tiles();
}
namespace avx2 {
const Tiles& tiles();
}
namespace avx512 {
const Tiles& tiles();
}

}  // namespace dattn
