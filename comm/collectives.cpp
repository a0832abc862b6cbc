#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "comm/communicator.hpp"
#include "comm/error.hpp"
#include "comm/handles.hpp"

namespace dattn::comm {

static_assert(std::is_same_v<MpiFunction, MPI_User_function>, "comm/operation.hpp");

std::int64_t record_bytes_of(ompi_datatype_t* record) {
  int bytes = 0;
  MPI_Type_size(record, &bytes);
  return bytes;
}

// Collectives are non-blocking and polled, since a blocking one cannot be bounded.
void Communicator::Impl::finish(MPI_Request started, const char* verb, std::int64_t bytes,
                                std::shared_ptr<const void> kept) {
  auto made = std::make_unique<Request::Impl>();
  made->verb = verb;
  made->rank = rank;
  made->bytes = bytes;
  made->deadline = options.deadline;
  made->exceptions = std::uncaught_exceptions();
  made->progress = progress;
  made->outbox = outbox;
  made->sequence = collectives++;
  made->pieces.push_back({started, bytes});
  made->posted = 1;
  made->kept.push_back(std::move(kept));
  Request request(std::move(made));
  try {
    request.wait();
  } catch (...) {
    broken = true;
    throw;
  }
}

namespace {

/// Calls take(first record, records) for runs of at most `limit` bytes, one record at least.
template <class Take>
void in_runs(std::int64_t records, std::int64_t record_bytes, std::int64_t limit, Take take) {
  const std::int64_t most = std::max<std::int64_t>(1, limit / record_bytes);
  for (std::int64_t first = 0; first < records; first += most) {
    take(first, std::min(most, records - first));
  }
}

void check_records(std::size_t bytes, std::int64_t record_bytes, std::int64_t records) {
  std::int64_t expected = 0;
  if (record_bytes <= 0 || records < 0 ||
      __builtin_mul_overflow(records, record_bytes, &expected) ||
      std::cmp_not_equal(expected, bytes)) {
    throw std::invalid_argument(
        fmt::format("{} bytes for {} records of {} bytes", bytes, records, record_bytes));
  }
}

template <class T>
void reduce(Communicator::Impl& comm, std::span<T> values, MPI_Datatype type, MPI_Op op) {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Iallreduce(MPI_IN_PLACE, values.data(), to_int(std::ssize(values), "values"), type, op,
                       comm.handle, &request));
  comm.finish(request, "all_reduce", static_cast<std::int64_t>(values.size_bytes()));
}

}  // namespace

void Communicator::all_reduce(std::span<std::byte> records, std::int64_t record_bytes,
                              const Operation& operation) {
  const std::int64_t count = record_bytes > 0 ? std::ssize(records) / record_bytes : 0;
  check_records(records.size(), record_bytes, count);
  const Datatype record(record_bytes);
  const Op op(operation);
  in_runs(count, record_bytes, impl_->options.message_limit,
          [&](std::int64_t first, std::int64_t run) {
            MPI_Request request = MPI_REQUEST_NULL;
            check(MPI_Iallreduce(MPI_IN_PLACE, records.data() + first * record_bytes,
                                 to_int(run, "records"), record.get(), op.get(), impl_->handle,
                                 &request));
            impl_->finish(request, "all_reduce", run * record_bytes);
          });
}

void Communicator::reduce_scatter(std::span<const std::byte> in, std::span<std::byte> out,
                                  std::span<const std::int64_t> counts, std::int64_t record_bytes,
                                  const Operation& operation) {
  if (std::ssize(counts) != size() || std::ranges::any_of(counts, [](auto c) { return c < 0; })) {
    throw std::invalid_argument(fmt::format("{} counts for {} ranks", counts.size(), size()));
  }
  const std::int64_t all = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  check_records(in.size(), record_bytes, all);
  check_records(out.size(), record_bytes, counts[static_cast<std::size_t>(rank())]);
  const Datatype record(record_bytes);
  const Op op(operation);
  MPI_Request request = MPI_REQUEST_NULL;
  if (std::ssize(in) <= impl_->options.message_limit) {
    auto ints = std::make_shared<std::vector<int>>();
    for (const std::int64_t count : counts) ints->push_back(to_int(count, "records"));
    check(MPI_Ireduce_scatter(in.data(), out.data(), ints->data(), record.get(), op.get(),
                              impl_->handle, &request));
    impl_->finish(request, "reduce_scatter", std::ssize(in), ints);
    return;
  }
  // Too long for MPI's int counts: one rank's part after the other, in runs.
  std::int64_t before = 0;
  for (int root = 0; root < size(); ++root) {
    const std::int64_t count = counts[static_cast<std::size_t>(root)];
    in_runs(count, record_bytes, impl_->options.message_limit,
            [&](std::int64_t first, std::int64_t run) {
              std::byte* into = root == rank() ? out.data() + first * record_bytes : nullptr;
              check(MPI_Ireduce(in.data() + (before + first) * record_bytes, into,
                                to_int(run, "records"), record.get(), op.get(), root, impl_->handle,
                                &request));
              impl_->finish(request, "reduce_scatter", run * record_bytes);
            });
    before += count;
  }
}

void Communicator::barrier() {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Ibarrier(impl_->handle, &request));
  impl_->finish(request, "barrier", 0);
}

void Communicator::broadcast(std::span<std::byte> bytes, int root) {
  in_runs(std::ssize(bytes), 1, impl_->options.message_limit,
          [&](std::int64_t first, std::int64_t run) {
            MPI_Request request = MPI_REQUEST_NULL;
            check(MPI_Ibcast(bytes.data() + first, to_int(run, "bytes"), MPI_BYTE, root,
                             impl_->handle, &request));
            impl_->finish(request, "broadcast", run);
          });
}

void Communicator::broadcast(std::string& text, int root) {
  std::int64_t length = std::ssize(text);
  broadcast(std::as_writable_bytes(std::span(&length, 1)), root);
  text.resize(static_cast<std::size_t>(length));
  broadcast(std::as_writable_bytes(std::span(text)), root);
}

std::vector<std::string> Communicator::collect(std::string_view text, int root, bool everywhere) {
  const auto ranks = static_cast<std::size_t>(size());
  struct Buffers {
    std::string mine;
    std::int64_t length;
    std::vector<std::int64_t> lengths;
    std::vector<int> counts;
    std::vector<int> starts;
    std::string all;
  };
  auto kept = std::make_shared<Buffers>();
  Buffers& b = *kept;
  b.mine = text;
  b.length = std::ssize(text);
  b.lengths.resize(ranks);
  MPI_Request request = MPI_REQUEST_NULL;
  const char* verb = everywhere ? "all_gather" : "gather";
  check(everywhere ? MPI_Iallgather(&b.length, 1, MPI_INT64_T, b.lengths.data(), 1, MPI_INT64_T,
                                    impl_->handle, &request)
                   : MPI_Igather(&b.length, 1, MPI_INT64_T, b.lengths.data(), 1, MPI_INT64_T, root,
                                 impl_->handle, &request));
  impl_->finish(request, verb, sizeof b.length, kept);

  std::int64_t all = 0;
  for (const std::int64_t length : b.lengths) {
    b.starts.push_back(to_int(all, "gathered text"));
    b.counts.push_back(to_int(length, "gathered text"));
    all += length;
  }
  b.all.resize(static_cast<std::size_t>(to_int(all, "gathered text")));
  const int count = to_int(b.length, "gathered text");
  check(everywhere ? MPI_Iallgatherv(b.mine.data(), count, MPI_CHAR, b.all.data(), b.counts.data(),
                                     b.starts.data(), MPI_CHAR, impl_->handle, &request)
                   : MPI_Igatherv(b.mine.data(), count, MPI_CHAR, b.all.data(), b.counts.data(),
                                  b.starts.data(), MPI_CHAR, root, impl_->handle, &request));
  impl_->finish(request, verb, b.length, kept);

  std::vector<std::string> texts;
  if (!everywhere && rank() != root) return texts;
  for (std::size_t r = 0; r < ranks; ++r) {
    texts.push_back(
        b.all.substr(static_cast<std::size_t>(b.starts[r]), static_cast<std::size_t>(b.counts[r])));
  }
  return texts;
}

std::vector<std::string> Communicator::gather(std::string_view text, int root) {
  return collect(text, root, false);
}

std::vector<std::string> Communicator::all_gather(std::string_view text) {
  return collect(text, 0, true);
}

void Communicator::all_reduce_sum(std::span<double> values) {
  reduce(*impl_, values, MPI_DOUBLE, MPI_SUM);
}
void Communicator::all_reduce_min(std::span<double> values) {
  reduce(*impl_, values, MPI_DOUBLE, MPI_MIN);
}
void Communicator::all_reduce_max(std::span<double> values) {
  reduce(*impl_, values, MPI_DOUBLE, MPI_MAX);
}
void Communicator::all_reduce_sum(std::span<std::int64_t> values) {
  reduce(*impl_, values, MPI_INT64_T, MPI_SUM);
}
void Communicator::all_reduce_min(std::span<std::int64_t> values) {
  reduce(*impl_, values, MPI_INT64_T, MPI_MIN);
}
void Communicator::all_reduce_max(std::span<std::int64_t> values) {
  reduce(*impl_, values, MPI_INT64_T, MPI_MAX);
}

}  // namespace dattn::comm
