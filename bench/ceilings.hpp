#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

/// What the machine can do, measured on the spot: the anchors that benches divide by. Each call
/// runs some milliseconds on `threads` threads at once and returns their summed rate.
namespace dattn {

/// Numbers nobody has written yet, so that the threads that will use them touch them first.
template <class T>
class Uninitialized {
 public:
  explicit Uninitialized(std::size_t count);

  T* data() { return numbers_.get(); }
  const T* data() const { return numbers_.get(); }
  std::size_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* numbers) const;
  };
  std::size_t count_;
  std::unique_ptr<T, Free> numbers_;
};

/// OpenBLAS, found when the program runs: 768^3 products in float, one at a time per thread.
///
/// OpenBLAS picks its kernels when it is loaded and takes some AVX-512 machines for AVX2 ones, so
/// this sets OPENBLAS_CORETYPE (where the user did not) before it loads the library.
class Sgemm {
 public:
  /// Nothing where the library is missing. @pre no threads run yet: the environment changes
  static std::optional<Sgemm> load();

  /// The kernels that OpenBLAS chose, e.g. SkylakeX.
  const std::string& core() const { return core_; }
  double gflops(int threads) const;

 private:
  using Function = void (*)(int, int, int, int, int, int, float, const float*, int, const float*,
                            int, float, float*, int);
  Sgemm(Function function, std::string core) : function_(function), core_(std::move(core)) {}

  Function function_;
  std::string core_;
};

/// bfloat16 tile products with all operands in AMX registers.
namespace amx_registers {
/// Whether processor and system give AMX to this process; asks for it. @pre no threads run yet
bool present();
/// @pre present()
double gflops(int threads);
}  // namespace amx_registers

/// bfloat16 products in pairs (AVX-512 BF16) with all operands in registers.
namespace pair_registers {
bool present();
/// @pre present()
double gflops(int threads);
}  // namespace pair_registers

/// Bytes that certainly do not fit into the caches.
std::size_t beyond_caches();

/// Reads a buffer larger than the caches, each thread its own part.
class MemoryRead {
 public:
  /// Allocates `bytes`, and keeps the fastest of a few ways to read (streams, prefetch distance).
  explicit MemoryRead(int threads) : MemoryRead(threads, beyond_caches()) {}
  MemoryRead(int threads, std::size_t bytes);

  double gbps() const;
  std::string way() const;  ///< the one it keeps

 private:
  int threads_;
  std::size_t part_;  ///< bytes of one thread
  Uninitialized<std::byte> buffer_;
  int streams_ = 1;
  int ahead_ = 0;  ///< bytes
  mutable float sink_ = 0;

  double seconds(int streams, int ahead) const;
};

}  // namespace dattn
