#include "launcher/values.hpp"

#include <algorithm>
#include <boost/program_options/parsers.hpp>
#include <charconv>
#include <climits>
#include <cmath>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "kernels/count.hpp"
#include "launcher/failure.hpp"

namespace po = boost::program_options;

namespace dattn {
namespace {

constexpr std::size_t max_mesh_dims = 8;

/// All of `text` as a whole number >= 0 in decimal digits, if it is one and fits.
std::optional<std::int64_t> whole_number(std::string_view text) {
  // from_chars takes a minus sign, but neither spaces nor a plus sign.
  if (text.empty() || text[0] == '-') return std::nullopt;
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string join(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

/// Single-character edits that turn a into b; the rows of the usual table, one after the other.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replace = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replace, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

/// The name within two edits of `text`, the nearest first; empty if there is none.
std::string nearest(std::string_view text, const std::vector<std::string>& names) {
  if (text.size() > 64) return "";
  std::string best;
  std::size_t distance = std::min<std::size_t>(2, text.size() / 2) + 1;
  for (const std::string& name : names) {
    if (const std::size_t edits = edit_distance(text, name); edits < distance) {
      distance = edits;
      best = name;
    }
  }
  return best;
}

void check_word(std::string_view text, const std::vector<std::string>& names) {
  if (std::find(names.begin(), names.end(), text) != names.end()) return;
  const std::string best = nearest(text, names);
  throw BadValue(in_quotes(text) + " is not known" +
                 (best.empty() ? "" : ", did you mean " + best + "?") +
                 " (want one of: " + join(names) + ")");
}

class WordOption : public po::typed_value<std::string> {
 public:
  WordOption(std::vector<std::string> names, std::string* store)
      : typed_value(store), names_(std::move(names)) {}

  void xparse(boost::any& out, const std::vector<std::string>& texts) const override {
    const std::string& text = po::validators::get_single_string(texts);
    check_word(text, names_);
    out = text;
  }

 private:
  std::vector<std::string> names_;
};

class WordsOption : public po::typed_value<std::vector<std::string>> {
 public:
  WordsOption(std::vector<std::string> names, std::vector<std::string>* store)
      : typed_value(store), names_(std::move(names)) {}

  void xparse(boost::any& out, const std::vector<std::string>& texts) const override {
    std::string_view rest = po::validators::get_single_string(texts);
    std::vector<std::string> chosen;
    while (true) {
      const std::size_t comma = std::min(rest.find(','), rest.size());
      const std::string_view text = rest.substr(0, comma);
      check_word(text, names_);
      if (std::find(chosen.begin(), chosen.end(), text) != chosen.end()) {
        throw BadValue(in_quotes(text) + " is in the list twice (want each name once)");
      }
      chosen.emplace_back(text);
      if (comma == rest.size()) break;
      rest.remove_prefix(comma + 1);
    }
    out = std::move(chosen);
  }

 private:
  std::vector<std::string> names_;
};

/// Every complaint about the arguments of one command, with the pointer to its help.
class Complaints {
 public:
  Complaints(std::string command, const po::options_description& options)
      : help_("see " + std::move(command) + " --help") {
    for (const auto& option : options.options()) names_.push_back(option->long_name());
  }

  Failure unknown(const std::string& token) const {
    const std::string name = token.substr(0, token.find('='));
    const std::size_t dashes = std::min(name.find_first_not_of('-'), name.size());
    const std::string best = nearest(std::string_view(name).substr(dashes), names_);
    return line("unknown option " + in_quotes(name),
                best.empty() ? help_ : "did you mean --" + best + "? " + help_);
  }

  Failure syntax(const po::invalid_syntax& error) const {
    const std::string name = error.get_option_name();
    switch (error.kind()) {
      case po::invalid_syntax::missing_parameter:
      case po::invalid_syntax::empty_adjacent_parameter:
        return line(escaped_name(name) + ": its value is missing", help_);
      case po::invalid_syntax::extra_parameter:
        return line(escaped_name(name) + ": takes no value", "leave out what follows the name");
      default:
        return line("cannot read the option " + in_quotes(name), help_);
    }
  }

  Failure line(const std::string& what, const std::string& fix) const {
    return Failure(Exit::usage, what + " (" + fix + ")");
  }

  const std::string& help() const { return help_; }

 private:
  static std::string escaped_name(const std::string& name) {
    // Known options only come here with names of ours; a foreign text would be longer.
    return name.size() <= 60 ? name : in_quotes(name);
  }

  std::string help_;
  std::vector<std::string> names_;
};

}  // namespace

std::int64_t parse_count(std::string_view text, std::int64_t minimum) {
  const std::optional<Index> value = count_in(text);
  const std::string want = minimum == 0 ? "(want 0, 1, 2, ... or 8K, 2M)"
                           : minimum == 1
                               ? "(want 1, 2, 3, ... or 8K, 2M)"
                               : "(want " + std::to_string(minimum) + " or more, or 8K, 2M)";
  if (!value) {
    const bool digits = text.find_first_not_of("0123456789KMGTkmgt") == std::string_view::npos;
    throw BadValue(in_quotes(text) +
                   (digits && text.size() > 15 ? " is too large" : " is not a count") + " " + want);
  }
  if (*value < minimum) throw BadValue(in_quotes(text) + " is too small " + want);
  return *value;
}

Finite parse_finite(std::string_view text) {
  double value = 0;
  // from_chars knows no locale, so 0.5 is the same number everywhere.
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) {
    throw BadValue(in_quotes(text) +
                   " is too large or too close to 0 for a double (want 0.125 or 1e-3)");
  }
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    throw BadValue(in_quotes(text) + " is not a finite number (want 0.125 or 1e-3)");
  }
  return {value};
}

MeshSize parse_mesh(std::string_view text) {
  MeshSize mesh{{}};
  int product = 1;
  std::string_view rest = text;
  while (true) {
    const std::size_t cross = std::min(rest.find('x'), rest.size());
    const auto extent = whole_number(rest.substr(0, cross));
    if (!extent || *extent < 1) {
      throw BadValue(in_quotes(text) + " is not a mesh (want 4 or 2x3, each number 1 or more)");
    }
    if (mesh.extents.size() == max_mesh_dims) {
      throw BadValue(in_quotes(text) + " has more than 8 extents (want 4 or 2x3)");
    }
    if (*extent > INT_MAX || __builtin_mul_overflow(product, static_cast<int>(*extent), &product)) {
      throw BadValue(in_quotes(text) + " is too large a mesh (want less than 2^31 processes)");
    }
    mesh.extents.push_back(static_cast<int>(*extent));
    if (cross == rest.size()) return mesh;
    rest.remove_prefix(cross + 1);
  }
}

std::ostream& operator<<(std::ostream& out, Finite finite) {
  char text[32];
  const auto end = std::to_chars(std::begin(text), std::end(text), finite.value).ptr;
  return out << std::string_view(text, static_cast<std::size_t>(end - text));
}

std::ostream& operator<<(std::ostream& out, const MeshSize& mesh) {
  for (std::size_t dim = 0; dim < mesh.extents.size(); ++dim) {
    out << (dim > 0 ? "x" : "") << std::to_string(mesh.extents[dim]);
  }
  return out;
}

void validate(boost::any& out, const std::vector<std::string>& texts, Finite*, int) {
  out = parse_finite(po::validators::get_single_string(texts));
}

void validate(boost::any& out, const std::vector<std::string>& texts, MeshSize*, int) {
  out = parse_mesh(po::validators::get_single_string(texts));
}

po::typed_value<std::string>* word(std::vector<std::string> names, std::string* store) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : "|") + name;
  auto* option = new WordOption(std::move(names), store);  // options_description takes ownership.
  constexpr std::size_t kShort = 18;                       // a column of --help must hold it
  if (all.size() <= kShort) option->value_name(all);
  return option;
}

po::typed_value<std::vector<std::string>>* words(std::vector<std::string> names,
                                                 std::vector<std::string>* store) {
  return new WordsOption(std::move(names), store);  // options_description takes ownership.
}

po::variables_map parse(const std::string& command, const po::options_description& options,
                        std::span<const std::string> arguments) {
  namespace style = po::command_line_style;
  const Complaints complaints(command, options);
  po::variables_map values;
  try {
    const std::vector<std::string> tokens(arguments.begin(), arguments.end());
    const auto parsed = po::command_line_parser(tokens)
                            .options(options)
                            .style(style::unix_style & ~style::allow_guessing)
                            .run();
    std::set<std::string> seen;
    for (const auto& option : parsed.options) {
      if (option.string_key.empty()) {
        // Boost would drop it silently.
        const std::string text = option.value.empty() ? "" : option.value.front();
        throw complaints.line("unexpected argument " + in_quotes(text), complaints.help());
      }
      if (!seen.insert(option.string_key).second) {
        throw complaints.line("--" + option.string_key + ": given twice", "leave one of them out");
      }
      // Boost would take the next option for the value: `--output --verbose` makes such a file.
      if (option.original_tokens.size() > 1 && option.value.front().starts_with("--")) {
        throw complaints.line("--" + option.string_key + ": its value is missing before " +
                                  in_quotes(option.value.front()),
                              complaints.help());
      }
    }
    po::store(parsed, values);
    if (!seen.contains("help") && !seen.contains("version")) po::notify(values);
    return values;
  } catch (const BadValue& error) {
    throw Failure(Exit::usage, error.get_option_name() + ": " + error.complaint);
  } catch (const po::unknown_option& error) {
    throw complaints.unknown(error.get_option_name());
  } catch (const po::invalid_syntax& error) {
    throw complaints.syntax(error);
  } catch (const po::required_option& error) {
    throw complaints.line(error.get_option_name() + ": is required", complaints.help());
  } catch (const po::error_with_option_name& error) {
    throw complaints.line(error.get_option_name() + ": its value cannot be used",
                          complaints.help());
  } catch (const po::error& error) {
    throw complaints.line("cannot read the options: " + std::string(error.what()),
                          complaints.help());
  }
}

}  // namespace dattn
