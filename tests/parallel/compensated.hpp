#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference.hpp"
#include "parallel/problem.hpp"

namespace dattn::testing {

/// reference_row() of a problem that may compensate, from the definition: what is dropped by asking
/// the mask for every triple, means and weights as the formula has them.
template <class T>
class Expected {
 public:
  Expected(const Problem& problem, const Score& score, View<const T> q, View<const T> k,
           View<const T> v)
      : problem_(problem), score_(score), q_(q), k_(k), v_(v) {
    if (problem.compensate() == Compensate::off) return;
    const Shape& s = problem.shape();
    owner_.resize(static_cast<std::size_t>(s.keys), 0);
    for (int r = 0; r < problem.ranks() && problem.compensate() == Compensate::rank; ++r) {
      for (const Run& run : problem.keys().positions({problem.keys().rows(r)})) {
        for (Index i = 0; i < run.count; ++i) owner_[static_cast<std::size_t>(run.at(i))] = r;
      }
    }
    for (Index kh = 0; kh < s.key_heads; ++kh) {
      std::vector<Index> dropped;
      for (Index j = 0; j < std::min(s.keys, s.first_query()); ++j) {
        bool seen = false;
        for (Index h = 0; h < s.query_heads; ++h) {
          if (s.key_head(h) != kh) continue;
          for (Index i = 0; i < s.queries; ++i) {
            seen = seen || problem.mask().allows(h, i + s.first_query(), j);
          }
        }
        if (!seen) dropped.push_back(j);
      }
      dropped_.push_back(std::move(dropped));
    }
  }

  /// How many (key head, key) are dropped.
  Index dropped() const {
    Index sum = 0;
    for (const auto& of_head : dropped_) sum += std::ssize(of_head);
    return sum;
  }

  ReferenceRow row(Index head, Index query) const {
    const Shape& s = problem_.shape();
    const ReferenceRow kept = reference_row(s, problem_.mask(), score_, q_, k_, v_, head, query);
    if (problem_.compensate() == Compensate::off) return kept;
    std::vector<double> weights;  // their logarithms
    std::vector<std::vector<double>> values;
    if (kept.lse != -std::numeric_limits<double>::infinity()) {
      weights.push_back(kept.lse);
      values.push_back(kept.o);
    }
    const auto& dropped = dropped_[static_cast<std::size_t>(s.key_head(head))];
    const int parts = problem_.compensate() == Compensate::rank ? problem_.ranks() : 1;
    for (int part = 0; part < parts; ++part) {
      double count = 0;
      double dot = 0;
      std::vector<double> value(static_cast<std::size_t>(s.d_v), 0.0);
      for (const Index j : dropped) {
        if (owner_[static_cast<std::size_t>(j)] != part) continue;
        ++count;
        // The mean of products is the product with the mean.
        for (Index x = 0; x < s.d_qk; ++x) {
          dot += static_cast<double>(q_.at(query, head)[x]) *
                 static_cast<double>(k_.at(j, s.key_head(head))[x]);
        }
        for (Index x = 0; x < s.d_v; ++x) {
          value[static_cast<std::size_t>(x)] +=
              static_cast<double>(v_.at(j, s.value_head(head))[x]);
        }
      }
      if (count == 0) continue;
      for (double& x : value) x /= count;
      weights.push_back(score_.scale * dot / count + std::log(count));
      values.push_back(std::move(value));
    }
    double top = -std::numeric_limits<double>::infinity();
    for (const double w : weights) top = std::max(top, w);
    ReferenceRow out{std::vector<double>(static_cast<std::size_t>(s.d_v), 0.0), top};
    if (weights.empty()) return out;
    double total = 0;
    for (const double w : weights) total += std::exp(w - top);
    for (std::size_t n = 0; n < weights.size(); ++n) {
      for (std::size_t x = 0; x < out.o.size(); ++x) {
        out.o[x] += std::exp(weights[n] - top) / total * values[n][x];
      }
    }
    out.lse = top + std::log(total);
    return out;
  }

 private:
  const Problem& problem_;
  Score score_;
  View<const T> q_, k_, v_;
  std::vector<int> owner_;                   ///< of each key; 0 where one mean is of all
  std::vector<std::vector<Index>> dropped_;  ///< by key head
};

}  // namespace dattn::testing
