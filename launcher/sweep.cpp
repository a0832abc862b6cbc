#include "launcher/sweep.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

#include "launcher/failure.hpp"

namespace dattn {
namespace {

constexpr std::size_t kMost = 100000;

/// An option and the values that it takes in turn.
struct Axis {
  std::string name;
  std::vector<std::string> values;
};

void add_values(Axis& axis, std::string_view text, bool whole) {
  while (!whole && text.find(',') != std::string_view::npos) {
    const std::size_t comma = text.find(',');
    axis.values.emplace_back(text.substr(0, comma));
    text.remove_prefix(comma + 1);
  }
  axis.values.emplace_back(text);
}

}  // namespace

std::vector<Configuration> sweep(const std::vector<std::string>& arguments,
                                 const std::set<std::string>& lists,
                                 const std::set<std::string>& whole) {
  std::vector<Axis> axes;
  std::vector<std::string> rest;
  for (std::size_t i = 0; i < arguments.size();) {
    const std::string& word = arguments[i++];
    const std::size_t equals = word.find('=');
    const std::string name = word.starts_with("--")
                                 ? word.substr(2, equals == std::string::npos ? equals : equals - 2)
                                 : "";
    if (!lists.contains(name) && !whole.contains(name)) {
      rest.push_back(word);
      continue;
    }
    auto axis = std::find_if(axes.begin(), axes.end(), [&](auto& a) { return a.name == name; });
    if (axis == axes.end()) axis = axes.insert(axes.end(), {name, {}});
    const std::size_t before = axis->values.size();
    if (equals != std::string::npos) {
      add_values(*axis, std::string_view(word).substr(equals + 1), whole.contains(name));
    }
    while (i < arguments.size() && !arguments[i].starts_with("--")) {
      add_values(*axis, arguments[i++], whole.contains(name));
    }
    if (axis->values.size() == before) {
      throw Failure(Exit::usage, "--" + name + ": its value is missing (see dattn bench --help)");
    }
  }
  std::size_t count = 1;
  for (const Axis& axis : axes) {
    count *= axis.values.size();
    if (count > kMost) {
      throw Failure(Exit::usage, fmt::format("the lists make more than {} configurations; shorten "
                                             "some, or make several sweeps",
                                             kMost));
    }
  }
  std::vector<Configuration> all;
  for (std::size_t n = 0; n < count; ++n) {
    Configuration& one = all.emplace_back(Configuration{rest, {}});
    std::size_t left = count;
    for (const Axis& axis : axes) {
      left /= axis.values.size();
      const std::string& value = axis.values[n / left % axis.values.size()];
      one.arguments.push_back("--" + axis.name + "=" + value);
      if (axis.values.size() == 1) continue;
      one.differs += (one.differs.empty() ? "--" : " --") + axis.name + " " + value;
    }
  }
  return all;
}

std::string hash_of(std::string_view text) {
  std::uint64_t sum = 0xcbf29ce484222325;  // FNV-1a (Fowler, Noll, Vo)
  for (const char c : text) sum = (sum ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return fmt::format("{:016x}", sum);
}

}  // namespace dattn
