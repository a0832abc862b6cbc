#include "kernels/masks/prefix.hpp"

#include <stdexcept>

namespace dattn {
namespace {

class Prefix final : public Mask {
 public:
  explicit Prefix(Index length) : length_(length) {}

  bool allows(Index, Index query, Index key) const override {
    return key < length_ || key <= query;
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const Range seen{keys.begin, std::min(keys.end, std::max(length_, query + 1))};
    if (!seen.empty()) out.push_back(seen);
  }
  Cover cover(Index, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty()) return Cover::None;
    if (keys.begin >= std::max(length_, queries.end)) return Cover::None;
    return keys.end <= std::max(length_, queries.begin + 1) ? Cover::All : Cover::Some;
  }
  std::string spec() const override { return "prefix:" + std::to_string(length_); }

 private:
  Index length_;
};

}  // namespace

MaskKind prefix_kind() {
  return {"prefix", "prefix:N", "causal, and every query also sees the first N keys (prefix-LM)",
          "a count", [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            const std::vector<Index> length = parse_counts(arguments, "prefix:N");
            if (length.size() != 1)
              throw std::invalid_argument("a prefix has one length: prefix:N");
            return std::make_shared<Prefix>(length[0]);
          }};
}

}  // namespace dattn
