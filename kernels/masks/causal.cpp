#include "kernels/masks/causal.hpp"

#include <stdexcept>

namespace dattn {
namespace {

class Causal final : public Mask {
 public:
  bool allows(Index, Index query, Index key) const override { return key <= query; }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const Range seen{keys.begin, std::min(keys.end, query + 1)};
    if (!seen.empty()) out.push_back(seen);
  }
  Cover cover(Index, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty() || keys.begin >= queries.end) return Cover::None;
    return keys.end - 1 <= queries.begin ? Cover::All : Cover::Some;
  }
  Index alike(Index, Index query, Range keys) const override {
    if (keys.empty() || query >= keys.end - 1) return kAllAlike;
    return std::max<Index>(1, keys.begin - query);
  }
  std::string spec() const override { return "causal"; }
};

}  // namespace

MaskKind causal_kind() {
  return {"causal", "causal", "a query sees the keys at its own position and before it", "nothing",
          [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            if (!arguments.empty()) throw std::invalid_argument("'causal' takes no argument");
            return std::make_shared<Causal>();
          }};
}

}  // namespace dattn
