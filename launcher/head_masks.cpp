#include "launcher/head_masks.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "kernels/settings.hpp"
#include "launcher/failure.hpp"

namespace dattn {
namespace {

using nlohmann::json;

/// The file, with what is wrong in it.
struct File {
  const std::string& path;

  [[noreturn]] void fail(const std::string& why) const {
    throw Failure(Exit::input, fmt::format("--head-masks {}: {}", quoted_path(path), why));
  }

  json read() const {
    constexpr std::uintmax_t kMost = 16 << 20;  // bytes
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) {
      fail(error ? error.message() : "is not a regular file");  // a pipe could keep us for ever
    }
    if (std::filesystem::file_size(path, error) > kMost) fail("is larger than 16 MiB");
    std::ifstream stream(path);
    if (!stream) fail("cannot be opened; check its permissions");
    json text;
    try {
      text = json::parse(stream);
    } catch (const json::exception& e) {
      fail(fmt::format("is not JSON ({})", in_quotes(e.what(), 120)));
    }
    return text;
  }

  /// The member of that name, which must be an object; null if there is none.
  const json* object(const json& in, const char* name) const {
    const auto found = in.find(name);
    if (found == in.end()) return nullptr;
    if (!found->is_object()) fail(fmt::format("'{}' is not an object {{...}}", name));
    return &*found;
  }

  std::string words(const json& mask, const std::string& of) const {
    if (!mask.is_string()) fail(fmt::format("the mask of {} is not a string", of));
    const auto text = mask.get<std::string>();
    if (find_unquoted(text, "@;") != std::string::npos) {
      fail(fmt::format("the mask of {} is itself a table of heads, {}", of, in_quotes(text)));
    }
    return text;
  }

  /// "0-3,9" as numbers below `count`.
  std::vector<Index> numbers(std::string_view text, const char* what, Index count) const {
    std::vector<Index> all;
    const std::string whole = in_quotes(text);
    const auto number = [&]() {
      Index value = 0;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
      if (error != std::errc{} || value < 0 || value >= count) {
        fail(fmt::format("{} is not a list of {} below {}, such as '0-3,9'", whole, what, count));
      }
      text.remove_prefix(static_cast<std::size_t>(end - text.data()));
      return value;
    };
    while (true) {
      const Index first = number();
      Index last = first;
      if (text.starts_with('-')) {
        text.remove_prefix(1);
        last = number();
      }
      if (last < first) fail(fmt::format("{} counts down", whole));
      for (Index i = first; i <= last; ++i) all.push_back(i);
      if (text.empty()) return all;
      if (!text.starts_with(',')) {
        fail(fmt::format("{} is not a list of {}, such as '0-3,9'", whole, what));
      }
      text.remove_prefix(1);
    }
  }

  void only(const json& in, std::initializer_list<const char*> names) const {
    for (const auto& [name, value] : in.items()) {
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        fail(fmt::format("nothing is called {}", in_quotes(name)));
      }
    }
  }
};

/// The object for one layer.
const json& layer_of(const File& file, const json& all, std::optional<Index> layer) {
  if (!all.is_object()) file.fail("is not an object {...}");
  const json* layers = file.object(all, "layers");
  if (layers == nullptr) {
    if (!layer) return all;
    throw Failure(Exit::usage, fmt::format("--layer {}: {} has no layers; leave it out", *layer,
                                           quoted_path(file.path)));
  }
  file.only(all, {"layers"});
  constexpr Index kMostLayers = 1 << 20;
  const json* found = nullptr;
  for (const auto& [names, masks] : layers->items()) {
    if (!masks.is_object()) file.fail(fmt::format("layers {} are no object", in_quotes(names)));
    for (const Index n : file.numbers(names, "layers", kMostLayers)) {
      if (n != layer) continue;
      if (found != nullptr) file.fail(fmt::format("layer {} stands twice", n));
      found = &masks;
    }
  }
  if (!layer) {
    throw Failure(Exit::usage, fmt::format("--head-masks {} has layers; say which with --layer",
                                           quoted_path(file.path)));
  }
  if (found == nullptr) {
    throw Failure(Exit::usage,
                  fmt::format("--layer {} is not in {}", *layer, quoted_path(file.path)));
  }
  return *found;
}

}  // namespace

std::string read_head_masks(const std::string& path, std::optional<Index> layer,
                            const Shape& shape) {
  const File file{path};
  const json all = file.read();
  const json& masks = layer_of(file, all, layer);
  file.only(masks, {"mask", "heads", "key_heads"});
  std::vector<std::string> of_head(static_cast<std::size_t>(shape.query_heads));
  const auto set = [&](Index head, const std::string& words) {
    std::string& mask = of_head[static_cast<std::size_t>(head)];
    if (!mask.empty()) file.fail(fmt::format("head {} has two masks", head));
    mask = words;
  };
  if (const json* heads = file.object(masks, "heads")) {
    for (const auto& [names, mask] : heads->items()) {
      const std::string words = file.words(mask, "heads " + in_quotes(names));
      for (const Index h : file.numbers(names, "heads", shape.query_heads)) set(h, words);
    }
  }
  if (const json* heads = file.object(masks, "key_heads")) {
    const Index group = shape.query_heads / shape.key_heads;
    for (const auto& [names, mask] : heads->items()) {
      const std::string words = file.words(mask, "key heads " + in_quotes(names));
      for (const Index k : file.numbers(names, "key heads", shape.key_heads)) {
        for (Index h = k * group; h < (k + 1) * group; ++h) set(h, words);
      }
    }
  }
  if (const auto rest = masks.find("mask"); rest != masks.end()) {
    const std::string words = file.words(*rest, "the other heads");
    for (std::string& mask : of_head) {
      if (mask.empty()) mask = words;
    }
  }
  std::string table;
  Index first = 0;
  for (Index h = 0; h < shape.query_heads; ++h) {
    const std::string& mask = of_head[static_cast<std::size_t>(h)];
    if (mask.empty()) file.fail(fmt::format("head {} has no mask; add \"mask\" for the rest", h));
    if (h + 1 < shape.query_heads && of_head[static_cast<std::size_t>(h) + 1] == mask) continue;
    table += fmt::format("{}{}@{}-{}", table.empty() ? "" : ";", mask, first, h);
    first = h + 1;
  }
  return table;
}

}  // namespace dattn
