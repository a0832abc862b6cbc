#include "kernels/latent/attention.hpp"

#include "kernels/check.hpp"
#include "kernels/mask.hpp"

namespace dattn {

Work scaled(Work work, const LatentSizes& sizes) {
  work.score.scale = sizes.scale();
  return work;
}

template <class T>
void attend_latent(View<const T> q, View<const T> rows, View<float> out, const Where& where,
                   const Mask& mask, const Work& work) {
  attend(q, rows, latent_values(rows, where.shape.d_v), out, where, mask, work);
}

template <class T>
void decode_latent(const LatentSizes& sizes, View<const T> q,
                   std::span<const LatentSequence<T>> batch, View<float> out, const Work& work) {
  CHECK(q.heads == sizes.heads && out.heads == q.heads, q.heads, out.heads, sizes.heads);
  CHECK(out.rows == q.rows, out.rows, q.rows);
  Workspace own;  // sequences follow one another
  Work each = scaled(work, sizes);
  if (each.workspace == nullptr) each.workspace = &own;
  const Index latent = q.dim - sizes.d_rope;
  Index row = 0;
  for (const auto& [rows, queries] : batch) {
    CHECK(queries >= 0 && queries <= rows.rows, queries, rows.rows);
    CHECK(row + queries <= q.rows, row, queries, q.rows);
    const Shape shape = absorbed_shape(sizes, queries, rows.rows, latent);
    const Where where{shape,
                      {0, sizes.heads},
                      {0, 1},
                      {0, 1},
                      {{shape.first_query(), queries, 1}},
                      {{0, rows.rows, 1}}};
    const MaskPtr mask = parse_mask("causal", shape);
    attend_latent<T>({q.at(row, 0), queries, q.heads, q.dim, q.row_stride()}, rows,
                     {out.at(row, 0), queries, out.heads, out.dim, out.row_stride()}, where, *mask,
                     each);
    row += queries;
  }
  CHECK(row == q.rows, row, q.rows);
}

#define DATTN_ATTENTION(T)                                                             \
  template void attend_latent(View<const T>, View<const T>, View<float>, const Where&, \
                              const Mask&, const Work&);                               \
  template void decode_latent(const LatentSizes&, View<const T>,                       \
                              std::span<const LatentSequence<T>>, View<float>, const Work&);
DATTN_ATTENTION(float)
DATTN_ATTENTION(BFloat16)
#undef DATTN_ATTENTION

}  // namespace dattn
