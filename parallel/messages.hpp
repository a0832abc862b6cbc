#pragma once

#include <boost/container/small_vector.hpp>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

namespace dattn {

/// A Send or a Recv that a rehearsal has come to.
struct Message {
  int rank = 0;
  int step = 0;
  bool is_send = false;
  double posted = 0;
  bool done = false;
  double finished = 0;
};

/// The messages of a rehearsal that somebody may still wait for. The k-th send from one rank to
/// another meets the k-th receive.
class Messages {
 public:
  struct Pair {
    int sent, received;
  };

  /// Its number, until it is forgotten.
  int post(const Message& message);
  Message& at(int number) { return all_[static_cast<std::size_t>(number)]; }
  void forget(int number) { free_.push_back(number); }

  /// What message `number` of the channel from rank `from` to rank `to` meets there: the oldest of
  /// the other side; if there is none, it waits.
  std::optional<Pair> meet(int from, int to, int number);
  /// Of those that wait for a partner the one of the lowest rank and step; null if none waits.
  const Message* first_alone() const;

 private:
  /// All of one channel that wait are sends, or all are receives.
  using Channel = boost::container::small_vector<int, 4>;

  std::vector<Message> all_;
  std::vector<int> free_;
  std::unordered_map<std::uint64_t, Channel> waiting_;  ///< by both ranks
};

}  // namespace dattn
