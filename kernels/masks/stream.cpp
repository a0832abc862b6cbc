#include "kernels/masks/stream.hpp"

#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm = "stream:sink=64,recent=256";

/// Streaming attention as DuoAttention deploys it (Xiao et al. 2024, arXiv 2410.10819):
/// key <= query and (key < sink or query - key < recent).
class Stream final : public Mask {
 public:
  Stream(Index sink, Index recent) : sink_(sink), recent_(recent) {}

  bool allows(Index, Index query, Index key) const override {
    return key <= query && (key < sink_ || query - key < recent_);
  }
  void spans(Index, Index query, Range keys, std::vector<Range>& out) const override {
    const Range before = intersect(keys, {0, query + 1});
    const Range sink = intersect(before, {0, sink_});
    const Range recent = intersect(before, {query - recent_ + 1, query + 1});
    if (sink.empty() || recent.empty() || recent.begin > sink.end) {
      if (!sink.empty()) out.push_back(sink);
      if (!recent.empty()) out.push_back(recent);
    } else {
      out.push_back({sink.begin, std::max(sink.end, recent.end)});
    }
  }
  Cover cover(Index, Range queries, Range keys) const override {
    if (queries.empty() || keys.empty()) return Cover::None;
    // A key is seen from its own position on, for `recent` queries or for good.
    const Index last = std::min(keys.end, queries.end) - 1;
    if (last < keys.begin) return Cover::None;
    if (keys.begin >= sink_ && last + recent_ <= queries.begin) return Cover::None;
    const Index first = std::max(keys.begin, sink_);  // that is forgotten
    const bool all =
        keys.end - 1 <= queries.begin && (first >= keys.end || queries.end - 1 < first + recent_);
    if (all) return Cover::All;
    return recent_ == 0 && keys.begin >= sink_ ? Cover::None : Cover::Some;
  }
  std::string spec() const override {
    return "stream:sink=" + std::to_string(sink_) + ",recent=" + std::to_string(recent_);
  }

 private:
  Index sink_;
  Index recent_;
};

}  // namespace

MaskPtr stream_mask(Index sink, Index recent) { return std::make_shared<Stream>(sink, recent); }

MaskKind stream_kind() {
  return {"stream", kForm,
          "causal; a query sees the first keys and the most recent ones, its own counted",
          "two counts, each optional",
          [](std::string_view arguments, const Shape&, const OpenNumbers&) -> MaskPtr {
            Settings settings(arguments, kForm);
            const Index sink = settings.count("sink", 64);
            const Index recent = settings.count("recent", 256);
            settings.done();
            return stream_mask(sink, recent);
          }};
}

}  // namespace dattn
