#pragma once

#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace dattn {

/// One configuration of a sweep, as the options of one run.
struct Configuration {
  std::vector<std::string> arguments;
  std::string
      differs;  ///< the options that differ in the sweep, e.g. "--tokens 4K --strategy ring"
};

/// Every combination of the lists in `arguments`, the first option varying slowest. An option of
/// `lists` has one value or more: separated by commas, as words of their own, or by being repeated;
/// one of `whole`, which are lists too, may have commas in a value. Names are without their dashes.
/// What else there is goes to each configuration as it stands. Failure(usage) if they are more than
/// 100,000.
std::vector<Configuration> sweep(const std::vector<std::string>& arguments,
                                 const std::set<std::string>& lists,
                                 const std::set<std::string>& whole);

/// 16 hexadecimal digits that stand for a text: the same wherever it is the same.
std::string hash_of(std::string_view text);

}  // namespace dattn
