#include "parallel/pull.hpp"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "kernels/area.hpp"
#include "parallel/lent_homes.hpp"
#include "parallel/pull_clock.hpp"

namespace dattn {
namespace {

/// One rank's part.
class Pull : PullClock {
 public:
  Pull(Writer& me, Pass pass, const Side& side, const AttendBackward& mine, SlotId out)
      : PullClock(me.problem(), side),
        me_(me),
        pass_(pass),
        mine_(mine),
        out_(out),
        fetched_(static_cast<std::size_t>(ahead_) + 1, HomesInTurn(me)),
        given_{HomesInTurn(me), HomesInTurn(me)},
        returned_(me),
        relayed_inputs_(me, side.inputs),
        relayed_sums_(me, side.sums) {}

  void write() {
    do_own_stages();
    relay();
    serve_others();
    add_what_comes_back();
    for (OwnSend& send : own_sends_) place(std::move(send));
    std::sort(early_.begin(), early_.end(),
              [](const OwnSend& a, const OwnSend& b) { return a.met < b.met; });
    for (const OwnSend& send : early_) send.act();
    std::stable_sort(actions_.begin(), actions_.end(),
                     [](const Action& a, const Action& b) { return a.at < b.at; });
    for (const Action& action : actions_) action.act();
  }

 private:
  struct Action {
    Moment at;
    std::function<void()> act;
  };
  /// Own inputs for a peer, who receives them at `met`.
  struct OwnSend {
    Moment met;
    int peer;
    std::function<void()> act;
  };
  /// A parcel that this rank fetches for its host.
  struct Relay {
    Ranges rows;  ///< that some reader wants
    AttendBackward slots{};
    bool summing = false;  ///< the slots of its sums exist
    int sent_home = 0;     ///< when they are complete
  };
  /// What a peer gives back, for the sums of a relay or, null, for the rank's own.
  struct Return {
    int peer;
    Moment met;
    Relay* relay;
  };
  struct Piece {
    std::size_t group;
    Ranges rows;
    AttendBackward step;
  };

  // ---- when ------------------------------------------------------------------------------------

  void at(const Moment& moment, std::function<void()> act) {
    actions_.push_back({moment, std::move(act)});
  }

  /// Messages of two ranks meet in order: own inputs are there from the start, but may not overtake
  /// what is not.
  void not_before(int peer, const Moment& met) {
    Moment& first = others_.try_emplace(peer, kNever).first->second;
    first = std::min(first, met);
  }
  /// Sends at the start where that overtakes nothing: who receives says when there is room, and no
  /// reader waits until this rank gets to some stage of its own.
  void place(OwnSend send) {
    const auto other = others_.find(send.peer);
    if (other == others_.end() || send.met < other->second) {
      early_.push_back(std::move(send));
    } else {
      at(sending(send.met), std::move(send.act));
    }
  }

  // ---- the rank's own stages -------------------------------------------------------------------

  int owner_at(int d) const { return (me_.rank() + ranks_ - d) % ranks_; }

  /// Of each distance the first and the last one of the stages that are computed together. What
  /// owners give little of is one call of the kernel: each call packs the queries and merges what
  /// it finds into their records again. Together they need no more than half of the rank's own
  /// shard, for which the last of them may have to be waited for; or they join the rank's own keys.
  /// Where sums go back each stage goes alone.
  std::vector<std::pair<int, int>> bundles() const {
    std::vector<std::pair<int, int>> out{{0, 0}};
    if (own_keys_join()) {
      out.assign(static_cast<std::size_t>(ranks_), {0, ranks_ - 1});
      return out;
    }
    const Index own = static_cast<Index>(groups()) * rows_of(first_input()).rows(me_.rank()).size();
    Index rows_so_far = 0;
    for (int d = 1; d < ranks_; ++d) {
      Index more = 0;
      for (std::size_t g = 0; side_.sums.empty() && g < groups(); ++g) {
        if (needs(me_.rank(), owner_at(d), g)) more += size(rows(g, me_.rank(), owner_at(d)));
      }
      rows_so_far += more;
      const bool joins = d > 1 && side_.sums.empty() && rows_so_far <= own / 2;
      if (!joins) rows_so_far = more;
      out.emplace_back(joins ? out.back().first : d, d);
    }
    for (std::size_t d = out.size() - 1; d-- > 0;) {
      if (out[d + 1].first == out[d].first) out[d].second = out[d + 1].second;
    }
    return out;
  }

  /// Whether all that the rank computes is one call, of copies of its own keys beside what it
  /// fetches: where the copies, and waiting for what is fetched, take less than what another call
  /// reads and writes of the queries that see that (forward).
  bool own_keys_join() const {
    if (!side_.sums.empty()) return false;
    constexpr Index kLink = 16;  // bytes that memory moves while a link moves one
    const Problem& problem = me_.problem();
    const auto bytes_of_row = [&](std::span<const Kind> kinds, std::size_t g) {
      Index bytes = 0;
      for (const Kind kind : kinds) {
        bytes += heads_touched(kind, problem.head_groups()[g], problem.shape()).size() *
                 record_bytes(kind, problem.shape(), problem.type());
      }
      return bytes;
    };
    const Side queries = query_side(pass_);
    const auto of_query = [&](std::size_t g) {
      return bytes_of_row(queries.inputs, g) + 2 * bytes_of_row(queries.sums, g);
    };
    const Ranges mine{problem.queries().rows(me_.rank())};
    Index most = 0;  // if all queries see something of what is fetched
    for (std::size_t g = 0; g < groups(); ++g) most += of_query(g) * size(mine);
    Index spent = 0;
    Index saved = 0;
    for (std::size_t g = 0; g < groups() && spent < most; ++g) {
      std::vector<Range> all;
      for (int d = 1; d < ranks_; ++d) {
        if (!needs(me_.rank(), owner_at(d), g)) continue;
        const Ranges some = rows(g, me_.rank(), owner_at(d));
        all.insert(all.end(), some.begin(), some.end());
      }
      const Ranges fetched = union_of(std::move(all));
      spent += bytes_of_row(side_.inputs, g) *
               (2 * size(rows(g, me_.rank(), me_.rank())) + kLink * size(fetched));
      if (fetched.empty() || spent >= most) continue;
      saved += of_query(g) * rows_seeing(problem.mask(), problem.head_groups()[g].begin,
                                         problem.queries().positions(mine),
                                         problem.keys().positions(fetched));
    }
    return spent < saved;
  }

  void do_own_stages() {
    stages_.resize(static_cast<std::size_t>(ranks_));
    bundles_ = bundles();
    if (bundles_.front().second > 0) {
      at({0, Moment::kFetch, Moment::kFetch, me_.rank()}, [this] { fetch(me_.rank()); });
    } else {
      at({0, Moment::kCompute}, [this] { compute(mine_); });
    }
    int bundle = 0;    // the first distance of the one before
    int together = 0;  // when it was asked for
    for (int d = 1; d < ranks_; ++d) {
      const int owner = owner_at(d);
      if (computes_at(me_.rank(), d)) {
        Moment asked = fetching(me_.rank(), owner, 0);
        // All of a bundle at once, where the owner sends nothing else.
        const int first = bundles_[static_cast<std::size_t>(d)].first;
        if (first != bundle || hosts_.size() > 1) together = asked.time;
        bundle = first;
        asked.time = together;
        at(asked, [this, owner] { fetch(owner); });
      }
      if (bundles_[static_cast<std::size_t>(d)].second == d) {
        at({d, Moment::kCompute, Moment::kCompute, owner}, [this, owner] { compute_stage(owner); });
      }
      if (side_.sums.empty()) continue;
      for (std::size_t g = 0; g < groups(); ++g) {
        if (!needs(me_.rank(), owner, g)) continue;
        const int to = source(owner, g);
        if (to != me_.rank()) not_before(to, returning(d, owner, g, false));
      }
    }
  }

  /// From whom this rank gets what it needs, and to whom it gives back; itself if it is the
  /// courier.
  int source(int owner, std::size_t group) {
    const int host = host_of(me_.rank());
    if (host_of(owner) == host) return owner;
    const auto [found, fresh] = sources_.try_emplace({owner, group}, owner);
    if (fresh) {
      const Parcel p = parcel(owner, group, host);
      if (p.courier >= 0) found->second = p.courier;
    }
    return found->second;
  }

  void fetch(int owner) {
    const int d = distance(me_.rank(), owner);
    const auto [first, last] = bundles_[static_cast<std::size_t>(d)];
    if (std::exchange(asked_for_, first) != first) {  // the first of a bundle that is needed
      ++bundle_;
      fetched_[bundle_ % fetched_.size()].restart();
    }
    HomesInTurn& homes = fetched_[bundle_ % fetched_.size()];
    std::vector<Piece>& pieces = stages_[static_cast<std::size_t>(last)];
    for (std::size_t g = 0; g < groups(); ++g) {
      if (!needs(me_.rank(), owner, g)) continue;
      const Ranges need = rows(g, me_.rank(), owner);
      const int from = source(owner, g);
      const bool own = owner == me_.rank();
      Relay* relay = from == me_.rank() && !own ? &relays_.at({owner, g}) : nullptr;
      const bool all = first == last && relay != nullptr && relay->rows == need;
      // In the order of groups, whoever comes first: the same on one host and on several.
      auto piece = std::find_if(pieces.begin(), pieces.end(),
                                [&](const Piece& other) { return other.group >= g; });
      if (piece == pieces.end() || piece->group != g) {
        piece = pieces.insert(piece, {g, first == last ? need : bundled(g, first, last), mine_});
        for (const Kind kind : side_.inputs) {
          operand(piece->step, kind) = all ? operand(relay->slots, kind)
                                           : me_.slot(block(kind, g, piece->rows), homes.next());
        }
      }
      for (const Kind kind : side_.inputs) {
        if (all) continue;
        const SlotId slot = operand(piece->step, kind);
        me_.recv(slot, block(kind, g, need), from);
        if (from != me_.rank()) continue;
        me_.send(operand(own ? mine_ : relay->slots, kind), block(kind, g, need), from);
      }
    }
  }

  /// What the rank needs at these distances.
  Ranges bundled(std::size_t g, int first, int last) const {
    std::vector<Range> all;
    for (int d = first; d <= last; ++d) {
      if (!needs(me_.rank(), owner_at(d), g)) continue;
      const Ranges some = rows(g, me_.rank(), owner_at(d));
      all.insert(all.end(), some.begin(), some.end());
    }
    return union_of(std::move(all));
  }

  void compute(const AttendBackward& step) {
    if (pass_ == Pass::forward) {
      me_.attend(step.q, step.k, step.v, out_);
    } else {
      me_.attend_backward(step);
    }
  }

  void compute_stage(int owner) {
    const int d = distance(me_.rank(), owner);
    if (stages_[static_cast<std::size_t>(d)].empty()) return;
    HomesInTurn& sums = given_[computed_++ % given_.size()];
    sums.restart();
    for (Piece& piece : stages_[static_cast<std::size_t>(d)]) {
      const int to = side_.sums.empty() ? owner : source(owner, piece.group);
      Relay* relay = to == me_.rank() ? &relays_.at({owner, piece.group}) : nullptr;
      if (relay != nullptr) start_sums(*relay, d, piece.group);
      // With the inputs of all of the host the sums of all of it will do.
      const bool all = relay != nullptr &&
                       operand(piece.step, first_input()) == operand(relay->slots, first_input());
      for (const Kind kind : side_.sums) {
        operand(piece.step, kind) =
            all ? operand(relay->slots, kind)
                : me_.fresh(block(kind, piece.group, piece.rows), sums.next());
      }
      compute(piece.step);
      if (all) continue;
      for (const Kind kind : side_.sums) {
        const SlotId sum = operand(piece.step, kind);
        relay != nullptr ? me_.add(sum, operand(relay->slots, kind))
                         : me_.send(sum, me_.block(sum), to);
      }
    }
    stages_[static_cast<std::size_t>(d)].clear();
  }

  // ---- for the others of this host -------------------------------------------------------------

  void relay() {
    const int host = host_of(me_.rank());
    for (int owner = 0; owner < ranks_; ++owner) {
      if (host_of(owner) == host) continue;
      for (std::size_t g = 0; g < groups(); ++g) {
        const Parcel p = parcel(owner, g, host);
        if (p.courier == me_.rank()) relay(p, owner, g);
      }
    }
  }

  void relay(const Parcel& p, int owner, std::size_t g) {
    Relay& relay = relays_[{owner, g}];
    relay.rows = rows(g, p.readers, owner);
    relay.sent_home = complete(p, owner);
    // In use until the last reader has asked for its part and the courier has computed its own.
    const Moment asked = relaying(p, owner, g);
    int until = distance(me_.rank(), owner);
    for (const int reader : p.readers) until = std::max(until, fetching(reader, owner, g).time);
    at(asked, [this, &relay, owner, g, asked, until] {
      const std::vector<int>& homes = relayed_inputs_.lend(asked.time, until);
      for (std::size_t i = 0; i < homes.size(); ++i) {
        const Kind kind = side_.inputs[i];
        SlotId& slot = operand(relay.slots, kind);
        slot = me_.slot(block(kind, g, relay.rows), homes[i]);
        me_.recv(slot, me_.block(slot), owner);
      }
    });
    for (const int reader : p.readers) {
      if (reader == me_.rank()) continue;
      const Moment met = fetching(reader, owner, g);
      not_before(reader, met);
      const Ranges some = rows(g, reader, owner);
      at(sending(met), [this, &relay, reader, g, some] {
        for (const Kind kind : side_.inputs) {
          me_.send(operand(relay.slots, kind), block(kind, g, some), reader);
        }
      });
      take_back(reader, returning(distance(reader, owner), owner, g, false), some, &relay);
    }
    if (side_.sums.empty()) return;
    const Moment home = returning(relay.sent_home, owner, g, true);
    not_before(owner, home);
    at(home, [this, &relay, owner] {
      for (const Kind kind : side_.sums) {
        const SlotId sum = operand(relay.slots, kind);
        me_.send(sum, me_.block(sum), owner);
      }
    });
  }

  void start_sums(Relay& relay, int time, std::size_t g) {
    if (relay.summing) return;
    relay.summing = true;
    const std::vector<int>& homes = relayed_sums_.lend(time, relay.sent_home);
    for (std::size_t i = 0; i < homes.size(); ++i) {
      const Kind kind = side_.sums[i];
      operand(relay.slots, kind) = me_.fresh(block(kind, g, relay.rows), homes[i]);
    }
  }

  // ---- for readers of this rank's rows ---------------------------------------------------------

  void serve_others() {
    const int owner = me_.rank();
    for (int host = 0; host < std::ssize(hosts_); ++host) {
      for (std::size_t g = 0; g < groups(); ++g) {
        const Parcel p = parcel(owner, g, host);
        if (p.courier >= 0) {
          const Ranges all = rows(g, p.readers, owner);
          serve(p.courier, relaying(p, owner, g), g, all);
          take_back(p.courier, returning(complete(p, owner), owner, g, true), all);
          continue;
        }
        for (const int reader : p.readers) {
          const Ranges some = rows(g, reader, owner);
          serve(reader, fetching(reader, owner, g), g, some);
          take_back(reader, returning(distance(reader, owner), owner, g, false), some);
        }
      }
    }
  }

  void serve(int peer, const Moment& met, std::size_t g, const Ranges& rows) {
    own_sends_.push_back({met, peer, [this, peer, g, rows] {
                            for (const Kind kind : side_.inputs) {
                              me_.send(operand(mine_, kind), block(kind, g, rows), peer);
                            }
                          }});
  }

  /// Receives what `peer` gives back at `met` of these rows of the owner's, for the sums of a relay
  /// or the rank's own.
  void take_back(int peer, const Moment& met, const Ranges& rows, Relay* relay = nullptr) {
    if (side_.sums.empty()) return;
    at(met, [this, peer, met, rows] {
      if (returned_at_ != met.time) returned_.restart();
      returned_at_ = met.time;
      for (const Kind kind : side_.sums) {
        const SlotId sum = me_.slot(block(kind, met.group, rows), returned_.next());
        me_.recv(sum, me_.block(sum), peer);
        arrived_[{met.owner, met.group, peer}].push_back(sum);
      }
    });
    returns_at_.insert(met.time);
    returns_.push_back({peer, met, relay});
  }

  /// Adds what comes back one stage later; to the rank's own sums after it has computed once more,
  /// if it does before it needs the homes again: stages at which it sees nothing hide nothing.
  void add_what_comes_back() {
    for (const Return& r : returns_) {
      int next = r.met.time + 1;
      while (r.relay == nullptr && next < ranks_ && returns_at_.count(next) == 0 &&
             !computes_at(me_.rank(), next)) {
        ++next;
      }
      at({next, Moment::kAdd, r.met.met_in, r.met.owner, r.met.group}, [this, &r, next] {
        if (r.relay != nullptr) start_sums(*r.relay, next, r.met.group);
        for (const SlotId sum : arrived_.at({r.met.owner, r.met.group, r.peer})) {
          const Kind kind = me_.block(sum).kind;
          me_.add(sum, operand(r.relay != nullptr ? r.relay->slots : mine_, kind));
        }
      });
    }
  }

  Writer& me_;
  const Pass pass_;
  AttendBackward mine_;
  const SlotId out_;
  std::map<std::pair<int, std::size_t>, int> sources_;  ///< by (owner, group)

  std::vector<Action> actions_;
  std::vector<OwnSend> own_sends_, early_;
  std::map<int, Moment> others_;  ///< by peer: the first message to it that is not of own inputs

  std::vector<std::pair<int, int>> bundles_;  ///< by distance: see bundles()
  std::vector<std::vector<Piece>> stages_;    ///< by last distance of a bundle; those asked for
  std::size_t bundle_ = 0;                    ///< the one asked for last
  int asked_for_ = -1;                        ///< its first distance
  std::map<std::pair<int, std::size_t>, Relay> relays_;
  std::map<std::tuple<int, std::size_t, int>, std::vector<SlotId>> arrived_;
  std::vector<HomesInTurn> fetched_;  ///< of bundles in turn
  /// Of sums: what a stage gives back travels during the next one.
  std::array<HomesInTurn, 2> given_;
  std::size_t computed_ = 0;  ///< stages so far in which there was something to compute
  std::vector<Return> returns_;
  std::set<int> returns_at_;  ///< times at which these come
  HomesInTurn returned_;      ///< of what others give back
  int returned_at_ = 0;       ///< when these were last handed out
  Shelves relayed_inputs_, relayed_sums_;
};

}  // namespace

void pull_side(Writer& me, Pass pass, const Side& side, const AttendBackward& mine, SlotId out) {
  // Where there are more ranks than tokens most own nothing: they need nobody, and nobody them.
  if (owns_nothing(me.problem(), me.rank())) return;
  Pull(me, pass, side, mine, out).write();
}

void pull(Writer& me, SlotId q, SlotId k, SlotId v, SlotId out) {
  AttendBackward mine{};
  mine.q = q;
  mine.k = k;
  mine.v = v;
  pull_side(me, Pass::forward, key_side(Pass::forward), mine, out);
}

}  // namespace dattn
