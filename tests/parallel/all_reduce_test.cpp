// Sums over threads that are said to share hosts: right, of the same bits on all ranks whenever
// messages come, and those of the order that Reduction promises.
#include "parallel/all_reduce.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "comm/digest.hpp"
#include "parallel/mesh.hpp"
#include "parallel/sums.hpp"
#include "tests/parallel/on_all_ranks.hpp"

namespace dattn::testing {
namespace {

constexpr Index kNumbers = 5;  ///< of a record: m, l and three of O

/// Partials of a rank, some over no key.
std::vector<float> partials(int rank, Index records) {
  std::vector<float> all(static_cast<std::size_t>(records * kNumbers));
  for (Index r = 0; r < records; ++r) {
    float* one = &all[static_cast<std::size_t>(r * kNumbers)];
    const bool none = (rank + r) % 4 == 0;
    one[0] = none ? -std::numeric_limits<float>::infinity()
                  : std::sin(static_cast<float>(rank * 31 + r * 7)) * 9;
    one[1] = none ? 0 : 1 + std::abs(std::cos(static_cast<float>(rank + r)));
    for (Index d = 2; d < kNumbers; ++d) {
      one[d] = none ? 0 : std::cos(static_cast<float>(rank * 17 + r * 3 + d));
    }
  }
  return all;
}

/// The sum of all ranks' in the order of hosts, on each in the order of ranks.
std::vector<float> in_order(const std::vector<std::vector<float>>& all, const Hosts& hosts,
                            const comm::Operation& rule, Index record_bytes, Index records) {
  const auto fold = [&](std::vector<std::vector<float>> some) {
    for (std::size_t i = some.size() - 1; i-- > 0;) {
      rule.combine(std::as_bytes(std::span(some[i])).data(),
                   std::as_writable_bytes(std::span(some.back())).data(), records, record_bytes);
    }
    return some.back();
  };
  if (hosts.count() == 1) return fold(all);
  std::vector<std::vector<float>> by_host;
  for (int host = 0; host < hosts.count(); ++host) {
    std::vector<std::vector<float>> there;
    for (const int rank : hosts.ranks(host)) there.push_back(all[static_cast<std::size_t>(rank)]);
    by_host.push_back(fold(std::move(there)));
  }
  return fold(std::move(by_host));
}

TEST(AllReduceOnHosts, HasTheBitsOfItsOrderOnAllRanks) {
  const std::pair<const char*, int> layouts[] = {{"2x2", 4},       {"4x1", 4}, {"2+1+3", 6},
                                                 {"0,1,1,0,2", 5}, {"1+6", 7}, {"2x4", 8}};
  const Index record = kNumbers * static_cast<Index>(sizeof(float));
  const comm::Operation rule = sum_rule(Kind::O, Type::f4);
  for (const auto& [words, ranks] : layouts) {
    const Hosts hosts = parse_hosts(words, ranks);
    for (const Index records : {Index{1}, Index{7}, Index{64}}) {
      std::vector<std::vector<float>> all;
      for (int r = 0; r < ranks; ++r) all.push_back(partials(r, records));
      const std::vector<float> want = in_order(all, hosts, rule, record, records);
      for (const Mode mode : {Mode{"delayed", false, 7}, Mode{"rendezvous", true, 3}}) {
        on_all_ranks(ranks, mode, 5, [&](comm::Loopback::Endpoint& end) {
          AllReduce<comm::Loopback::Endpoint> all_reduce(end, all_ranks(ranks), hosts);
          for (int turn = 0; turn < 2; ++turn) {  // a channel is used again
            std::vector<float> own = all[static_cast<std::size_t>(end.rank())];
            const auto sent = all_reduce(std::as_writable_bytes(std::span(own)), record, rule);
            EXPECT_EQ(std::memcmp(own.data(), want.data(), want.size() * sizeof(float)), 0)
                << words << ", " << records << " records, rank " << end.rank();
            EXPECT_LE(sent.between_hosts, sent.bytes);
          }
        });
      }
    }
  }
}

// One that verifies has the same bits, on one host those of the order of ranks, and as many bytes
// in all; an envelope goes with each message.
TEST(AllReduceThatVerifies, HasTheSameBits) {
  if (!comm::has_digest()) GTEST_SKIP() << "this build has no xxHash";
  const Index record = kNumbers * static_cast<Index>(sizeof(float));
  const comm::Operation rule = sum_rule(Kind::O, Type::f4);
  for (const auto& [words, ranks] :
       {std::pair{"1", 2}, std::pair{"1", 5}, std::pair{"0,1,1,0,2", 5}}) {
    const Hosts hosts = parse_hosts(words, ranks);
    for (const Index records : {Index{3}, Index{64}}) {
      std::vector<std::vector<float>> all;
      for (int r = 0; r < ranks; ++r) all.push_back(partials(r, records));
      const std::vector<float> want = in_order(all, hosts, rule, record, records);
      std::vector<Index> bytes(static_cast<std::size_t>(ranks));
      on_all_ranks(ranks, {"rendezvous", true, 3}, 5, [&](comm::Loopback::Endpoint& end) {
        AllReduce<comm::Loopback::Endpoint> all_reduce(end, all_ranks(ranks), hosts, true);
        for (int turn = 0; turn < 2; ++turn) {
          std::vector<float> own = all[static_cast<std::size_t>(end.rank())];
          const auto sent = all_reduce(std::as_writable_bytes(std::span(own)), record, rule);
          EXPECT_EQ(std::memcmp(own.data(), want.data(), want.size() * sizeof(float)), 0)
              << words << ", " << records << " records, rank " << end.rank();
          EXPECT_GT(sent.envelopes, 0);
          bytes[static_cast<std::size_t>(end.rank())] = sent.bytes;
        }
      });
      EXPECT_EQ(std::accumulate(bytes.begin(), bytes.end(), Index{0}),
                2 * (ranks - 1) * records * record);
    }
  }
}

// Rows and columns of a mesh, some on one host, some across: each has its own sum.
TEST(AllReduceOnHosts, KeepsGroupsApart) {
  const Hosts hosts = parse_hosts("3+1+2", 6);
  const Mesh mesh{{{"rows", 2}, {"columns", 3}}};
  on_all_ranks(6, {"delayed", false, 5}, 9, [&](comm::Loopback::Endpoint& end) {
    std::vector<AllReduce<comm::Loopback::Endpoint>> axes;
    for (int axis = 0; axis < 2; ++axis) {
      axes.emplace_back(end, mesh.group(end.rank(), axis), hosts);
    }
    for (int axis = 0; axis < 2; ++axis) {
      std::vector<float> numbers(11, static_cast<float>(1 << end.rank()));
      axes[static_cast<std::size_t>(axis)](std::as_writable_bytes(std::span(numbers)),
                                           sizeof(float), sum_rule(Kind::dQ, Type::f4));
      float sum = 0;
      for (const int member : mesh.group(end.rank(), axis)) {
        sum += static_cast<float>(1 << member);
      }
      for (const float one : numbers) EXPECT_EQ(one, sum) << axis;
    }
  });
}

}  // namespace
}  // namespace dattn::testing
