#include "kernels/masks/span.hpp"

#include <cmath>

#include "kernels/masks/stream.hpp"
#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm = "span:alpha=A,beta=B,sink=64,least=128,unit=64";

/// The spans of MoA (Fu et al. 2024, arXiv 2406.14909): alpha + beta * N keys of N, `least` at
/// least, up to the next multiple of `unit`; the first `sink` keys are some of them, the rest are
/// the most recent ones. For a given N that is a stream.
MaskPtr make(std::string_view arguments, const Shape& shape, const OpenNumbers&) {
  Settings settings(arguments, kForm);
  const double alpha = settings.number("alpha", 0);
  const double beta = settings.number("beta", 0);
  const Index sink = settings.count("sink", 64);
  const Index least = settings.count("least", 128);
  const Index unit = settings.count("unit", 64, 1);
  settings.done();
  const auto keys = static_cast<double>(shape.keys);
  const double wanted = std::min(std::ceil(alpha + beta * keys), keys);
  const Index span = std::max(least, static_cast<Index>(wanted));
  const Index whole = (span + unit - 1) / unit * unit;
  return stream_mask(sink, std::max<Index>(0, whole - sink));
}

}  // namespace

MaskKind span_kind() {
  return {"span", kForm,
          "a stream of max(least, A + B * keys) keys, up to a multiple of unit, the sink counted",
          "alpha or beta", make};
}

}  // namespace dattn
