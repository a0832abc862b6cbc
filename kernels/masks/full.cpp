#include "kernels/masks/full.hpp"

#include <stdexcept>

namespace dattn {
namespace {

class Full final : public Mask {
 public:
  bool allows(Index, Index, Index) const override { return true; }
  void spans(Index, Index, Range keys, std::vector<Range>& out) const override {
    if (!keys.empty()) out.push_back(keys);
  }
  Cover cover(Index, Range queries, Range keys) const override {
    return queries.empty() || keys.empty() ? Cover::None : Cover::All;
  }
  Index alike(Index, Index, Range) const override { return kAllAlike; }
  std::string spec() const override { return "full"; }
};

}  // namespace

MaskKind full_kind() {
  return {"full", "full", "every query sees every key", "nothing",
          [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            if (!arguments.empty()) throw std::invalid_argument("'full' takes no argument");
            return std::make_shared<Full>();
          }};
}

}  // namespace dattn
