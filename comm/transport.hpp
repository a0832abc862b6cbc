#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "comm/communicator.hpp"
#include "comm/loopback.hpp"
#include "comm/operation.hpp"
#include "comm/strip.hpp"
#include "comm/windows.hpp"

namespace dattn::comm {

/// A message in flight, as Request: default-constructed is done, the destructor waits.
template <class R>
concept Message = std::movable<R> && std::default_initializable<R> &&
    requires(R message, const R shown) {
  { message.test() } -> std::same_as<bool>;
  { message.wait() } -> std::same_as<void>;
  { shown.describe() } -> std::convertible_to<std::string>;
};

/// What the engine needs to move bytes: each rank's end of a group. The k-th send from a to b meets
/// the k-th receive of the same tag, 0 where none is said; posting never blocks; all_reduce, split
/// and barrier are collective.
template <class T>
concept Transport = std::movable<T> && Message<typename T::Request> &&
    requires(T end, const T shown, const ConstStrips& from, const Strips& into,
             std::span<std::byte> records, std::int64_t record_bytes, const Operation& operation) {
  { shown.rank() } -> std::convertible_to<int>;
  { shown.size() } -> std::convertible_to<int>;
  { end.send(from, 0) } -> std::same_as<typename T::Request>;
  { end.send(into, 0) } -> std::same_as<typename T::Request>;
  { end.recv(into, 0) } -> std::same_as<typename T::Request>;
  { end.send(from, 0, 1) } -> std::same_as<typename T::Request>;
  { end.recv(into, 0, 1) } -> std::same_as<typename T::Request>;
  { end.split(0, 0) } -> std::same_as<T>;
  end.all_reduce(records, record_bytes, operation);
  end.barrier();
  end.poll();
};

/// A Transport in which some ranks see each other's memory, so that bytes need not move: see
/// Windows.
template <class T>
concept Lending = Transport<T> && requires(T end, const T shown, const ConstStrips& from,
                                           const Strips& into, const typename T::Request message) {
  { shown.shares(0) } -> std::same_as<bool>;
  { end.allocate(std::int64_t{0}) } -> std::same_as<Memory>;
  { end.lend(from, 0) } -> std::same_as<typename T::Request>;
  { end.borrow(into, 0, std::int64_t{0}) } -> std::same_as<typename T::Request>;
  { message.view() } -> std::convertible_to<std::optional<ConstStrip>>;
  end.give_back();
};

static_assert(Transport<Communicator>);
static_assert(Transport<Loopback::Endpoint>);
static_assert(Lending<Windows>);

}  // namespace dattn::comm
