#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kernels/range.hpp"

namespace dattn {

/// What stands behind the colon of a mask as `name=value,name=value`, in any order, each at most
/// once. Every function throws std::invalid_argument, naming what is wrong and the mask's form.
class Settings {
 public:
  Settings(std::string_view text, std::string_view form);

  /// A count of at least `least`; `otherwise` where it is not set.
  Index count(std::string_view name, Index otherwise, Index least = 0);
  /// Counts joined by 'x', of at least `least`; empty where it is not set.
  std::vector<Index> counts(std::string_view name, Index least = 0);
  /// A finite number of at least 0.
  double number(std::string_view name, double otherwise);
  /// To be called when everything known was asked for: what is left has no meaning.
  void done() const;

 private:
  struct Setting {
    std::string_view name;
    std::string_view text;
    bool used = false;
  };
  Setting* find(std::string_view name);
  [[noreturn]] void fail(const std::string& why) const;
  Index to_count(const Setting& setting, std::string_view text, Index least) const;

  std::string_view form_;
  std::vector<Setting> settings_;
};

/// `axb` for {a, b}.
std::string joined(const std::vector<Index>& counts);

}  // namespace dattn
