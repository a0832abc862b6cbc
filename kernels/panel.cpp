#include "kernels/panel.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/check.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

Index position_of(const Runs& runs, Index row) { return part(runs, {row, row + 1}).front().first; }

int near(Index position, Index base) {
  constexpr Index kFar = 1 << 30;  // so that differences fit in an int
  return static_cast<int>(std::clamp(position - base, -kFar, kFar));
}

}  // namespace

BlockRules::BlockRules(const Score& score, const Where& where, const Kernel& kernel)
    : score_(score),
      where_(where),
      unit_(1 / kernel.nats),
      factor_(static_cast<float>(score.scale * (score.soft_cap > 0 ? 1 / score.soft_cap : unit_))),
      bias_(score.bias) {
  for (float& x : bias_) x *= static_cast<float>(unit_);
}

PanelRules::PanelRules(const BlockRules& block, int lanes, int tile) : block_(block) {
  const auto n = static_cast<std::size_t>(lanes);
  const auto m = static_cast<std::size_t>(tile);
  const Score& score = block.score_;
  if (!score.alibi.empty()) slope_.resize(n);
  if (!score.bias.empty()) bias_.resize(n);
  if (!slope_.empty() || !bias_.empty()) {
    query_.resize(n);
    key_.resize(m);
  }
  if (block.where_.key_weights.data != nullptr) weight_.resize(m);
}

void PanelRules::lanes(std::span<const Index> row_of_lane, std::span<const Index> head_of_lane) {
  if (query_.empty()) return;
  const Score& score = block_.score_;
  const Index width = 2 * score.reach + 1;
  base_ = position_of(block_.where_.queries, std::max<Index>(row_of_lane.front(), 0));
  for (std::size_t i = 0; i < query_.size(); ++i) {
    const bool used = i < row_of_lane.size() && row_of_lane[i] >= 0;
    const Index head = block_.where_.query_heads.begin + (used ? head_of_lane[i] : 0);
    query_[i] = used ? near(position_of(block_.where_.queries, row_of_lane[i]), base_) : 0;
    if (!slope_.empty())
      slope_[i] = static_cast<float>(block_.unit_) * score.alibi[static_cast<std::size_t>(head)];
    if (!bias_.empty()) bias_[i] = block_.bias_.data() + head * width;
  }
}

void PanelRules::keys(Range tile, Index key_head) {
  if (!key_.empty()) {
    std::size_t to = 0;
    for (const Run& run : part(block_.where_.keys, tile)) {
      for (Index i = 0; i < run.count; ++i) key_[to++] = near(run.at(i), base_);
    }
  }
  if (!weight_.empty()) {
    for (Index i = 0; i < tile.size(); ++i) {
      weight_[static_cast<std::size_t>(i)] =
          static_cast<float>(block_.unit_) *
          *block_.where_.key_weights.at(tile.begin + i, key_head);
    }
  }
}

ScoreRules PanelRules::rules() const {
  const Score& score = block_.score_;
  return {.cap = static_cast<float>(score.soft_cap * block_.unit_),
          .slope = slope_.empty() ? nullptr : slope_.data(),
          .bias = bias_.empty() ? nullptr : bias_.data(),
          .reach = static_cast<int>(score.reach),
          .query = query_.empty() ? nullptr : query_.data(),
          .key = key_.empty() ? nullptr : key_.data(),
          .key_weight = weight_.empty() ? nullptr : weight_.data(),
          .shift = static_cast<float>(score.shift * block_.unit_)};
}

namespace {

void check_score(const Score& score, const Where& where) {
  const auto heads = static_cast<std::size_t>(where.shape.query_heads);
  CHECK(score.soft_cap >= 0 && std::isfinite(score.soft_cap), score.soft_cap);
  CHECK(score.alibi.empty() || score.alibi.size() == heads, score.alibi.size(), heads);
  CHECK(score.reach >= 0 && score.reach < (Index{1} << 30), score.reach);
  CHECK(score.bias.empty() ||
            score.bias.size() == heads * static_cast<std::size_t>(2 * score.reach + 1),
        score.bias.size(), heads, score.reach);
  const View<const float>& weights = where.key_weights;
  CHECK(weights.data == nullptr || (weights.rows == size(where.keys) && weights.dim == 1 &&
                                    weights.heads == where.key_heads.size()),
        weights.rows, weights.heads, weights.dim);
}

}  // namespace

MergeWeights merge_head(double m, double l, float* record, Index d_v) {
  if (l == 0) return {1, 0};  // no key; a row of NaN scores has m = -inf too, but l = NaN
  if (record[1] == 0) std::fill_n(record + 2, d_v, 0.0F);  // it may be anything, NaN too
  const float top = std::max(static_cast<float>(m), record[0]);
  // Nearly always what rounding m took away: two terms of the series are exact then.
  const double away = m - static_cast<double>(top);
  const double here = std::abs(away) < 1e-3 ? 1 + away * (1 + away / 2) : std::exp(away);
  const double there =
      record[1] == 0 ? 0.0 : std::exp(static_cast<double>(record[0]) - static_cast<double>(top));
  record[0] = top;
  record[1] = static_cast<float>(l * here + static_cast<double>(record[1]) * there);
  return {static_cast<float>(there), static_cast<float>(here)};
}

template <class T>
void check_attend(View<const T> q, View<const T> k, View<const T> v, const Where& where,
                  const Work& work) {
  const Shape& shape = where.shape;
  CHECK(q.rows == size(where.queries), q.rows);
  CHECK(k.rows == size(where.keys) && v.rows == k.rows, k.rows, v.rows);
  CHECK(q.heads == where.query_heads.size(), q.heads);
  CHECK(k.heads == where.key_heads.size() && v.heads == where.value_heads.size(), k.heads, v.heads);
  CHECK(q.dim == shape.d_qk && k.dim == shape.d_qk && v.dim == shape.d_v, q.dim, k.dim, v.dim);
  CHECK(where.key_heads.contains(shape.key_heads_of(where.query_heads)), q.heads);
  CHECK(where.value_heads.contains(shape.value_heads_of(where.query_heads)), q.heads);
  CHECK(work.threads >= 1, work.threads);
  check_score(work.score, where);
}

template void check_attend(View<const float>, View<const float>, View<const float>, const Where&,
                           const Work&);
template void check_attend(View<const BFloat16>, View<const BFloat16>, View<const BFloat16>,
                           const Where&, const Work&);
template void check_attend(View<const double>, View<const double>, View<const double>, const Where&,
                           const Work&);

}  // namespace dattn
