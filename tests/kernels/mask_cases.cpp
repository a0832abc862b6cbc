#include "tests/kernels/mask_cases.hpp"

#include <algorithm>
#include <cmath>

#include "tests/block_files.hpp"

namespace dattn {
namespace {

/// The word behind the colon as counts.
std::vector<Index> counts(const std::string& text) { return parse_counts(text, "test"); }

Allowed full() {
  return [](Index, Index, Index) { return true; };
}
Allowed causal() {
  return [](Index, Index q, Index k) { return q - k >= 0; };
}
Allowed window(Index left, Index right) {
  return [=](Index, Index q, Index k) { return k - q >= -left && k - q <= right; };
}
Allowed prefix(Index n) {
  return [=](Index, Index q, Index k) { return k <= n - 1 || q - k >= 0; };
}
Allowed sink(Index n) {
  return [=](Index, Index, Index k) { return k <= n - 1; };
}
Allowed documents(const std::string& lengths) {
  std::vector<Index> owner;
  for (Index d = 0; const Index n : counts(lengths)) {
    for (Index i = 0; i < n; ++i) owner.push_back(d);
    ++d;
  }
  return [owner](Index, Index q, Index k) {
    const auto last = static_cast<Index>(owner.size());
    if (q < 0 || q >= last || k < 0 || k >= last) return false;
    return owner[static_cast<std::size_t>(q)] == owner[static_cast<std::size_t>(k)];
  };
}
Allowed stream(Index sink, Index recent) {
  return [=](Index, Index q, Index k) { return q - k >= 0 && (k < sink || k > q - recent); };
}
Allowed dilated(Index left, Index right, Index step) {
  return [=](Index, Index q, Index k) {
    for (Index j = -left; j <= right; ++j) {
      if (q + j * step == k) return true;
    }
    return false;
  };
}
/// Of three key heads; query heads read one each, or two.
}  // namespace

Allowed s2(Sharded s, Index heads_of_key, Index key_heads) {
  return [=](Index h, Index q, Index k) {
    if (k > q) return false;
    const Index head = h / heads_of_key;
    if (head >= key_heads - s.dense) return true;
    return q / s.block - k / s.block < s.local ||
           (k / s.block + head * s.step + s.offset) % s.stride == 0;
  };
}

namespace {
Allowed s2_relative(Index block, Index left, Index right, Index stride, Index dense = 0) {
  return [=](Index h, Index q, Index k) {
    if (h >= 3 - dense) return true;
    // From the query's block towards the key's: the local ones, then one in `stride`.
    const double at = std::floor(static_cast<double>(q) / static_cast<double>(block));
    const Index apart = k / block - static_cast<Index>(at);
    const Index local = apart < 0 ? left : right;
    const Index away = std::abs(apart);
    return away < local || (away - local + 1) % stride == 0;
  };
}

struct Grid {
  std::vector<Index> dims, window;
  std::vector<Index> stride{1, 1, 1}, dilation{1, 1, 1}, causal{0, 0, 0}, tile{99, 99, 99};
};
/// The coordinates of all tokens, in order: tile by tile.
std::vector<std::vector<Index>> tokens(const Grid& g) {
  std::vector<std::vector<Index>> all;
  std::vector<std::vector<Index>> tiles{{}};
  for (std::size_t i = 0; i < g.dims.size(); ++i) {
    std::vector<std::vector<Index>> next;
    for (const auto& tile : tiles) {
      for (Index begin = 0; begin < g.dims[i]; begin += g.tile[i]) {
        next.push_back(tile);
        next.back().push_back(begin);
      }
    }
    tiles = next;
  }
  for (const auto& tile : tiles) {
    std::vector<std::vector<Index>> inside{{}};
    for (std::size_t i = 0; i < g.dims.size(); ++i) {
      std::vector<std::vector<Index>> next;
      for (const auto& point : inside) {
        for (Index x = tile[i]; x < std::min(tile[i] + g.tile[i], g.dims[i]); ++x) {
          next.push_back(point);
          next.back().push_back(x);
        }
      }
      inside = next;
    }
    all.insert(all.end(), inside.begin(), inside.end());
  }
  return all;
}
Allowed neighbor(const Grid& g) {
  const auto along = [g](std::size_t d, Index x, Index y) {
    std::vector<Index> group;  // the coordinates that x may see
    for (Index z = x % g.dilation[d]; z < g.dims[d]; z += g.dilation[d]) group.push_back(z);
    const auto count = static_cast<Index>(group.size());
    const auto i = std::find(group.begin(), group.end(), x) - group.begin();
    const Index w = g.window[d];
    std::vector<Index> stride;  // those that share x's leader
    for (Index z = 0; z < g.stride[d]; ++z) stride.push_back(i / g.stride[d] * g.stride[d] + z);
    Index begin = 0;
    Index end = 0;
    if (g.causal[d] != 0) {
      end = std::min(stride.back(), count - 1) + 1;
      begin = end - w;
    } else {
      begin = std::min(stride[stride.size() / 2], count - 1) - w / 2;
      end = begin + w;
      for (; begin < 0; ++begin) ++end;
      for (; end > count; --end) --begin;
    }
    for (Index z = std::max<Index>(begin, 0); z < end; ++z) {
      if (g.causal[d] != 0 && z > i) break;
      if (group[static_cast<std::size_t>(z)] == y) return true;
    }
    return false;
  };
  const auto points = tokens(g);
  return [=](Index, Index q, Index k) {
    if (q < 0) return false;
    const auto& a = points[static_cast<std::size_t>(q)];
    const auto& b = points[static_cast<std::size_t>(k)];
    for (std::size_t d = 0; d < a.size(); ++d) {
      if (!along(d, a[d], b[d])) return false;
    }
    return true;
  };
}
/// `lists` of three: 0 or 1 for all heads.
Allowed blocks(Index query_block, Index key_block, Index lists, Index keys = 11) {
  return [=](Index h, Index q, Index k) {
    if (q < 0 || q / query_block > (keys - 1) / query_block) return false;
    return block_listed(lists < 2 ? 0 : h, q / query_block, k / key_block);
  };
}

/// Of one level: how many sequences each group has, and keys.
struct Group {
  Index sequences, keys;
};
/// Says of each key whose it is, and of a sequence's own keys how old: 0 for the newest.
Allowed batch(Index fresh, const std::vector<std::vector<Group>>& levels,
              const std::vector<Index>& suffix) {
  struct Key {
    Range sequences;
    Index age;
  };
  std::vector<Key> keys;
  for (const auto& level : levels) {
    for (Index first = 0; const Group& group : level) {
      for (Index i = 0; i < group.keys; ++i) keys.push_back({{first, first + group.sequences}, 99});
      first += group.sequences;
    }
  }
  for (Index s = 0; const Index length : suffix) {
    for (Index age = length - 1; age >= 0; --age) keys.push_back({{s, s + 1}, age});
    ++s;
  }
  const Index sequences = std::ssize(suffix);
  return [=](Index, Index q, Index k) {
    const Index row = q - (std::ssize(keys) - sequences * fresh);
    if (row < 0 || row >= sequences * fresh || k >= std::ssize(keys)) return false;
    const Key& key = keys[static_cast<std::size_t>(k)];
    const Index age = fresh - 1 - row % fresh;
    return key.sequences.contains(row / fresh) && key.age >= age;
  };
}
Allowed operator+(Allowed a, Allowed b) {
  return [=](Index h, Index q, Index k) { return a(h, q, k) && b(h, q, k); };
}
Allowed operator/(Allowed a, Allowed b) {
  return [=](Index h, Index q, Index k) { return a(h, q, k) || b(h, q, k); };
}

}  // namespace

const std::vector<MaskCase>& mask_cases() {
  static const std::vector<MaskCase> table{
      {"full", full()},
      {"causal", causal()},
      {"window:0,0", window(0, 0)},
      {"window:3,0", window(3, 0)},
      {"window:0,5", window(0, 5)},
      {"window:2,1", window(2, 1)},
      {"window:100,100", window(100, 100)},
      {"window:1152921504606846976,0", window(Index{1} << 60, 0)},
      {"documents:11", documents("11")},
      {"documents:3,0,1,5,0,2", documents("3,0,1,5,0,2")},
      {"documents:0,1,1,1,8,0", documents("0,1,1,1,8,0")},
      {"documents:offsets=\"offsets 0 3 3 4 9 9 11\"", documents("3,0,1,5,0,2")},
      {"prefix:0", prefix(0)},
      {"prefix:4", prefix(4)},
      {"prefix:99", prefix(99)},
      {"prefix:9223372036854775807", prefix(99)},
      {"sink:0", sink(0)},
      {"sink:3", sink(3)},
      {"sink:99", sink(99)},
      {"causal+window:2,2", causal() + window(2, 2)},
      {"causal+documents:3,4,4", causal() + documents("3,4,4")},
      {"window:2,0/sink:2", window(2, 0) / sink(2)},
      {"causal+window:2,0/sink:2", (causal() + window(2, 0)) / sink(2)},
      {"sink:2/causal+window:2,0", sink(2) / (causal() + window(2, 0))},
      {"causal+(window:1,1/sink:1)", causal() + (window(1, 1) / sink(1))},
      {"(causal)", causal()},
      {"((sink:1/window:0,1)+causal)/documents:5,6",
       ((sink(1) / window(0, 1)) + causal()) / documents("5,6")},
      {"(sink:4/window:1,0)+(causal/sink:1)+full", (sink(4) / window(1, 0)) + (causal() / sink(1))},
      {"causal+sink:0", sink(0)},
      {"sink:6/window:0,9", sink(6) / window(0, 9)},
      {"causal@0;full@1;window:1,0/sink:1@2",
       [](Index h, Index q, Index k) {
         return h == 0   ? causal()(h, q, k)
                : h == 1 ? full()(h, q, k)
                         : (window(1, 0) / sink(1))(h, q, k);
       }},
      {"causal@0-1;sink:1@2-2",
       [](Index h, Index q, Index k) { return h < 2 ? causal()(h, q, k) : sink(1)(h, q, k); }},
      {"window:1,1@0-2", window(1, 1)},
      {"stream:sink=2,recent=3", stream(2, 3)},
      {"stream:recent=1,sink=0", stream(0, 1)},
      {"stream:sink=3,recent=0", stream(3, 0)},
      {"stream:sink=0,recent=0", [](Index, Index, Index) { return false; }},
      {"stream", causal()},
      {"span:alpha=2,beta=0.3,sink=1,least=2,unit=2", stream(1, 5)},
      {"span:beta=0.5,sink=2,least=7,unit=1", stream(2, 5)},
      {"span:alpha=1e9,sink=4,least=0", causal()},
      {"dilated:2,1,3", dilated(2, 1, 3)},
      {"dilated:0,0,7", dilated(0, 0, 7)},
      {"dilated:3,0,1", window(3, 0)},
      {"dilated:1073741824,0,2", dilated(20, 0, 2)},
      {"causal+dilated:9,9,2", causal() + dilated(9, 9, 2)},
      {"dilated:2,1,3/sink:1", dilated(2, 1, 3) / sink(1)},
      {"window:1,1/dilated:1,2,4/dilated:2,1,3",
       window(1, 1) / dilated(1, 2, 4) / dilated(2, 1, 3)},
      {"s2:block=1,local=2,stride=3", s2({1, 2, 3})},
      {"s2:block=2,local=1,stride=2,step=1", s2({2, 1, 2})},
      {"s2:block=2,local=1,stride=4,offset=3,step=2", s2({2, 1, 4, 3, 2})},
      {"s2:block=3,local=1,stride=2,dense=1", s2({3, 1, 2, 0, 1, 1})},
      {"s2:block=1,local=1,stride=7,step=0", s2({1, 1, 7, 0, 0})},
      {"s2:block=1,local=1,stride=9", s2({1, 1, 9, 0, 3})},  // step: stride over query heads
      {"s2:stride=1", causal()},
      {"s2", causal()},
      {"s2:relative=1,block=1,local=2x1,stride=3", s2_relative(1, 2, 1, 3)},
      {"s2:relative=1,block=2,local=1,stride=2,dense=2", s2_relative(2, 1, 1, 2, 2)},
      {"s2:relative=1,block=1,local=3x5,stride=1", full()},
      {"s2:block=1,local=1,stride=3/sink:1", s2({1, 1, 3}) / sink(1)},
      {"s2:block=1,local=1,stride=3+window:4,0", s2({1, 1, 3}) + window(4, 0)},
      {"s2:block=1,local=1,stride=3@0-1;full@2",
       [](Index h, Index q, Index k) {
         return h == 2 || s2({1, 1, 3})(h, q, k);
       }},
      {"neighbor:dims=11,window=3", neighbor({{11}, {3}})},
      {"neighbor:dims=11,window=4,stride=3", neighbor({{11}, {4}, {3}})},
      {"neighbor:dims=11,window=5,stride=2,causal=1", neighbor({{11}, {5}, {2}, {1}, {1}})},
      {"neighbor:dims=11,window=2,dilation=4", neighbor({{11}, {2}, {1}, {4}})},
      {"neighbor:dims=11,window=3,dilation=3,causal=1", neighbor({{11}, {3}, {1}, {3}, {1}})},
      {"neighbor:dims=11,window=11", neighbor({{11}, {11}})},
      {"neighbor:dims=3x4,window=2x3", neighbor({{3, 4}, {2, 3}}), 12},
      {"neighbor:dims=4x3,window=3x2,stride=2x1,causal=1x0,tile=2x2",
       neighbor({{4, 3}, {3, 2}, {2, 1}, {1, 1}, {1, 0}, {2, 2}}), 12},
      {"neighbor:dims=2x3x3,window=1x2x3,dilation=2x1x1,tile=2x2x1",
       neighbor({{2, 3, 3}, {1, 2, 3}, {1, 1, 1}, {2, 1, 1}, {0, 0, 0}, {2, 2, 1}}), 18},
      {"neighbor:dims=3x4,window=1x2,dilation=3x2,tile=3",
       neighbor({{3, 4}, {1, 2}, {1, 1}, {3, 2}, {0, 0}, {3, 3}}), 12},
      {block_words(3, 2, 0, 11), blocks(3, 2, 0)},
      {block_words(2, 3, 1, 11), blocks(2, 3, 1)},
      {block_words(4, 1, 3, 11), blocks(4, 1, 3)},
      {block_words(11, 11, 3, 11), blocks(11, 11, 3)},
      {"causal+" + block_words(2, 2, 3, 11), causal() + blocks(2, 2, 3)},
      {"(" + block_words(3, 4, 3, 11) + "/sink:1)+window:6,1",
       (blocks(3, 4, 3) / sink(1)) + window(6, 1)},
      {block_words(2, 2, 3, 11) + "@0-1;causal@2",
       [](Index h, Index q, Index k) {
         return h < 2 ? blocks(2, 2, 3)(h, q, k) : causal()(h, q, k);
       }},
      {"batch:sequences=3,suffix=2", batch(1, {}, {2, 2, 2}), 6, 3},
      {"batch:sequences=1,new=5", batch(5, {}, {5}), 5, 5},
      {"batch:sequences=3,new=2,suffix=2:4:3", batch(2, {}, {2, 4, 3}), 9, 6},
      {"batch:sequences=4,levels=1x3", batch(1, {{{4, 3}}}, {1, 1, 1, 1}), 7, 4},
      {"batch:sequences=5,levels=2x3,suffix=2", batch(1, {{{2, 3}, {3, 3}}}, {2, 2, 2, 2, 2}), 16,
       5},
      {"batch:sequences=3,new=3,levels=1x2:2x1:3x2,suffix=3:5:4",
       batch(3, {{{3, 2}}, {{1, 1}, {2, 1}}, {{1, 2}, {1, 2}, {1, 2}}}, {3, 5, 4}), 22, 9},
      {"batch:sequences=5,new=2,levels=1x1:2x3x1,sizes=5:1x4,suffix=2:2:3:2:4",
       batch(2, {{{5, 1}}, {{1, 3}, {4, 1}}}, {2, 2, 3, 2, 4}), 18, 10},
      {"batch:sequences=4,suffix=1,longest=5,seed=7", batch(1, {}, {1, 3, 5, 1}), 10, 4},
      {"batch:sequences=2,new=2,levels=1x3,suffix=3+(window:3,0/sink:2)",
       batch(2, {{{2, 3}}}, {3, 3}) + (window(3, 0) / sink(2)), 9, 4},
  };
  return table;
}

}  // namespace dattn
