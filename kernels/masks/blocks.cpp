#include "kernels/masks/blocks.hpp"

#include <algorithm>

#include "kernels/check.hpp"
#include "kernels/settings.hpp"

namespace dattn {
namespace {

constexpr std::string_view kForm = "blocks:size=64x64,rows=FILE,columns=FILE";
constexpr std::string_view kQuotes = "a name with any of + / ; @ ( ) , stands in double quotes";
/// For complaints; a name without its quotes is cut short.
constexpr std::string_view kWritten =
    "blocks:size=64x64,rows=FILE,columns=FILE (names with +/;@(), in double quotes)";

[[noreturn]] void fail(const std::string& why) { throw BadMaskNumbers(why); }

std::string text(Index i) { return std::to_string(i); }

/// The blocks of a problem, and what complaints call the two arrays.
struct Cut {
  Cut(const BlockLists& lists, const Shape& shape_in)
      : shape(shape_in), query_block(lists.query_block), key_block(lists.key_block) {
    constexpr Index kMost = Index{1} << 31;  // a Span holds them in 32 bits
    for (const Index block : {query_block, key_block}) {
      if (block < 1) throw std::invalid_argument("blocks have a size of 1 at least");
      if ((shape.keys - 1) / block + 1 >= kMost) {
        throw std::invalid_argument("blocks of " + text(block) + " are more than 2^31 for " +
                                    text(shape.keys) + " keys");
      }
    }
    query_blocks = (shape.keys - 1) / query_block + 1;
    key_blocks = (shape.keys - 1) / key_block + 1;
    const auto named = [](const char* what, const std::string& file) {
      return file.empty() ? what : std::string(what) + "=" + shown(file, 400);
    };
    rows = named("rows", lists.rows_file);
    columns = named("columns", lists.columns_file);
  }

  /// How many lists there are in rows of these extents.
  Index lists_in(const std::vector<Index>& extents) const {
    const Index lists = extents.size() == 1 ? 1 : extents.front();
    const bool known = lists == 1 || lists == shape.key_heads || lists == shape.query_heads;
    if (extents.empty() || extents.size() > 2 || !known || extents.back() != query_blocks + 1) {
      const std::string row = text(query_blocks + 1);
      fail(rows + " holds " + (extents.empty() ? "1" : joined(extents)) + " offsets; " +
           text(shape.keys) + " keys in query blocks of " + text(query_block) + " take " + row +
           " for all heads, " + text(shape.key_heads) + "x" + row + " for each key head or " +
           text(shape.query_heads) + "x" + row + " for each query head");
    }
    return lists;
  }

  /// How many columns the offsets speak of.
  Index entries_of(const std::vector<Index>& offsets) const {
    Index entries = 0;
    for (std::size_t i = 0; i < offsets.size(); ++i) {
      const Index block = static_cast<Index>(i) % (query_blocks + 1);
      const std::string list = " of list " + text(static_cast<Index>(i) / (query_blocks + 1));
      if (block == 0 && offsets[i] != 0) {
        fail(rows + ": the offsets" + list + " begin with " + text(offsets[i]) +
             "; each list's own begin with 0, and its columns follow those of the list before");
      }
      if (block > 0 && offsets[i] < offsets[i - 1]) {
        fail(rows + ": the offsets" + list + " fall from " + text(offsets[i - 1]) + " to " +
             text(offsets[i]) + " at query block " + text(block - 1));
      }
      if (block == query_blocks && __builtin_add_overflow(entries, offsets[i], &entries)) {
        fail(rows + ": the offsets add up to more than 2^63");
      }
    }
    return entries;
  }

  void require_columns(const std::vector<Index>& extents, Index entries) const {
    if (extents.size() == 1 && extents.front() == entries) return;
    fail(columns + " holds " + (extents.empty() ? "1" : joined(extents)) +
         " blocks, but the offsets in " + rows + " end at " + text(entries) +
         " in all; columns are one array, [entries], the lists one behind the other");
  }

  const Shape& shape;
  Index query_block, key_block;
  Index query_blocks = 0, key_blocks = 0;
  std::string rows, columns;
};

class Blocks final : public Mask {
 public:
  /// @pre the offsets are sound
  Blocks(const Cut& cut, const BlockLists& from)
      : shape_(cut.shape),
        query_block_(cut.query_block),
        key_block_(cut.key_block),
        query_blocks_(cut.query_blocks),
        rows_file_(from.rows_file),
        columns_file_(from.columns_file) {
    const auto stride = static_cast<std::size_t>(query_blocks_) + 1;
    const Index* columns = from.columns.data();
    for (std::size_t begin = 0; begin < from.rows.size(); begin += stride) {
      List list = merged(cut, static_cast<Index>(begin / stride), &from.rows[begin], columns);
      columns += from.rows[begin + stride - 1];
      // Equal lists are one variant.
      const auto known = std::find(lists_.begin(), lists_.end(), list);
      of_row_.push_back(known - lists_.begin());
      if (known == lists_.end()) lists_.push_back(std::move(list));
    }
  }

  bool allows(Index head, Index query, Index key) const override {
    const Index block = key / key_block_;
    const std::span<const Span> row = spans_of(head, query);
    const Span* at = first_behind(row, block);
    return at != row.data() + row.size() && at->begin <= block;
  }
  void spans(Index head, Index query, Range keys, std::vector<Range>& out) const override {
    if (keys.empty()) return;
    const std::span<const Span> row = spans_of(head, query);
    for (const Span* at = first_behind(row, keys.begin / key_block_);
         at != row.data() + row.size() && at->begin * key_block_ < keys.end; ++at) {
      out.push_back(intersect(keys, {at->begin * key_block_, at->end * key_block_}));
    }
  }
  Cover cover(Index head, Range queries, Range keys) const override {
    const Range inside = intersect(queries, {0, query_blocks_ * query_block_});
    if (inside.empty() || keys.empty()) return Cover::None;
    const Range blocks{keys.begin / key_block_, (keys.end - 1) / key_block_ + 1};
    bool any = false;
    bool gap = inside != queries;
    for (Index q = inside.begin; q < inside.end; q = (q / query_block_ + 1) * query_block_) {
      const std::span<const Span> row = spans_of(head, q);
      const Span* at = first_behind(row, blocks.begin);
      const bool some = at != row.data() + row.size() && at->begin < blocks.end;
      any = any || some;
      gap = gap || !some || at->begin > blocks.begin || at->end < blocks.end;
      if (any && gap) return Cover::Some;
    }
    return any ? Cover::All : Cover::None;
  }
  Index alike(Index, Index query, Range) const override {
    if (query < 0) return -query;
    if (query / query_block_ >= query_blocks_) return kAllAlike;
    return query_block_ - query % query_block_;
  }

  Index variant(Index head) const override { return of_row_[row_of(head)]; }
  Index heads() const override { return lists_.size() == 1 ? 1 : shape_.query_heads; }
  std::string spec() const override {
    return "blocks:size=" + joined({query_block_, key_block_}) +
           ",rows=" + quoted_file(rows_file_) + ",columns=" + quoted_file(columns_file_);
  }

 private:
  /// Neighbouring blocks of keys.
  struct Span {
    std::int32_t begin = 0;
    std::int32_t end = 0;
    friend bool operator==(const Span&, const Span&) = default;
  };
  struct List {
    std::vector<std::size_t> first{0};  ///< of each query block, in spans; and behind the last
    std::vector<Span> spans;            ///< ascending, never touching
    friend bool operator==(const List&, const List&) = default;
  };

  static List merged(const Cut& cut, Index number, const Index* offsets, const Index* columns) {
    List list;
    for (Index block = 0; block < cut.query_blocks; ++block) {
      Index before = -1;
      for (Index i = offsets[block]; i < offsets[block + 1]; ++i) {
        const Index column = columns[i];
        const auto where = [&] {
          return " of query block " + text(block) + " of list " + text(number);
        };
        if (column < 0 || column >= cut.key_blocks) {
          fail(cut.columns + ": block " + text(column) + where() + " is none of the " +
               text(cut.key_blocks) + " key blocks, 0 to " + text(cut.key_blocks - 1));
        }
        if (column <= before) {
          fail(cut.columns + ": block " + text(column) + where() + " comes behind block " +
               text(before) + "; they must ascend");
        }
        if (before >= 0 && column == before + 1) {
          ++list.spans.back().end;
        } else {
          const auto begin = static_cast<std::int32_t>(column);
          list.spans.push_back({begin, begin + 1});
        }
        before = column;
      }
      list.first.push_back(list.spans.size());
    }
    list.spans.shrink_to_fit();
    return list;
  }

  std::size_t row_of(Index head) const {
    const auto rows = static_cast<Index>(of_row_.size());
    if (rows == 1) return 0;
    return static_cast<std::size_t>(rows == shape_.query_heads ? head : shape_.key_head(head));
  }
  std::span<const Span> spans_of(Index head, Index query) const {
    if (query < 0 || query / query_block_ >= query_blocks_) return {};
    const List& list = lists_[static_cast<std::size_t>(of_row_[row_of(head)])];
    const auto block = static_cast<std::size_t>(query / query_block_);
    return {list.spans.data() + list.first[block], list.first[block + 1] - list.first[block]};
  }
  /// The first that ends behind a block.
  static const Span* first_behind(std::span<const Span> row, Index block) {
    return std::upper_bound(row.data(), row.data() + row.size(), block,
                            [](Index at, const Span& span) { return at < span.end; });
  }

  Shape shape_;
  Index query_block_, key_block_, query_blocks_;
  std::string rows_file_, columns_file_;
  std::vector<List> lists_;    ///< those that differ
  std::vector<Index> of_row_;  ///< which of them each list given is
};

MaskPtr make(std::string_view arguments, const Shape& shape, const OpenNumbers& open) {
  Settings settings(arguments, kWritten);
  std::vector<Index> size = settings.counts("size", 1);
  BlockLists lists;
  lists.rows_file = settings.file("rows");
  lists.columns_file = settings.file("columns");
  settings.done();
  if (size.size() == 1) size.push_back(size.front());
  if (size.size() != 2 || lists.rows_file.empty() || lists.columns_file.empty()) {
    throw std::invalid_argument("size takes one or two counts, rows and columns a file each; " +
                                std::string(kQuotes) + "; the mask is written " +
                                std::string(kForm));
  }
  if (!open) {
    throw std::invalid_argument(
        "nobody here opens files: give parse_mask a function that does, or call blocks_mask");
  }
  lists.query_block = size[0];
  lists.key_block = size[1];
  const Cut cut(lists, shape);
  // Extents first: a file that does not fit is never read.
  const NumberFile rows = open(lists.rows_file);
  cut.lists_in(rows.extents);
  lists.rows = rows.read();
  const NumberFile columns = open(lists.columns_file);
  cut.require_columns(columns.extents, cut.entries_of(lists.rows));
  lists.columns = columns.read();
  return std::make_shared<Blocks>(cut, lists);
}

}  // namespace

MaskPtr blocks_mask(const BlockLists& lists, const Shape& shape) {
  const Cut cut(lists, shape);
  const Index offsets = std::ssize(lists.rows);
  const Index row = cut.query_blocks + 1;
  cut.lists_in(offsets % row == 0 ? std::vector{offsets / row, row} : std::vector{offsets});
  cut.require_columns({std::ssize(lists.columns)}, cut.entries_of(lists.rows));
  return std::make_shared<Blocks>(cut, lists);
}

MaskKind blocks_kind() {
  return {
      "blocks", kForm, "block k of the keys is listed for block q of the queries, by head",
      "block sizes and two NumPy files of int32 or int64: offsets [query blocks + 1] or [heads, "
      "query blocks + 1], of query or key heads, each head's from 0; key blocks [entries]",
      make};
}

}  // namespace dattn
