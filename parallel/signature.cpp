#include "parallel/signature.hpp"

#include <algorithm>

namespace dattn {
namespace {

// Separators that no field of ours contains.
constexpr char kField = '\x1e';
constexpr char kValue = '\x1f';

std::string joined(const Signature& fields) {
  std::string text;
  for (const auto& [name, value] : fields) text += name + kValue + value + kField;
  return text;
}

Signature split(std::string_view text) {
  Signature fields;
  while (!text.empty()) {
    const std::string_view field = text.substr(0, text.find(kField));
    const std::size_t middle = field.find(kValue);
    fields.emplace_back(field.substr(0, middle), field.substr(middle + 1));
    text.remove_prefix(field.size() + 1);
  }
  return fields;
}

/// The value, or of a long one some of it, what differs from `other` included.
std::string shown(const std::string& value, const std::string& other) {
  constexpr std::size_t kMost = 60;
  if (value.size() <= kMost) return value;
  const auto differs = std::mismatch(value.begin(), value.end(), other.begin(), other.end()).first;
  const auto same = static_cast<std::size_t>(differs - value.begin());
  const std::size_t from = same < kMost ? 0 : same - kMost / 2;
  return (from > 0 ? "..." : "") + value.substr(from, kMost) +
         (from + kMost < value.size() ? "..." : "");
}

std::string complaint(const std::vector<std::string>& all, const std::string& fix) {
  const Signature first = split(all.front());
  for (std::size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all.front()) continue;
    const Signature other = split(all[r]);
    for (std::size_t i = 0; i < std::min(first.size(), other.size()); ++i) {
      if (first[i] != other[i]) {
        return "rank " + std::to_string(r) + " has " + other[i].first + " '" +
               shown(other[i].second, first[i].second) + "' where rank 0 has '" +
               shown(first[i].second, other[i].second) + "'; " + fix;
      }
    }
    return "rank " + std::to_string(r) + " runs another version of the program than rank 0";
  }
  return {};
}

}  // namespace

void require_agreement(comm::Communicator& world, const Signature& own, const std::string& fix) {
  const std::vector<std::string> all = world.gather(joined(own));
  std::string verdict = world.rank() == 0 ? complaint(all, fix) : std::string();
  world.broadcast(verdict, 0);
  if (!verdict.empty()) throw Disagreement(verdict);
}

}  // namespace dattn
