// attend(): how a block is cut, so that what is left of it fills panels and tiles.

#include "kernels/attend_block.hpp"
#include "kernels/check.hpp"
#include "kernels/decode.hpp"
#include "kernels/key_order.hpp"
#include "kernels/panel.hpp"
#include "kernels/partial.hpp"
#include "kernels/patches.hpp"
#include "kernels/readers.hpp"
#include "kernels/residues.hpp"

namespace dattn {
namespace {

/// attend_block, head group by head group where their keys are better taken in an order of their
/// own: in a copy.
template <class T>
void attend_in_order(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                     const Where& where, const Mask& mask, const Work& work,
                     const std::vector<HeadGroup>& groups) {
  // Few queries read keys as they lie: a copy would cost what they cost.
  const bool few = std::any_of(groups.begin(), groups.end(), [&](const HeadGroup& group) {
    return q.rows * group.heads.size() <= kLanes;
  });
  const auto orders = few ? std::map<Index, std::vector<Range>>{} : key_orders(where, mask, groups);
  if (orders.empty()) return attend_block(q, k, v, out, where, mask, work);
  CallWorkspace workspace(work);
  for (const HeadGroup& group : groups) {
    const Index head = where.query_heads.begin + group.heads.begin;
    const std::vector<Range>& order = orders.at(mask.variant(head));
    Where part = group_in_order(where, group, order);
    View<const T> keys = k.only({group.key_head, group.key_head + 1});
    View<const T> values = v.only({group.value_head, group.value_head + 1});
    if (!order.empty()) {
      const Index k_bytes = aligned(keys.size() * static_cast<Index>(sizeof(T)));
      const Index v_bytes = aligned(values.size() * static_cast<Index>(sizeof(T)));
      auto* memory = workspace.template take<std::byte>(Workspace::Use::ordered,
                                                        k_bytes + v_bytes + k.rows * 4);
      keys = gathered(keys, order, reinterpret_cast<T*>(memory), work.poll);
      values = gathered(values, order, reinterpret_cast<T*>(memory + k_bytes), work.poll);
      if (part.key_weights.data != nullptr) {
        auto* weights = reinterpret_cast<float*>(memory + k_bytes + v_bytes);
        part.key_weights = gathered(part.key_weights, order, weights, work.poll);
      }
    }
    attend_block(q.only(group.heads), keys, values, out.only(group.heads), part, mask, work);
  }
}

/// The keys that many queries see by panels, then the others.
template <class T>
void attend_by_readers(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                       const Where& where, const Mask& mask, const Work& work) {
  const std::vector<HeadGroup> groups = head_groups(where, mask);
  const Readers readers = readers_of(where, mask, groups);
  if (readers.few.empty()) return attend_in_order(q, k, v, out, where, mask, work, groups);
  for (const Range keys : readers.many) {
    const Where some = where_of(where, {{0, q.rows}, keys});
    attend_in_order(q, k.part(keys), v.part(keys), out, some, mask, work, groups);
  }
  for (const std::vector<Part>& parts : readers.few) {
    decode_parts(q, k, v, out, where, mask, work, groups, parts);
  }
}

/// Neighbouring groups [groups.begin, groups.end) of as many heads each under one mask.
std::vector<Range> bands_of(const Where& where, const Mask& mask,
                            const std::vector<HeadGroup>& groups) {
  std::vector<Range> bands;
  const auto variant = [&](const HeadGroup& group) {
    return mask.variant(where.query_heads.begin + group.heads.begin);
  };
  for (Index g = 0; g < std::ssize(groups); ++g) {
    const HeadGroup& group = groups[static_cast<std::size_t>(g)];
    if (!bands.empty()) {
      const HeadGroup& before = groups[static_cast<std::size_t>(g - 1)];
      if (variant(before) == variant(group) && before.heads.size() == group.heads.size()) {
        bands.back().end = g + 1;
        continue;
      }
    }
    bands.push_back({g, g + 1});
  }
  return bands;
}

/// Head groups for which it pays take their queries in patches, the others as they lie.
template <class T>
void attend_by_patches(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                       const Where& where, const Mask& mask, const Work& work) {
  const std::vector<HeadGroup> groups = head_groups(where, mask);
  const auto first_of = groups.begin();
  bool any = false;
  std::vector<Range> lying;  // bands, neighbours joined
  for (const Range band : bands_of(where, mask, groups)) {
    const HeadGroup& first = groups[static_cast<std::size_t>(band.begin)];
    const auto patches = patches_of(where, mask, where.query_heads.begin + first.heads.begin,
                                    first.heads.size(), kernel_of<T>(work));
    if (!patches) {
      append(lying, 0, band);
      continue;
    }
    any = true;
    attend_patches(q, k, v, out, where, mask, work, *patches,
                   {first_of + band.begin, first_of + band.end});
  }
  if (!any) return attend_by_readers(q, k, v, out, where, mask, work);
  for (const Range band : lying) {
    const HeadGroup& first = groups[static_cast<std::size_t>(band.begin)];
    const HeadGroup& last = groups[static_cast<std::size_t>(band.end - 1)];
    const Range heads{first.heads.begin, last.heads.end};
    const Range key_heads{first.key_head, last.key_head + 1};
    const Range value_heads{first.value_head, last.value_head + 1};
    attend_by_readers(q.only(heads), k.only(key_heads), v.only(value_heads), out.only(heads),
                      only_heads(where, heads, key_heads, value_heads), mask, work);
  }
}

/// The residues of a mask that has a step, one by one.
template <class T>
void attend_by_residues(View<const T> q, View<const T> k, View<const T> v, View<float> out,
                        const Where& where, const Mask& mask, const Work& work) {
  check_attend(q, k, v, where, work);
  CHECK(out.rows == q.rows && out.heads == q.heads && out.dim == record_length(where.shape.d_v),
        out.rows, out.heads, out.dim);
  if (q.size() == 0 || k.rows == 0) return;
  if (steps_differ(where, mask)) {
    for (const HeadGroup& group : head_groups(where, mask)) {
      attend_by_residues(q.only(group.heads), k.only({group.key_head, group.key_head + 1}),
                         v.only({group.value_head, group.value_head + 1}), out.only(group.heads),
                         group_in_order(where, group, {}), mask, work);
    }
    return;
  }
  if (const auto masks = apart(where, mask); !masks.empty()) {
    for (const MaskPtr& one : masks) attend_by_residues(q, k, v, out, where, *one, work);
    return;
  }
  const std::vector<Residue> residues = residues_of(where, mask);
  if (residues.empty()) return attend_by_patches(q, k, v, out, where, mask, work);
  for (const Residue& r : residues) {
    attend_by_patches(r.queries.of(q), r.keys.of(k), r.keys.of(v), r.queries.of(out), r.where, mask,
                      work);
  }
}

}  // namespace

void attend(View<const float> q, View<const float> k, View<const float> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work) {
  attend_by_residues(q, k, v, out, where, mask, work);
}

void attend(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v, View<float> out,
            const Where& where, const Mask& mask, const Work& work) {
  attend_by_residues(q, k, v, out, where, mask, work);
}

}  // namespace dattn
