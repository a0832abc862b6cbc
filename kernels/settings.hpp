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
  /// `what` is written as `form` says.
  Settings(std::string_view text, std::string_view form, std::string_view what = "the mask");

  /// A count of at least `least`; `otherwise` where it is not set.
  Index count(std::string_view name, Index otherwise, Index least = 0);
  /// Counts joined by 'x', of at least `least`; empty where it is not set.
  std::vector<Index> counts(std::string_view name, Index least = 0);
  /// The name of a file, as it is or in double quotes ("" in them for one); empty where it is not
  /// set.
  std::string file(std::string_view name);
  /// Such lists joined by ':'; empty where it is not set.
  std::vector<std::vector<Index>> lists(std::string_view name, Index least = 0);
  /// A finite number of at least 0.
  double number(std::string_view name, double otherwise);
  /// To be called when everything known was asked for: what is left has no meaning.
  void done() const;
  /// Throws: `why`, and how it is written.
  [[noreturn]] void fail(const std::string& why) const;

 private:
  struct Setting {
    std::string_view name;
    std::string_view text;
    bool used = false;
  };
  Setting* find(std::string_view name);
  Index to_count(const Setting& setting, std::string_view text, Index least) const;
  std::vector<Index> to_counts(const Setting& setting, std::string_view text, Index least) const;

  std::string_view form_;
  std::string_view what_;
  std::vector<Setting> settings_;
};

/// Where the first of these characters stands outside of double quotes; npos if nowhere. A quote
/// that is not closed reaches to the end.
std::size_t find_unquoted(std::string_view text, std::string_view any);
/// A file's name as Settings::file reads it.
std::string quoted_file(std::string_view file);

/// `axb` for {a, b}.
std::string joined(const std::vector<Index>& counts);

}  // namespace dattn
