#include "kernels/masks/sink.hpp"

#include <stdexcept>

namespace dattn {
namespace {

class Sink final : public Mask {
 public:
  explicit Sink(Index count) : count_(count) {}

  bool allows(Index, Index, Index key) const override { return key < count_; }
  void spans(Index, Index, Range keys, std::vector<Range>& out) const override {
    const Range seen{keys.begin, std::min(keys.end, count_)};
    if (!seen.empty()) out.push_back(seen);
  }
  Cover cover(Index, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty() || keys.begin >= count_) return Cover::None;
    return keys.end <= count_ ? Cover::All : Cover::Some;
  }
  Index alike(Index, Index, Range) const override { return kAllAlike; }
  std::string spec() const override { return "sink:" + std::to_string(count_); }

 private:
  Index count_;
};

}  // namespace

MaskKind sink_kind() {
  return {"sink", "sink:S", "every query sees the first S keys; join it, as in window:256,0/sink:4",
          "a count", [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            const std::vector<Index> count = parse_counts(arguments, "sink:S");
            if (count.size() != 1) throw std::invalid_argument("a sink has one count: sink:S");
            return std::make_shared<Sink>(count[0]);
          }};
}

}  // namespace dattn
