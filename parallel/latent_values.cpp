#include "parallel/latent_values.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/check.hpp"
#include "kernels/latent/product.hpp"
#include "kernels/partial.hpp"

namespace dattn {

ValuesBytes values_bytes(const LatentSizes& sizes, Index rows, int ranks, Type weight_type,
                         Values where) {
  const bool after = where == Values::after;
  const Index numbers = record_length(after ? sizes.kv_rank : sizes.d_v);
  return {(ranks - 1) * rows * sizes.heads * numbers * bytes_of(Type::f4),
          (after ? 1 : ranks) * sizes.heads * sizes.kv_rank * sizes.d_v * bytes_of(weight_type)};
}

Values fewer_bytes(const LatentSizes& sizes, Index rows, int ranks, Type weight_type) {
  const auto bytes = [&](Values where) {
    return values_bytes(sizes, rows, ranks, weight_type, where).sum();
  };
  return bytes(Values::before) < bytes(Values::after) ? Values::before : Values::after;
}

PartialValues::PartialValues(const LatentSizes& sizes, const MakeWeights& weights,
                             std::vector<Range> parts, Type weight_type)
    : sizes_(sizes), parts_(std::move(parts)) {
  if (weight_type == Type::bf16) up_v_ = std::vector<BFloat16>{};
  const auto count = static_cast<std::size_t>(sizes.heads * sizes.kv_rank * sizes.d_v);
  std::visit([&](auto& all) { all.reserve(count); }, up_v_);
  Index heads = 0;
  for (const Range part : parts_) {
    if (part.empty()) continue;
    CHECK(part.begin == heads, part.begin, heads);
    heads = part.end;
    const LatentWeights made = weights(part);
    std::visit(
        [&]<class E>(std::vector<E>& all) {
          for (const float x : made.up_v) all.push_back(E(x));
        },
        up_v_);
  }
  CHECK(heads == sizes.heads, heads, sizes.heads);
}

/// Partials of values [rows, all heads, d_v + 2]: with the LSE for a maximum the weights of a
/// record sum to 1.
std::vector<float> PartialValues::records(View<const float> o, std::span<const float> lse,
                                          const Work& work) const {
  const Index heads = sizes_.heads;
  const Index d_v = sizes_.d_v;
  CHECK(o.heads == heads && o.dim == sizes_.kv_rank, o.heads, o.dim);
  std::vector<float> values(static_cast<std::size_t>(o.rows * heads * d_v));
  std::vector<Product> products;
  for (Index h = 0; h < heads; ++h) {
    const Factor up = std::visit(
        [&](const auto& all) { return Factor(all.data() + h * sizes_.kv_rank * d_v); }, up_v_);
    products.push_back({.a = o.at(0, h),
                        .a_stride = o.row_stride(),
                        .b = up,
                        .b_stride = d_v,
                        .c = values.data() + h * d_v,
                        .c_stride = heads * d_v,
                        .rows = o.rows,
                        .columns = d_v,
                        .inner = sizes_.kv_rank});
  }
  multiply(products, work);
  std::vector<float> all(lse.size() * static_cast<std::size_t>(record_length(d_v)));
  float* to = all.data();
  const float* from = values.data();
  for (const float m : lse) {
    *to++ = m;
    *to++ = std::isinf(m) ? 0.0F : 1.0F;  // over no key: nothing
    to = std::copy_n(from, d_v, to);
    from += d_v;
  }
  return all;
}

template <comm::Transport T>
HandOver PartialValues::merge(T& transport, const Hosts& hosts, View<const float> o,
                              std::span<const float> lse, std::vector<float>& values,
                              std::vector<float>& merged, const Work& work, bool verifies) const {
  const std::vector<float> mine = records(o, lse, work);
  const Index length = record_length(sizes_.d_v);
  const auto bytes = [&](Index records) {
    return records * length * static_cast<Index>(sizeof(float));
  };
  const auto ranks = static_cast<std::size_t>(transport.size());
  const Range own = parts_[static_cast<std::size_t>(transport.rank())];
  const Index records = o.rows * own.size();
  const std::span<const std::byte> sent = std::as_bytes(std::span(mine));
  std::vector<float> arrived(ranks * static_cast<std::size_t>(records * length));
  const std::span<std::byte> received = std::as_writable_bytes(std::span(arrived));
  std::vector<comm::ConstStrips> to(ranks);
  std::vector<comm::Strips> from(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    const Range theirs = parts_[r];
    to[r] = {
        {sent.data() + bytes(theirs.begin), o.rows, bytes(theirs.size()), bytes(sizes_.heads)}};
    from[r] = {{received.data() + static_cast<Index>(r) * bytes(records), 1, bytes(records),
                bytes(records)}};
  }
  const HandOver done = exchange(transport, to, from, hosts,
                                 SealedMessages<T>(transport, "Partials of values", verifies));
  for (std::size_t r = 1; r < ranks; ++r) {
    dattn::merge(arrived.data() + static_cast<Index>(r) * records * length, arrived.data(), records,
                 length);
  }
  values.resize(static_cast<std::size_t>(records * sizes_.d_v));
  merged.resize(static_cast<std::size_t>(records));
  finish(View<const float>{arrived.data(), o.rows, own.size(), length}, std::span(values),
         std::span(merged));
  return done;
}

template HandOver PartialValues::merge(comm::Communicator&, const Hosts&, View<const float>,
                                       std::span<const float>, std::vector<float>&,
                                       std::vector<float>&, const Work&, bool) const;
template HandOver PartialValues::merge(comm::Loopback::Endpoint&, const Hosts&, View<const float>,
                                       std::span<const float>, std::vector<float>&,
                                       std::vector<float>&, const Work&, bool) const;

}  // namespace dattn
