#pragma once

#include <chrono>
#include <cstdint>
#include <span>

#include "comm/transport.hpp"
#include "kernels/latent/weights.hpp"
#include "parallel/latent_decoder.hpp"
#include "parallel/sealed.hpp"

namespace dattn {

// What the decoders of latent attention share.

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Numbers in [-1, 1) that depend on `seed`, cheaply.
template <class E>
void draw_numbers(E* to, Index count, std::uint64_t seed) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ULL + 1;
  for (Index i = 0; i < count; ++i) {
    x = x * 6364136223846793005ULL + 1442695040888963407ULL;  // Knuth's MMIX generator
    to[i] = E(static_cast<float>(static_cast<std::int64_t>(x) >> 40) * 0x1p-23F);
  }
}

/// Weights as a layer keeps them.
inline StoredWeights stored(LatentWeights weights, Type type) {
  if (type == Type::bf16) return narrowed(std::move(weights));
  return weights;
}

inline void add_floats(const std::byte* in, std::byte* inout, std::int64_t records,
                       std::int64_t record_bytes) {
  const auto* from = reinterpret_cast<const float*>(in);
  auto* into = reinterpret_cast<float*>(inout);
  const auto count = records * record_bytes / static_cast<std::int64_t>(sizeof(float));
  for (std::int64_t i = 0; i < count; ++i) into[i] += from[i];
}

/// One message from each rank to each: to[r] are the bytes for rank r, from[r] where those of rank
/// r go; both ends of an empty one leave it out. Ranks are on `hosts`. What a rank has for itself
/// is copied. `messages` are fresh ones over the transport. Collective.
template <comm::Transport T>
HandOver exchange(T& transport, const std::vector<comm::ConstStrips>& to,
                  const std::vector<comm::Strips>& from, const Hosts& hosts,
                  SealedMessages<T> messages) {
  HandOver done;
  const double start = seconds_now();
  const int ranks = transport.size();
  const int rank = transport.rank();
  for (int i = 1; i < ranks; ++i) {  // everybody starts with another peer
    const auto peer = static_cast<std::size_t>((rank + ranks - i) % ranks);
    if (comm::total(from[peer]) == 0) continue;
    messages.recv(from[peer], static_cast<int>(peer));
  }
  for (int i = 1; i < ranks; ++i) {
    const auto peer = static_cast<std::size_t>((rank + i) % ranks);
    const Index bytes = comm::total(to[peer]);
    if (bytes == 0) continue;
    messages.send(to[peer], static_cast<int>(peer));
    done.bytes_sent += bytes;
    if (!hosts.together(rank, static_cast<int>(peer))) done.between_hosts += bytes;
    ++done.messages;
  }
  const auto own = static_cast<std::size_t>(rank);
  std::vector<std::byte> kept(static_cast<std::size_t>(comm::total(to[own])));
  comm::pack(to[own], kept);
  comm::unpack(kept, from[own]);
  messages.wait();
  done.envelopes = messages.envelopes();
  done.seconds = seconds_now() - start;
  return done;
}

/// Collective: rank r of a group has the columns parts[r] of `all` [rows, 1, columns], and gets the
/// others. `what` they are, as complaints say it.
template <comm::Transport T>
void gather_columns(AllReduce<T>& group, View<float> all, std::span<const Range> parts,
                    LatentTimes& times, const char* what) {
  T& transport = group.transport();
  if (transport.size() == 1 || all.rows == 0) return;
  const auto strips = [&](Range part) -> comm::Strips {
    const auto number = static_cast<Index>(sizeof(float));
    return {{reinterpret_cast<std::byte*>(all.data + part.begin), all.rows, part.size() * number,
             all.row_stride() * number}};
  };
  const auto own = static_cast<std::size_t>(transport.rank());
  std::vector<comm::ConstStrips> to(parts.size(), comm::read_only(strips(parts[own])));
  std::vector<comm::Strips> from(parts.size());
  for (std::size_t r = 0; r < parts.size(); ++r) from[r] = strips(parts[r]);
  to[own] = {};
  from[own] = {};
  const HandOver done =
      exchange(transport, to, from, group.hosts(),
               SealedMessages<T>(transport, what, group.verifies(), group.group()));
  times.gather += done.seconds;
  times.bytes_sent += done.bytes_sent;
  times.between_hosts += done.between_hosts;
  times.messages += done.messages;
  times.envelopes += done.envelopes;
}

/// Collective: numbers <- their sum over a group. Counts bytes and the message; gives seconds.
template <comm::Transport T>
double add_up(AllReduce<T>& all_reduce, std::span<float> numbers, LatentTimes& times) {
  if (all_reduce.ranks() == 1) return 0;
  const double start = seconds_now();
  const auto sent =
      all_reduce(std::as_writable_bytes(numbers), sizeof(float), comm::operation<add_floats>());
  times.bytes_sent += sent.bytes;
  times.between_hosts += sent.between_hosts;
  times.envelopes += sent.envelopes;
  ++times.messages;
  return seconds_now() - start;
}

}  // namespace dattn
