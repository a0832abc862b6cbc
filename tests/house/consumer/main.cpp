#include <cstdio>
#include <variant>

#include "kernels/isa.hpp"
#include "kernels/latent/product.hpp"
#include "parallel/strategies.hpp"

// Plans a causal ring over 4 ranks and prints what it moves: no MPI job, no data.
int main() {
  const dattn::Shape shape{.queries = 64, .keys = 64, .query_heads = 4, .d_qk = 8, .d_v = 8};
  const dattn::Strategy* ring = dattn::find_strategy("ring");
  const dattn::Problem problem(shape, dattn::parse_mask("causal", shape), ring->mesh(4, shape),
                               "zigzag");
  dattn::Index bytes = 0;
  for (const dattn::Program& program : dattn::make_plan(*ring, problem)) {
    for (const dattn::Step& step : program.steps) {
      if (const auto* send = std::get_if<dattn::Send>(&step)) {
        bytes += dattn::wire_bytes(program, *send, problem);
      }
    }
  }
  const float two = 2;
  float four = 0;
  const dattn::Product square{.a = &two, .a_stride = 1, .b = &two, .b_stride = 1, .c = &four,
                              .c_stride = 1, .rows = 1, .columns = 1, .inner = 1};
  dattn::multiply({&square, 1}, {});  // links BLAS
  std::printf("a ring of 4 ranks moves %lld bytes; kernels for %s\n", static_cast<long long>(bytes),
              dattn::chosen_isa().name);
  // Each key and value passes 3 ranks: 3 hops x 64 rows x (8 + 8) numbers x 4 bytes.
  return bytes == 3 * 64 * 16 * 4 && four == 4 ? 0 : 1;
}
