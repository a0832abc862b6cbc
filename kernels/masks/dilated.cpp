#include "kernels/masks/dilated.hpp"

#include <stdexcept>

namespace dattn {
namespace {

constexpr std::string_view kForm = "dilated:L,R,T";

/// The dilated window of Longformer (Beltagy et al. 2020, arXiv 2004.05150).
class Dilated final : public Mask {
 public:
  Dilated(Index left, Index right, Index step) : left_(left), right_(right), step_(step) {}

  bool allows(Index, Index query, Index key) const override {
    const Index apart = key - query;
    return apart % step_ == 0 && -left_ * step_ <= apart && apart <= right_ * step_;
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const Range seen = intersect(keys, {query - left_ * step_, query + right_ * step_ + 1});
    if (seen.empty()) return;
    if (step_ == 1) {
      out.push_back(seen);
      return;
    }
    const Index rest = (query - seen.begin) % step_;
    for (Index k = seen.begin + (rest < 0 ? rest + step_ : rest); k < seen.end; k += step_) {
      out.push_back({k, k + 1});
    }
  }
  void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const override {
    if (keys.step % step_ != 0) return Mask::members(head, query, keys, out);
    if ((keys.first - query) % step_ != 0) return;
    const Range seen = keys.inside({query - left_ * step_, query + right_ * step_ + 1});
    if (!seen.empty()) out.push_back(seen);
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty()) return Cover::None;
    // How far key and query are apart takes every value between these two.
    const Range apart{keys.begin - (queries.end - 1), keys.end - queries.begin};
    const Range seen = intersect(apart, {-left_ * step_, right_ * step_ + 1});
    const Index first = floor_to_step(seen.begin + step_ - 1);
    if (seen.empty() || first >= seen.end) return Cover::None;
    const bool all = seen == apart && (step_ == 1 || apart.size() == 1);
    return all && allows(head, queries.begin, keys.begin) ? Cover::All : Cover::Some;
  }
  Index step(Index) const override { return step_; }
  std::string spec() const override {
    return "dilated:" + std::to_string(left_) + "," + std::to_string(right_) + "," +
           std::to_string(step_);
  }

 private:
  Index floor_to_step(Index x) const {
    const Index rest = x % step_;
    return x - (rest < 0 ? rest + step_ : rest);
  }

  Index left_;
  Index right_;
  Index step_;
};

}  // namespace

MaskKind dilated_kind() {
  return {"dilated", kForm, "query i sees keys i-L*T, ..., i-T, i, i+T, ..., i+R*T",
          "two counts and a step of at least 1",
          [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            const std::vector<Index> counts = parse_counts(arguments, kForm);
            constexpr Index kMost = Index{1} << 30;  // products stay far from overflow
            if (counts.size() != 3 || counts[2] < 1 ||
                std::max({counts[0], counts[1], counts[2]}) > kMost) {
              throw std::invalid_argument(
                  "a dilated window has two sides and a step from 1, all below 2^30: "
                  "dilated:L,R,T");
            }
            return std::make_shared<Dilated>(counts[0], counts[1], counts[2]);
          }};
}

}  // namespace dattn
