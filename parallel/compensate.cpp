#include "parallel/compensate.hpp"

#include <algorithm>
#include <span>

#include "kernels/check.hpp"
#include "kernels/pseudo_key.hpp"
#include "parallel/envelope.hpp"
#include "parallel/plan.hpp"

namespace dattn {
namespace {

void add_doubles(const std::byte* in, std::byte* inout, std::int64_t records,
                 std::int64_t record_bytes) {
  const auto* from = reinterpret_cast<const double*>(in);
  auto* into = reinterpret_cast<double*>(inout);
  const auto count = records * record_bytes / static_cast<std::int64_t>(sizeof(double));
  for (std::int64_t i = 0; i < count; ++i) into[i] += from[i];
}

}  // namespace

template <comm::Transport T>
Compensation<T>::Compensation(const Problem& problem, int rank, bool verifies)
    : problem_(problem),
      rank_(rank),
      verifies_(verifies),
      length_(static_cast<std::size_t>(problem.shape().d_qk + problem.shape().d_v)),
      all_(pseudo_keys(problem)) {
  for (const PseudoKey& one : all_) counts_.push_back(one.count);
  if (all_.empty()) return;
  sums_.resize(problem.dropped().size() * length_);
  if (problem.type() == Type::f8) {
    doubles_.resize(all_.size() * length_);
  } else {
    floats_.resize(all_.size() * length_);
  }
}

template <comm::Transport T>
template <class Sum>
std::vector<Sum>& Compensation<T>::numbers() {
  if constexpr (std::is_same_v<Sum, double>) {
    return doubles_;
  } else {
    return floats_;
  }
}

template <comm::Transport T>
template <class E>
void Compensation<T>::sum(View<const E> k, View<const E> v, int threads) {
  if (all_.empty()) return;
  const Shape& shape = problem_.shape();
  const Range own = problem_.keys().rows(rank_);
  CHECK(k.rows == own.size() && k.heads == shape.key_heads && k.dim == shape.d_qk, k.rows, k.heads,
        k.dim);
  CHECK(v.rows == own.size() && v.heads == shape.value_heads && v.dim == shape.d_v, v.rows, v.heads,
        v.dim);
  std::fill(sums_.begin(), sums_.end(), 0.0);
  const std::vector<Dropped>& all = problem_.dropped();
  // Each thread has some entries and all their rows: the order in which numbers are added does not
  // depend on the threads.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index part = 0; part < threads; ++part) {
    const Range mine = even_part(std::ssize(all), threads, part);
    std::vector<Index> key_heads;
    std::vector<Index> value_heads;
    for (Index from = mine.begin, to = from; from < mine.end; from = to) {
      key_heads.clear();
      value_heads.clear();
      const Ranges& keys = all[static_cast<std::size_t>(from)].keys;
      for (; to < mine.end && all[static_cast<std::size_t>(to)].keys == keys; ++to) {
        key_heads.push_back(all[static_cast<std::size_t>(to)].key_head);
        value_heads.push_back(all[static_cast<std::size_t>(to)].value_head);
      }
      Ranges rows = problem_.keys().rows_at(rank_, keys);
      for (Range& r : rows) r = {r.begin - own.begin, r.end - own.begin};
      const auto stride = static_cast<Index>(length_);
      double* sums = sums_.data() + from * stride;
      add_rows(k, key_heads, rows, sums, stride);
      add_rows(v, value_heads, rows, sums + shape.d_qk, stride);
    }
  }
}

template <comm::Transport T>
template <class E>
typename Compensation<T>::Sent Compensation<T>::start(T& transport) {
  using Sum = SumOf<E>;
  Sent sent;
  if (all_.empty()) return sent;
  const bool by_rank = problem_.compensate() == Compensate::rank;
  const auto bytes = static_cast<std::int64_t>(length_ * sizeof(double));
  if (!by_rank && transport.size() > 1) {
    if (!all_reduce_) {
      all_reduce_.emplace(transport, all_ranks(transport.size()), problem_.hosts(), verifies_);
    }
    const auto summed = (*all_reduce_)(std::as_writable_bytes(std::span(sums_)), bytes,
                                       comm::operation<add_doubles>());
    sent = {summed.bytes, summed.between_hosts, 1, summed.envelopes};
  }
  std::vector<Sum>& means = numbers<Sum>();
  std::vector<comm::Strips> strips(static_cast<std::size_t>(transport.size()));  // by owner
  for (std::size_t n = 0; n < all_.size(); ++n) {
    const PseudoKey& one = all_[n];
    const std::span<Sum> mean = std::span(means).subspan(n * length_, length_);
    if (by_rank) {
      const auto memory = std::as_writable_bytes(mean);
      strips[static_cast<std::size_t>(one.rank)].push_back(
          {memory.data(), 1, std::ssize(memory), 0});
      if (one.rank != rank_) continue;
    }
    for (std::size_t i = 0; i < length_; ++i) {
      mean[i] = static_cast<Sum>(sums_[one.dropped * length_ + i] / static_cast<double>(one.count));
    }
  }
  if (!by_rank) return sent;
  messages_.emplace(transport, "means", verifies_);
  for (int peer = 0; peer < transport.size(); ++peer) {
    if (peer == rank_) continue;
    const comm::Strips& theirs = strips[static_cast<std::size_t>(peer)];
    const comm::Strips& mine = strips[static_cast<std::size_t>(rank_)];
    if (!theirs.empty()) messages_->recv(theirs, peer);
    if (mine.empty()) continue;
    messages_->send(comm::read_only(mine), peer);
    sent.bytes += comm::total(mine);
    if (!problem_.hosts().together(peer, rank_)) sent.between_hosts += comm::total(mine);
    ++sent.messages;
  }
  sent.envelopes = messages_->envelopes();
  return sent;
}

template <comm::Transport T>
void Compensation<T>::wait(T& transport) {
  if (messages_) messages_->wait();
  messages_.reset();
  if (!verifies_ || transport.size() == 1) return;
  // Whatever type the numbers have: the others are none.
  require_same_bytes(transport, rank_,
                     floats_.empty() ? std::as_bytes(std::span<const double>(doubles_))
                                     : std::as_bytes(std::span<const float>(floats_)));
}

template <comm::Transport T>
template <class E>
void Compensation<T>::merge(View<const E> q, View<SumOf<E>> out, const Score& score, int threads) {
  using Sum = SumOf<E>;
  const Shape& shape = problem_.shape();
  const std::vector<Sum>& means = numbers<Sum>();
  for (std::size_t from = 0, to = 0; from < all_.size(); from = to) {
    while (to < all_.size() && all_[to].dropped == all_[from].dropped) ++to;
    const Dropped& entry = problem_.dropped()[all_[from].dropped];
    const Sum* data = means.data() + from * length_;
    const auto rows = static_cast<Index>(to - from);
    const auto stride = static_cast<Index>(length_);
    const PseudoKeys<Sum> pseudo{{data, rows, 1, shape.d_qk, stride},
                                 {data + shape.d_qk, rows, 1, shape.d_v, stride},
                                 std::span(counts_).subspan(from, to - from)};
    attend_pseudo_keys(q.only(entry.query_heads), pseudo, out.only(entry.query_heads), score,
                       threads);
  }
}

#define DATTN_FOR(T, E)                                                  \
  template void Compensation<T>::sum(View<const E>, View<const E>, int); \
  template Compensation<T>::Sent Compensation<T>::start<E>(T&);          \
  template void Compensation<T>::merge(View<const E>, View<SumOf<E>>, const Score&, int);
#define DATTN_COMPENSATION(T)     \
  template class Compensation<T>; \
  DATTN_FOR(T, float)             \
  DATTN_FOR(T, double)            \
  DATTN_FOR(T, BFloat16)
DATTN_COMPENSATION(comm::Communicator)
DATTN_COMPENSATION(comm::Windows)
DATTN_COMPENSATION(comm::Loopback::Endpoint)
#undef DATTN_COMPENSATION
#undef DATTN_FOR

}  // namespace dattn
