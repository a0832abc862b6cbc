#pragma once

#include <boost/any.hpp>
#include <boost/program_options/errors.hpp>
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/value_semantic.hpp>
#include <boost/program_options/variables_map.hpp>
#include <cstdint>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

/// Checked values for Boost.Program_options, which by itself reads "-1" into an unsigned number as
/// 2^64 - 1, takes nan for a double, guesses unfinished option names and drops stray arguments.
namespace dattn {

/// A value that an option cannot have. `complaint` says so without naming the option: "'-1' is not
/// a count (want ...)"; parse() puts the option's name before it.
struct BadValue : boost::program_options::error_with_option_name {
  explicit BadValue(const std::string& text)
      : error_with_option_name("bad value for %canonical_option%"), complaint(text) {}

  std::string complaint;
};

/// A whole number >= Minimum, written 4096, 8K, 2M, 1G or 1T, with K = 1024, M = 1024 K, ...
template <std::int64_t Minimum>
struct AtLeast {
  std::int64_t value = Minimum;
};

using Count = AtLeast<0>;
using Positive = AtLeast<1>;

/// A number that is neither infinite nor NaN, written the same way in every locale.
struct Finite {
  double value = 0;
};

/// The extents of a process mesh, written 2x3: 1 to 8 of them, each >= 1, their product an int.
struct MeshSize {
  std::vector<int> extents = {1};
};

/// What the text says, or BadValue.
std::int64_t parse_count(std::string_view text, std::int64_t minimum);
Finite parse_finite(std::string_view text);
MeshSize parse_mesh(std::string_view text);

template <std::int64_t Minimum>
std::ostream& operator<<(std::ostream& out, AtLeast<Minimum> count) {
  return out << std::to_string(count.value);
}
std::ostream& operator<<(std::ostream& out, Finite finite);
std::ostream& operator<<(std::ostream& out, const MeshSize& mesh);

/// What Boost calls to turn the text of an option into its value.
template <std::int64_t Minimum>
void validate(boost::any& out, const std::vector<std::string>& texts, AtLeast<Minimum>*, int) {
  out = AtLeast<Minimum>{
      parse_count(boost::program_options::validators::get_single_string(texts), Minimum)};
}
void validate(boost::any& out, const std::vector<std::string>& texts, Finite*, int);
void validate(boost::any& out, const std::vector<std::string>& texts, MeshSize*, int);

/// An option whose value is one of `names`.
boost::program_options::typed_value<std::string>* word(std::vector<std::string> names,
                                                       std::string* store = nullptr);

/// An option whose value is a comma list of one or more of `names`, none of them twice.
boost::program_options::typed_value<std::vector<std::string>>* words(
    std::vector<std::string> names, std::vector<std::string>* store = nullptr);

/// Parses and notifies. `arguments` follow the words of `command`, for example "dattn run", whose
/// help the messages point to. Everything wrong is a Failure(Exit::usage): unknown, shortened,
/// repeated or missing options, bad values, and arguments that belong to no option. With --help or
/// --version among the arguments required options may be missing, and variables stay as they are.
boost::program_options::variables_map parse(
    const std::string& command, const boost::program_options::options_description& options,
    std::span<const std::string> arguments);

}  // namespace dattn
