#pragma once

#include <map>
#include <tuple>
#include <vector>

#include "parallel/schedule.hpp"

namespace dattn {

/// What several pieces of a Schedule that are computed on one host need of a rank elsewhere, or
/// have for it: some heads of its queries' side or its keys'. It passes between that rank and the
/// host once; one of the ranks there, the courier, fetches it and passes it on, and sums up what
/// goes back.
struct Parcel {
  int owner = 0;
  int half = 0;                      ///< 0: of queries; 1: of keys
  int host = 0;                      ///< of the readers
  Range heads;                       ///< query heads
  Ranges rows;                       ///< all that some reader needs
  std::vector<std::size_t> readers;  ///< numbers of pieces, ascending
  int courier = 0;
  Index fetched = 0;  ///< when it is posted, by the clock of the Schedule
  Index asked = 0;    ///< when the last reader has asked for it
  Index added = 0;    ///< when what goes back is there and added up

  auto key() const { return std::tie(owner, half, host, heads.begin); }
};

/// Part of the heads of a piece's half, and its parcel; none where it passes straight.
struct Cut {
  Range heads;
  const Parcel* parcel = nullptr;
};

/// The Parcels that a rank has to do with: of its own rows, and of its host. None where the Problem
/// does not relay.
class Parcels {
 public:
  Parcels(const Problem& problem, const Schedule& schedule, Pass pass, int rank);

  const std::vector<Parcel>& all() const { return all_; }
  /// The heads of a half of the piece, cut by parcels.
  std::vector<Cut> cuts(std::size_t number, int half) const;

 private:
  using Key = std::tuple<int, int, int>;  ///< owner, half, host

  void make(const Key& key, std::vector<std::size_t> numbers);

  const Problem& problem_;
  const Schedule& schedule_;
  const Pass pass_;
  std::vector<Parcel> all_;
  std::map<std::pair<std::size_t, int>, std::vector<std::size_t>> of_;  ///< by piece and half
};

}  // namespace dattn
