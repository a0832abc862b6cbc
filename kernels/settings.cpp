#include "kernels/settings.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <stdexcept>

#include "kernels/check.hpp"
#include "kernels/count.hpp"

namespace dattn {
namespace {

// Far above any problem, and products with an extent below it stay far from overflow.
constexpr Index kMost = Index{1} << 40;

}  // namespace

Settings::Settings(std::string_view text, std::string_view form, std::string_view what)
    : form_(form), what_(what) {
  while (!text.empty()) {
    const std::string_view word = text.substr(0, find_unquoted(text, ","));
    text.remove_prefix(std::min(text.size(), word.size() + 1));
    const std::size_t sign = word.find('=');
    if (sign == 0 || sign == std::string_view::npos || sign + 1 == word.size()) {
      fail(shown(word) + " is not name=value");
    }
    const std::string_view name = word.substr(0, sign);
    if (find(name) != nullptr) fail(shown(name) + " is set twice");
    settings_.push_back({name, word.substr(sign + 1)});
  }
  for (Setting& setting : settings_) setting.used = false;
}

Settings::Setting* Settings::find(std::string_view name) {
  for (Setting& setting : settings_) {
    if (setting.name != name) continue;
    setting.used = true;
    return &setting;
  }
  return nullptr;
}

void Settings::fail(const std::string& why) const {
  throw std::invalid_argument(why + "; " + std::string(what_) + " is written " +
                              std::string(form_));
}

Index Settings::to_count(const Setting& setting, std::string_view text, Index least) const {
  const std::optional<Index> value = count_in(text);
  if (!value || *value < least || *value > kMost) {
    fail(std::string(setting.name) + " has " + shown(text) + " where it takes a count from " +
         std::to_string(least) + " to 2^40");
  }
  return *value;
}

Index Settings::count(std::string_view name, Index otherwise, Index least) {
  const Setting* setting = find(name);
  return setting == nullptr ? otherwise : to_count(*setting, setting->text, least);
}

std::vector<Index> Settings::to_counts(const Setting& setting, std::string_view text,
                                       Index least) const {
  std::vector<Index> values;
  while (true) {
    const std::size_t sign = text.find('x');
    values.push_back(to_count(setting, text.substr(0, sign), least));
    if (sign == std::string_view::npos) return values;
    text.remove_prefix(sign + 1);
  }
}

std::vector<Index> Settings::counts(std::string_view name, Index least) {
  const Setting* setting = find(name);
  return setting == nullptr ? std::vector<Index>{} : to_counts(*setting, setting->text, least);
}

std::vector<std::vector<Index>> Settings::lists(std::string_view name, Index least) {
  std::vector<std::vector<Index>> values;
  const Setting* setting = find(name);
  if (setting == nullptr) return values;
  std::string_view text = setting->text;
  while (true) {
    const std::size_t colon = text.find(':');
    values.push_back(to_counts(*setting, text.substr(0, colon), least));
    if (colon == std::string_view::npos) return values;
    text.remove_prefix(colon + 1);
  }
}

std::string Settings::file(std::string_view name) {
  const Setting* setting = find(name);
  if (setting == nullptr) return {};
  std::string_view text = setting->text;
  const bool quoted = text.front() == '"';
  if (quoted && (text.size() < 2 || text.back() != '"')) {
    fail(std::string(name) + " has " + shown(text) + " where a file's name ends in no quote");
  }
  if (quoted) text = text.substr(1, text.size() - 2);
  std::string file;
  for (; !text.empty(); text.remove_prefix(1)) {
    if (text.front() == '"') {
      if (!quoted || !text.starts_with(R"("")")) {
        fail(std::string(name) + " has " + shown(setting->text) +
             " where a quote inside of a file's name is written twice, and the name in quotes");
      }
      text.remove_prefix(1);
    }
    file += text.front();
  }
  return file;
}

double Settings::number(std::string_view name, double otherwise) {
  const Setting* setting = find(name);
  if (setting == nullptr) return otherwise;
  const std::string_view text = setting->text;
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !std::isfinite(value) ||
      value < 0 || value > static_cast<double>(kMost)) {
    fail(std::string(name) + " has " + shown(text) + " where it takes a number from 0 to 2^40");
  }
  return value;
}

void Settings::done() const {
  for (const Setting& setting : settings_) {
    if (!setting.used) fail("nothing is called " + shown(setting.name));
  }
}

std::size_t find_unquoted(std::string_view text, std::string_view any) {
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '"') {
      quoted = !quoted;
    } else if (!quoted && any.find(text[i]) != std::string_view::npos) {
      return i;
    }
  }
  return std::string_view::npos;
}

std::string quoted_file(std::string_view file) {
  std::string out = "\"";
  for (const char c : file) out += c == '"' ? std::string(R"("")") : std::string(1, c);
  return out + '"';
}

std::string joined(const std::vector<Index>& counts) {
  std::string text;
  for (const Index n : counts) text += (text.empty() ? "" : "x") + std::to_string(n);
  return text;
}

}  // namespace dattn
