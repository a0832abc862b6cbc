#include "parallel/latent_down.hpp"

#include <algorithm>

#include "kernels/check.hpp"
#include "kernels/latent/operators.hpp"
#include "kernels/latent/product.hpp"
#include "parallel/latent_parts.hpp"

namespace dattn {
namespace {

/// Columns are dealt in pieces of a cache line of bfloat16 weights.
constexpr Index kPiece = 32;

std::vector<Range> parts_of(Index columns, int ranks) {
  std::vector<Range> parts;
  for (int r = 0; r < ranks; ++r) {
    const Range pieces = even_part((columns + kPiece - 1) / kPiece, ranks, r);
    parts.push_back(
        {std::min(columns, pieces.begin * kPiece), std::min(columns, pieces.end * kPiece)});
  }
  return parts;
}

/// The columns `part` of W_DQ beside W_DKV beside W_KR.
template <class W>
std::vector<W> cut(const LatentWeightsOf<W>& w, Range part) {
  const Index first = w.sizes.q_rank;  // of W_DKV
  const Range of_q = intersect(part, {0, first});
  const Range of_kv{std::max(part.begin, first) - first, std::max(part.end, first) - first};
  std::vector<W> columns(static_cast<std::size_t>(w.sizes.model * part.size()));
  auto to = columns.begin();
  for (Index row = 0; row < w.sizes.model; ++row) {
    if (!of_q.empty()) {
      to = std::copy_n(w.down_q.begin() + row * first + of_q.begin, of_q.size(), to);
    }
    to = std::copy_n(w.down_kv.begin() + row * w.sizes.row() + of_kv.begin, of_kv.size(), to);
  }
  return columns;
}

}  // namespace

template <comm::Transport T>
DownProjections<T>::DownProjections(StoredWeights& weights, AllReduce<T>& group) : group_(group) {
  std::visit(
      [&](auto& w) {
        CHECK(w.part.columns.size() == w.sizes.kv_rank, w.part.columns.begin, w.part.columns.end);
        sizes_ = w.sizes;
        q_gamma_ = w.q_gamma;
        CHECK(std::ssize(w.down_q) == sizes_.model * sizes_.q_rank, w.down_q.size());
        CHECK(std::ssize(w.down_kv) == sizes_.model * sizes_.row(), w.down_kv.size());
        parts_ = parts_of(sizes_.q_rank + sizes_.row(), group.transport().size());
        columns_ = cut(w, parts_[static_cast<std::size_t>(group.transport().rank())]);
        w.down_q = {};
      },
      weights);
}

template <comm::Transport T>
void DownProjections<T>::make(View<const float> x, const Work& work, LatentTimes& times) {
  const double start = seconds_now();
  const Index width = sizes_.q_rank + sizes_.row();
  const Range own = parts_[static_cast<std::size_t>(group_.transport().rank())];
  numbers_.resize(static_cast<std::size_t>(x.rows * width));
  const View<float> all{numbers_.data(), x.rows, 1, width};
  std::visit(
      [&](const auto& columns) {
        const Product product{.a = x.data,
                              .a_stride = x.row_stride(),
                              .b = columns.data(),
                              .b_stride = own.size(),
                              .c = all.data + own.begin,
                              .c_stride = width,
                              .rows = x.rows,
                              .columns = own.size(),
                              .inner = sizes_.model};
        multiply({&product, 1}, work);
      },
      columns_);
  times.project += seconds_now() - start;
  gather_columns(group_, all, parts_, times, "x W_DQ and x W_DKV");
  const double gathered = seconds_now();
  latents_ = {all.data + sizes_.q_rank, x.rows, 1, sizes_.row(), width};
  queries_ = x;
  if (sizes_.q_rank > 0) {
    const View<float> queries{all.data, x.rows, 1, sizes_.q_rank, width};
    rms_norm(queries, sizes_.epsilon, q_gamma_, queries);
    queries_ = queries;
  }
  times.project += seconds_now() - gathered;
}

template class DownProjections<comm::Communicator>;
template class DownProjections<comm::Loopback::Endpoint>;

}  // namespace dattn
