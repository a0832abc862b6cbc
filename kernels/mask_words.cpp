// Masks made of masks, and the words that say them.
#include <charconv>
#include <map>
#include <numeric>
#include <stdexcept>

#include "kernels/area.hpp"
#include "kernels/check.hpp"
#include "kernels/mask.hpp"
#include "kernels/settings.hpp"

namespace dattn {
namespace {

/// Of each of so many heads the first head with equal parts.
template <class Parts>
std::vector<Index> variants_of(Index heads, const Parts& parts) {
  std::map<decltype(parts(0)), Index> first;
  std::vector<Index> variants;
  for (Index h = 0; h < heads; ++h)
    variants.push_back(first.try_emplace(parts(h), h).first->second);
  return variants;
}
std::vector<Index> variants_of(const Mask& a, const Mask& b) {
  return variants_of(std::max(a.heads(), b.heads()),
                     [&](Index h) { return std::pair(a.variant(h), b.variant(h)); });
}
/// The variant of a head among all that may differ.
Index at_head(const std::vector<Index>& variants, Index head) {
  return variants.size() == 1 ? 0 : variants[static_cast<std::size_t>(head)];
}

/// Either and Both ask their two parts first: only where that leaves it open do the rows decide.
/// What `of` allows and `but` does not. Only kernels see it (Mask::apart): it has no words.
class Without final : public Mask {
 public:
  Without(MaskPtr of, MaskPtr but)
      : of_(std::move(of)), but_(std::move(but)), variants_(variants_of(*of_, *but_)) {}

  bool allows(Index head, Index query, Index key) const override {
    return of_->allows(head, query, key) && !but_->allows(head, query, key);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    const std::size_t first = out.size();
    members(head, query, {keys.begin, keys.size(), 1}, out);
    for (std::size_t i = first; i < out.size(); ++i) {
      out[i] = {keys.begin + out[i].begin, keys.begin + out[i].end};
    }
  }
  void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const override {
    std::vector<Range> all;
    std::vector<Range> taken;
    of_->members(head, query, keys, all);
    for (const Range part : all) {
      taken.clear();
      but_->members(head, query, keys.part(part), taken);
      Index from = part.begin;
      for (const Range t : taken) {
        if (t.begin > from - part.begin) out.push_back({from, part.begin + t.begin});
        from = part.begin + t.end;
      }
      if (from < part.end) out.push_back({from, part.end});
    }
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    const Cover of = of_->cover(head, queries, keys);
    if (of == Cover::None) return of;
    const Cover but = but_->cover(head, queries, keys);
    if (but == Cover::All) return Cover::None;
    return but == Cover::None ? of : Mask::cover(head, queries, keys);
  }
  Index alike(Index head, Index query, Range keys) const override {
    return std::min(of_->alike(head, query, keys), but_->alike(head, query, keys));
  }
  Index step(Index head) const override { return of_->step(head); }
  Index variant(Index head) const override { return at_head(variants_, head); }
  Index heads() const override { return std::ssize(variants_); }
  std::string spec() const override { return of_->spec() + " without " + but_->spec(); }

 private:
  MaskPtr of_;
  MaskPtr but_;
  std::vector<Index> variants_;
};

class Either final : public Mask {
 public:
  Either(MaskPtr a, MaskPtr b)
      : a_(std::move(a)),
        b_(std::move(b)),
        overlap_(both(a_, b_)),
        a_alone_(std::make_shared<Without>(a_, b_)),
        b_alone_(std::make_shared<Without>(b_, a_)),
        variants_(variants_of(*a_, *b_)) {}

  bool allows(Index head, Index query, Index key) const override {
    return a_->allows(head, query, key) || b_->allows(head, query, key);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    std::vector<Range> all;
    a_->spans(head, query, keys, all);
    const auto of_a = std::ssize(all);
    b_->spans(head, query, keys, all);
    std::inplace_merge(all.begin(), all.begin() + of_a, all.end());
    const auto first = static_cast<std::ptrdiff_t>(out.size());
    for (const Range r : all) {
      if (static_cast<std::ptrdiff_t>(out.size()) > first && r.begin <= out.back().end) {
        out.back().end = std::max(out.back().end, r.end);
      } else {
        out.push_back(r);
      }
    }
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    const Cover a = a_->cover(head, queries, keys);
    if (a == Cover::All) return a;
    const Cover b = b_->cover(head, queries, keys);
    if (a == Cover::None || b == Cover::All) return b;
    return b == Cover::None ? a : Mask::cover(head, queries, keys);
  }
  /// Where one part has a step that the other has not: counted apart, it is taken residue by
  /// residue.
  std::optional<Index> pairs(Index head, Range queries, Range keys) const override {
    if (a_->step(head) == b_->step(head)) return {};
    const auto count = [&](const Mask& mask) {
      return area(mask, head, {{queries.begin, queries.size(), 1}}, {{keys.begin, keys.size(), 1}});
    };
    return count(*a_) + count(*b_) - count(*overlap_);
  }
  Index alike(Index head, Index query, Range keys) const override {
    return std::min(a_->alike(head, query, keys), b_->alike(head, query, keys));
  }
  Index step(Index head) const override { return std::gcd(a_->step(head), b_->step(head)); }
  std::vector<MaskPtr> apart(Index head) const override {
    const Index a = a_->step(head);
    const Index b = b_->step(head);
    if (a == b) return {};
    return a > b ? std::vector{b_, a_alone_} : std::vector{a_, b_alone_};
  }
  Index variant(Index head) const override { return at_head(variants_, head); }
  Index heads() const override { return std::ssize(variants_); }
  std::string spec() const override { return a_->spec() + "/" + b_->spec(); }

 private:
  MaskPtr a_;
  MaskPtr b_;
  MaskPtr overlap_, a_alone_, b_alone_;
  std::vector<Index> variants_;
};

class Both final : public Mask {
 public:
  Both(MaskPtr a, MaskPtr b)
      : a_(std::move(a)), b_(std::move(b)), variants_(variants_of(*a_, *b_)) {}

  bool allows(Index head, Index query, Index key) const override {
    return a_->allows(head, query, key) && b_->allows(head, query, key);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    const std::size_t first = out.size();
    a_->spans(head, query, keys, out);
    const std::size_t end = out.size();
    for (std::size_t i = first; i < end; ++i) {
      const Range part = out[i];
      b_->spans(head, query, part, out);
    }
    const auto at = [&](std::size_t i) { return out.begin() + static_cast<std::ptrdiff_t>(i); };
    out.erase(at(first), at(end));  // no vector of its own: this is called row by row
  }
  void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const override {
    std::vector<Range> seen;
    a_->members(head, query, keys, seen);
    for (const Range part : seen) {
      const std::size_t from = out.size();
      b_->members(head, query, keys.part(part), out);
      for (std::size_t i = from; i < out.size(); ++i) {
        out[i] = {out[i].begin + part.begin, out[i].end + part.begin};
      }
    }
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    const Cover a = a_->cover(head, queries, keys);
    if (a == Cover::None) return a;
    const Cover b = b_->cover(head, queries, keys);
    if (a == Cover::All || b == Cover::None) return b;
    return b == Cover::All ? a : Mask::cover(head, queries, keys);
  }
  Index alike(Index head, Index query, Range keys) const override {
    return std::min(a_->alike(head, query, keys), b_->alike(head, query, keys));
  }
  Index step(Index head) const override {
    const Index a = a_->step(head);
    const Index b = b_->step(head);
    constexpr Index kMost = Index{1} << 31;  // the product of two steps is an Index
    return a < kMost && b < kMost ? std::lcm(a, b) : std::max(a, b);
  }
  Index variant(Index head) const override { return at_head(variants_, head); }
  Index heads() const override { return std::ssize(variants_); }
  std::string spec() const override { return grouped(*a_) + "+" + grouped(*b_); }

 private:
  /// '+' binds tighter than '/', so only an Either inside needs its parentheses.
  static std::string grouped(const Mask& mask) {
    const bool loose = dynamic_cast<const Either*>(&mask) != nullptr;
    return loose ? "(" + mask.spec() + ")" : mask.spec();
  }

  MaskPtr a_;
  MaskPtr b_;
  std::vector<Index> variants_;
};

class PerHead final : public Mask {
 public:
  explicit PerHead(std::vector<std::pair<Range, MaskPtr>> table)
      : table_(std::move(table)), variants_(variants_of(table_.back().first.end, [&](Index h) {
          return std::pair(row_of(h), of(h).variant(h));
        })) {}

  bool allows(Index head, Index query, Index key) const override {
    return of(head).allows(head, query, key);
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    of(head).spans(head, query, keys, out);
  }
  void members(Index head, Index query, const Run& keys, std::vector<Range>& out) const override {
    of(head).members(head, query, keys, out);
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    return of(head).cover(head, queries, keys);
  }
  std::optional<Index> pairs(Index head, Range queries, Range keys) const override {
    return of(head).pairs(head, queries, keys);
  }
  Index alike(Index head, Index query, Range keys) const override {
    return of(head).alike(head, query, keys);
  }
  Index step(Index head) const override { return of(head).step(head); }
  std::vector<MaskPtr> apart(Index head) const override { return of(head).apart(head); }
  Index variant(Index head) const override {
    CHECK(head >= 0 && head < heads(), "no mask for head", head);
    return variants_[static_cast<std::size_t>(head)];
  }
  Index heads() const override { return std::ssize(variants_); }
  std::string spec() const override {
    std::string out;
    for (const auto& [heads, mask] : table_) {
      out += (out.empty() ? "" : ";") + mask->spec() + "@" + std::to_string(heads.begin) + "-" +
             std::to_string(heads.end - 1);
    }
    return out;
  }

 private:
  Index row_of(Index head) const {
    for (std::size_t i = 0; i < table_.size(); ++i) {
      if (table_[i].first.contains(head)) return static_cast<Index>(i);
    }
    CHECK(false, "no mask for head", head);
    return 0;
  }
  const Mask& of(Index head) const {
    return *table_[static_cast<std::size_t>(row_of(head))].second;
  }

  std::vector<std::pair<Range, MaskPtr>> table_;
  std::vector<Index> variants_;
};

/// Recursive descent over: table = or@a-b ; ...   or = and / ...   and = atom + ...
class Words {
 public:
  Words(std::string_view text, const Shape& shape, const OpenNumbers& open)
      : text_(text), shape_(shape), open_(open) {}

  MaskPtr table() {
    std::vector<std::pair<Range, MaskPtr>> rows;
    Index next = 0;
    while (true) {
      parts_ = 0;
      MaskPtr mask = any_of();
      if (rows.empty() && text_.empty()) return mask;
      const Range heads = head_range();
      if (heads.begin != next || heads.end > shape_.query_heads) {
        fail("heads " + std::to_string(heads.begin) + "-" + std::to_string(heads.end - 1) +
             " do not follow on; list all " + std::to_string(shape_.query_heads) +
             " query heads once, in order");
      }
      next = heads.end;
      rows.emplace_back(heads, std::move(mask));
      if (!take(';')) break;
    }
    if (!text_.empty()) fail("unexpected " + shown(text_));
    if (next != shape_.query_heads) {
      fail("heads " + std::to_string(next) + "-" + std::to_string(shape_.query_heads - 1) +
           " have no mask");
    }
    return per_head(std::move(rows));
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { throw std::invalid_argument(why); }

  bool take(char c) {
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }

  MaskPtr any_of() {
    MaskPtr mask = all_of();
    while (take('/')) mask = either(std::move(mask), all_of());
    return mask;
  }

  MaskPtr all_of() {
    MaskPtr mask = atom();
    while (take('+')) mask = both(std::move(mask), atom());
    return mask;
  }

  MaskPtr atom() {
    if (take('(')) {
      // Bounded, so that no text can exhaust the stack.
      if (++depth_ > 64) fail("more than 64 parentheses inside one another");
      MaskPtr mask = any_of();
      if (!take(')')) fail("a '(' is not closed");
      --depth_;
      return mask;
    }
    // Bounded too: a long chain is a deep tree, and its destructor recurses.
    if (++parts_ > 256) fail("more than 256 masks joined into one");
    const std::string_view word = text_.substr(0, find_unquoted(text_, "+/;@()"));
    text_.remove_prefix(word.size());
    // The same words are the same mask: what it read from files is there once.
    MaskPtr& mask = made_[word];
    if (!mask) mask = primitive(word);
    return mask;
  }

  MaskPtr primitive(std::string_view word) const {
    const std::size_t colon = word.find(':');
    const std::string_view name = word.substr(0, colon);
    if (colon != std::string_view::npos && colon + 1 == word.size()) {
      fail("there is nothing behind the ':' of " + shown(word));
    }
    std::string known;
    for (const MaskKind& kind : mask_kinds()) {
      if (kind.name == name) {
        return kind.make(colon == std::string_view::npos ? "" : word.substr(colon + 1), shape_,
                         open_);
      }
      known += (known.empty() ? "" : ", ") + std::string(kind.name);
    }
    fail("no mask is called " + shown(name) + "; there are " + known + " (see dattn list)");
  }

  Range head_range() {
    if (!take('@')) {
      fail((text_.empty() ? "no heads" : "unexpected " + shown(text_)) +
           "; a table of heads is written mask@first-last;mask@first-last");
    }
    const Index first = number();
    return {first, (take('-') ? number() : first) + 1};
  }

  Index number() {
    Index value = 0;
    const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
    if (error != std::errc{} || value < 0 || value >= shape_.query_heads) {
      fail(shown(text_) + " does not start with a head number below " +
           std::to_string(shape_.query_heads));
    }
    text_.remove_prefix(static_cast<std::size_t>(end - text_.data()));
    return value;
  }

  std::string_view text_;
  const Shape& shape_;
  const OpenNumbers& open_;
  std::map<std::string_view, MaskPtr> made_;
  int depth_ = 0;
  int parts_ = 0;  ///< of the row at hand
};

/// A table stands outermost: its variants and its words hold for no part of a mask.
bool is_table(const MaskPtr& mask) { return dynamic_cast<const PerHead*>(mask.get()) != nullptr; }

}  // namespace

MaskPtr both(MaskPtr a, MaskPtr b) {
  CHECK(!is_table(a) && !is_table(b));
  return std::make_shared<Both>(std::move(a), std::move(b));
}

MaskPtr either(MaskPtr a, MaskPtr b) {
  CHECK(!is_table(a) && !is_table(b));
  return std::make_shared<Either>(std::move(a), std::move(b));
}

MaskPtr per_head(std::vector<std::pair<Range, MaskPtr>> table) {
  Index next = 0;
  for (const auto& [heads, mask] : table) {
    CHECK(heads.begin == next && !heads.empty() && !is_table(mask), heads.begin, heads.end, next);
    next = heads.end;
  }
  return std::make_shared<PerHead>(std::move(table));
}

MaskPtr parse_mask(std::string_view spec, const Shape& shape, const OpenNumbers& open) {
  return Words(spec, shape, open).table();
}

}  // namespace dattn
