#include "kernels/masks/window.hpp"

#include <stdexcept>

namespace dattn {
namespace {

class Window final : public Mask {
 public:
  Window(Index left, Index right) : left_(left), right_(right) {}

  bool allows(Index, Index query, Index key) const override {
    return query - left_ <= key && key <= query + right_;
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const Range seen = intersect(keys, {query - left_, query + right_ + 1});
    if (!seen.empty()) out.push_back(seen);
  }
  Cover cover(Index, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty()) return Cover::None;
    const Index last_query = queries.end - 1;
    const Index last_key = keys.end - 1;
    // Every key between the first window's begin and the last window's end is in some window,
    // because neighbouring windows overlap or touch.
    if (last_key < queries.begin - left_ || keys.begin > last_query + right_) return Cover::None;
    const bool all = last_query - left_ <= keys.begin && last_key <= queries.begin + right_;
    return all ? Cover::All : Cover::Some;
  }
  std::string spec() const override {
    return "window:" + std::to_string(left_) + "," + std::to_string(right_);
  }

 private:
  Index left_;
  Index right_;
};

}  // namespace

MaskKind window_kind() {
  return {"window", "window:L,R", "query i sees keys i-L to i+R (sliding window)", "two counts",
          [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            const std::vector<Index> sides = parse_counts(arguments, "window:L,R");
            // The bound keeps position arithmetic far from overflow.
            if (sides.size() != 2 || std::max(sides[0], sides[1]) > (Index{1} << 60)) {
              throw std::invalid_argument("a window has two sides below 2^60: window:L,R");
            }
            return std::make_shared<Window>(sides[0], sides[1]);
          }};
}

}  // namespace dattn
