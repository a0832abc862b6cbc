#include "comm/strip.hpp"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace dattn::comm {
namespace {

template <class S>
std::int64_t bytes_of(const S& strip) {
  std::int64_t bytes = 0;
  if (strip.count < 0 || strip.length < 0 || (strip.count > 1 && strip.stride < strip.length) ||
      __builtin_mul_overflow(strip.count, strip.length, &bytes) ||
      (bytes > 0 && strip.data == nullptr)) {
    throw std::invalid_argument(fmt::format("strip of {} pieces of {} bytes every {} bytes at {}",
                                            strip.count, strip.length, strip.stride,
                                            static_cast<const void*>(strip.data)));
  }
  return bytes;
}

template <class S>
std::int64_t total_of(const std::vector<S>& strips) {
  std::int64_t sum = 0;
  for (const S& strip : strips) {
    if (__builtin_add_overflow(sum, bytes_of(strip), &sum)) {
      throw std::invalid_argument("strips of more than 2^63 bytes");
    }
  }
  return sum;
}

template <class S>
void append(std::vector<S>& out, S strip) {
  if (strip.count <= 0 || strip.length <= 0) return;
  if (strip.count == 1 || strip.stride == strip.length) {
    strip.length *= strip.count;
    strip.stride = strip.length;
    strip.count = 1;
    if (!out.empty() && out.back().count == 1 &&
        out.back().data + out.back().length == strip.data) {
      out.back().length += strip.length;
      out.back().stride = out.back().length;
      return;
    }
  }
  out.push_back(strip);
}

/// Appends bytes [begin, end) of one strip: the end of a piece, whole pieces, the start of a piece.
template <class S>
void append_cut(std::vector<S>& out, const S& strip, std::int64_t begin, std::int64_t end) {
  const auto piece = [&](std::int64_t index) { return strip.data + index * strip.stride; };
  std::int64_t first = begin / strip.length;
  const std::int64_t head = begin % strip.length;
  if (head > 0) {
    const std::int64_t stop = std::min(strip.length, head + (end - begin));
    append(out, S{piece(first) + head, 1, stop - head, stop - head});
    begin += stop - head;
    ++first;
  }
  const std::int64_t whole = (end - begin) / strip.length;
  if (whole > 0) append(out, S{piece(first), whole, strip.length, strip.stride});
  const std::int64_t tail = end - begin - whole * strip.length;
  if (tail > 0) append(out, S{piece(first + whole), 1, tail, tail});
}

template <class S>
std::vector<S> cut_of(const std::vector<S>& strips, std::int64_t begin, std::int64_t end) {
  const std::int64_t all = total_of(strips);
  if (begin < 0 || begin > end || end > all) {
    throw std::invalid_argument(fmt::format("cut [{}, {}) of {} bytes", begin, end, all));
  }
  std::vector<S> out;
  std::int64_t at = 0;
  for (const S& strip : strips) {
    const std::int64_t bytes = bytes_of(strip);
    const std::int64_t from = std::clamp<std::int64_t>(begin - at, 0, bytes);
    const std::int64_t to = std::clamp<std::int64_t>(end - at, 0, bytes);
    if (from < to) append_cut(out, strip, from, to);
    at += bytes;
  }
  return out;
}

template <class S, class Move>
void for_each_piece(const std::vector<S>& strips, std::size_t size, Move move) {
  const std::int64_t all = total_of(strips);
  if (std::cmp_not_equal(all, size)) {
    throw std::invalid_argument(fmt::format("{} bytes for strips of {} bytes", size, all));
  }
  std::int64_t at = 0;
  for (const S& strip : strips) {
    if (strip.length == 0) continue;
    for (std::int64_t i = 0; i < strip.count; ++i, at += strip.length) {
      move(strip.data + i * strip.stride, at, static_cast<std::size_t>(strip.length));
    }
  }
}

}  // namespace

Strips strips_of(std::span<std::byte> bytes) {
  const std::int64_t size = std::ssize(bytes);
  return {Strip{bytes.data(), 1, size, size}};
}

ConstStrips strips_of(std::span<const std::byte> bytes) {
  const std::int64_t size = std::ssize(bytes);
  return {ConstStrip{bytes.data(), 1, size, size}};
}

ConstStrips read_only(const Strips& strips) { return {strips.begin(), strips.end()}; }

std::int64_t total(const Strips& strips) { return total_of(strips); }
std::int64_t total(const ConstStrips& strips) { return total_of(strips); }

Strips cut(const Strips& strips, std::int64_t begin, std::int64_t end) {
  return cut_of(strips, begin, end);
}
ConstStrips cut(const ConstStrips& strips, std::int64_t begin, std::int64_t end) {
  return cut_of(strips, begin, end);
}

void pack(const ConstStrips& from, std::span<std::byte> into) {
  for_each_piece(from, into.size(),
                 [&](const std::byte* piece, std::int64_t at, std::size_t length) {
                   std::memcpy(into.data() + at, piece, length);
                 });
}

void unpack(std::span<const std::byte> from, const Strips& into) {
  for_each_piece(into, from.size(), [&](std::byte* piece, std::int64_t at, std::size_t length) {
    std::memcpy(piece, from.data() + at, length);
  });
}

namespace {

void copy_all(const ConstStrips& from, const Strips& into) {
  auto strip = from.begin();
  std::int64_t index = 0;  // of a piece of *strip
  std::int64_t done = 0;   // bytes of that piece
  for (const Strip& to : into) {
    for (std::int64_t i = 0; to.length > 0 && i < to.count; ++i) {
      for (std::int64_t at = 0; at < to.length;) {
        while (strip->length == 0 || index == strip->count) {
          ++strip;
          index = 0;
        }
        const std::int64_t run = std::min(to.length - at, strip->length - done);
        std::memcpy(to.data + i * to.stride + at, strip->data + index * strip->stride + done,
                    static_cast<std::size_t>(run));
        at += run;
        done += run;
        if (done == strip->length) {
          done = 0;
          ++index;
        }
      }
    }
  }
}

}  // namespace

void copy(const ConstStrips& from, const Strips& into, int threads) {
  const std::int64_t all = total_of(into);
  if (total_of(from) != all) {
    throw std::invalid_argument(
        fmt::format("{} bytes for strips of {} bytes", total_of(from), all));
  }
  constexpr std::int64_t kWorthwhile = std::int64_t{1} << 20;  // of several threads
  // Messages are polled within parallel regions, too, whose other threads are busy.
  if (threads == 1 || all < kWorthwhile || omp_in_parallel() != 0) return copy_all(from, into);
  const auto edge = [&](int part) { return all / threads * part + all % threads * part / threads; };
  std::vector<std::pair<ConstStrips, Strips>> parts;
  for (int part = 0; part < threads; ++part) {
    parts.emplace_back(cut(from, edge(part), edge(part + 1)),
                       cut(into, edge(part), edge(part + 1)));
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (std::size_t part = 0; part < parts.size(); ++part) {
    copy_all(parts[part].first, parts[part].second);
  }
}

}  // namespace dattn::comm
