#pragma once

#include <memory>
#include <string>

#include "kernels/attend.hpp"

namespace dattn {

/// One piece of attention work, as a bench names it.
struct Cell {
  std::string kernel = "forward";  ///< forward, backward, decode
  std::string dtype = "f32";       ///< f32, bf16
  std::string mask = "full";
  Index d = 64;
  Index dv = 64;
  Index heads = 8;
  Index kv_heads = 8;
  Index tokens = 4096;  ///< keys
  Index queries = 4096;
  int threads = 1;
  double soft_cap = 0;
  bool alibi = false;
  bool poll = false;  ///< measure the time between polls
  /// From Q, K, V (and O, LSE, dO) to the finished O or gradients, as other libraries count; else
  /// the kernel alone.
  bool whole = false;
  const Isa* isa = nullptr;

  Shape shape() const { return {queries, tokens, heads, kv_heads, kv_heads, d, dv}; }
  bool decode() const { return kernel == "decode"; }
};

/// A Cell with its tensors in place.
class Subject {
 public:
  virtual ~Subject() = default;

  /// Reads or writes a tensor ("q", "k", "v", "do"; "o", "dq", "dk", "dv") as raw numbers in the
  /// order [rows, heads, dim], O and the gradients in float. Throws std::runtime_error.
  virtual void load(const std::string& tensor, const std::string& file) = 0;
  virtual void dump(const std::string& tensor, const std::string& file) const = 0;

  /// Computes what the timed part takes as given. Call it once, after load().
  virtual void prepare() = 0;

  /// Works once; seconds of the timed part.
  virtual double run() = 0;

  /// Allowed (head, query, key) triples.
  virtual double area() const = 0;
  /// Floating-point operations of run(); of decode the bytes of K and V that it must read.
  virtual double work() const = 0;
  /// The longest time between two polls of the last run, in seconds.
  virtual double poll_gap() const = 0;
};

/// Throws std::invalid_argument if nobody can compute the cell.
std::unique_ptr<Subject> make_subject(const Cell& cell);

}  // namespace dattn
