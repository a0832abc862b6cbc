#include "parallel/rehearse.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

#include "parallel/coverage.hpp"
#include "parallel/inspect.hpp"
#include "parallel/link_times.hpp"
#include "parallel/messages.hpp"
#include "parallel/pairs.hpp"
#include "parallel/pseudo_keys.hpp"

namespace dattn {
namespace {

/// What a slot holds.
struct Content {
  bool whole = false;         ///< may be read
  std::vector<Rect> arrived;  ///< since it was last read
  std::vector<int> arrivals;  ///< the Recv steps of `arrived`
  std::vector<Cell> cells;    ///< of a sum
};

struct Home {
  SlotId resident = -1;      ///< the slot whose Block lies here, -1 before the first
  bool taken = false;        ///< some slot has this home
  std::vector<int> reading;  ///< messages that read it
  std::vector<int> writing;  ///< messages that write it
};

constexpr double kNever = std::numeric_limits<double>::infinity();

struct Rank {
  const Program* program = nullptr;
  std::size_t next = 0;
  double turn = kNever;  ///< when it will try its next step
  bool finished = false;
  bool at_reduce = false;  ///< counted among those that have come to a Reduce
  bool reduced = false;    ///< that Reduce is done
  double clock = 0;
  std::vector<Home> homes;
  std::vector<Content> slots;
};

class Stage {
 public:
  Stage(const Problem& problem, const Plan& plan, const Machine& machine)
      : problem_(problem),
        plan_(plan),
        machine_(machine),
        pairs_(problem),
        links_(machine, problem.hosts(), problem.ranks()),
        all_(static_cast<std::size_t>(problem.ranks())) {
    std::iota(all_.begin(), all_.end(), 0);
  }

  Rehearsal run() {
    if (!set()) return std::move(result_);
    while (!ready_.empty() && !result_.fault) {
      const auto [time, r] = ready_.top();
      ready_.pop();
      Rank& rank = ranks_[static_cast<std::size_t>(r)];
      if (time != rank.turn) continue;  // it had an earlier one
      rank.turn = kNever;
      time < rank.clock ? wake(r, rank.clock) : advance(r);
    }
    if (!result_.fault) check_all_finished();
    if (!result_.fault) check_results();
    for (const Rank& rank : ranks_) result_.seconds.push_back(rank.clock);
    return std::move(result_);
  }

 private:
  bool fault(int rank, std::size_t step, std::string what) {
    if (!result_.fault) result_.fault = Fault{rank, static_cast<int>(step), std::move(what)};
    return false;
  }

  // ---- before the first step -------------------------------------------------------------------

  bool set() {
    const auto ranks = static_cast<std::size_t>(problem_.ranks());
    if (plan_.size() != ranks) {
      return fault(0, 0,
                   "the plan has " + std::to_string(plan_.size()) + " programs for " +
                       std::to_string(ranks) + " ranks");
    }
    ranks_.resize(ranks);
    result_.bytes_sent.assign(ranks, 0);
    result_.pairs.assign(ranks, 0);
    result_.compute_seconds.assign(ranks, 0);
    result_.sum_seconds.assign(ranks, 0);
    result_.wait_seconds.assign(ranks, 0);
    for (std::size_t r = 0; r < ranks; ++r) {
      if (!set_rank(static_cast<int>(r))) return false;
    }
    return true;
  }

  bool set_rank(int r) {
    const Program& program = plan_[static_cast<std::size_t>(r)];
    if (auto found = inspect(problem_, program, r)) {
      result_.fault = std::move(found);
      return false;
    }
    if (program.pass == Pass::backward && problem_.compensate() != Compensate::off) {
      return fault(r, 0, "there is no backward pass of what pseudo-keys stand for");
    }
    Rank& rank = ranks_[static_cast<std::size_t>(r)];
    rank.program = &program;
    rank.homes.resize(static_cast<std::size_t>(program.homes));
    rank.slots.resize(program.slots.size());
    result_.memory_bytes.push_back(memory_bytes(program, problem_));
    result_.kept_bytes.push_back(kept_bytes(program, problem_));
    for (std::size_t s = 0; s < program.slots.size(); ++s) {
      Home& home = home_of(rank, static_cast<SlotId>(s));
      // Sums start over no pair, if they are the first in their home.
      if (!home.taken && is_sum(program.slots[s].block.kind)) {
        home.resident = static_cast<SlotId>(s);
        rank.slots[s].whole = true;
        if (program.slots[s].block.kind != Kind::O) touch(r, rank, static_cast<SlotId>(s), 1);
      }
      home.taken = true;
    }
    for (const SlotId s : program.inputs) {
      home_of(rank, s).resident = s;
      content_of(rank, s).whole = true;
    }
    compensate(r, rank);
    wake(r, 0);
    return true;
  }

  /// Pseudo-keys are the engine's own doing, at the start; no step says so.
  void compensate(int r, Rank& rank) {
    const PseudoKeyCost cost = pseudo_key_cost(problem_, r, machine_);
    const auto at = static_cast<std::size_t>(r);
    result_.bytes_sent[at] += cost.bytes_sent;
    if (problem_.compensate() == Compensate::head) {  // an all-reduce
      if (cost.bytes_sent > 0) {
        count(all_, r, dropped_reduction(problem_), pseudo_sum_bytes(problem_.shape()));
      }
    } else if (cost.bytes_sent > 0) {
      for (int to = 0; to < problem_.ranks(); ++to) {
        if (to != r) count(r, to, cost.bytes_sent / (problem_.ranks() - 1));
      }
    }
    result_.messages += cost.messages;
    result_.wait_seconds[at] += cost.wait_seconds;
    result_.compute_seconds[at] += cost.compute_seconds;
    rank.clock += cost.wait_seconds + cost.compute_seconds;
  }

  /// Counts bytes by the hosts at both ends.
  void count(int from, int to, Index bytes) {
    if (bytes == 0) return;
    result_.host_links[{problem_.hosts().of(from), problem_.hosts().of(to)}] += bytes;
  }

  // ---- taking steps ----------------------------------------------------------------------------

  Home& home_of(Rank& rank, SlotId s) {
    return rank
        .homes[static_cast<std::size_t>(rank.program->slots[static_cast<std::size_t>(s)].home)];
  }
  Content& content_of(Rank& rank, SlotId s) { return rank.slots[static_cast<std::size_t>(s)]; }
  const Block& block_of(const Rank& rank, SlotId s) const {
    return rank.program->slots[static_cast<std::size_t>(s)].block;
  }

  /// Has rank `r` try its next step when all ranks are at `time` or past it.
  void wake(int r, double time) {
    Rank& rank = ranks_[static_cast<std::size_t>(r)];
    time = std::max(time, rank.clock);
    if (rank.finished || rank.turn <= time) return;
    rank.turn = time;
    ready_.emplace(time, r);
  }

  void advance(int r) {
    Rank& rank = ranks_[static_cast<std::size_t>(r)];
    const auto& steps = rank.program->steps;
    while (rank.next < steps.size() && !result_.fault) {
      const bool taken =
          std::visit([&](const auto& step) { return take(r, rank, step); }, steps[rank.next]);
      if (!taken) return;
      ++rank.next;
      // Ranks are taken in the order of their clocks, so that messages find the links as they will.
      if (!ready_.empty() && ready_.top().first < rank.clock) return wake(r, rank.clock);
    }
    if (result_.fault) return;
    for (Home& home : rank.homes) {
      if (!settled(r, rank, home.reading) || !settled(r, rank, home.writing)) return;
    }
    rank.finished = true;
  }

  /// Whether these messages are done; if so they are forgotten, and the clock has waited for them.
  bool settled(int r, Rank& rank, std::vector<int>& messages) {
    for (const int m : messages) {
      if (!messages_.at(m).done) return false;
    }
    for (const int m : messages) {
      const double finished = messages_.at(m).finished;
      result_.wait_seconds[static_cast<std::size_t>(r)] += std::max(0.0, finished - rank.clock);
      rank.clock = std::max(rank.clock, finished);
      messages_.forget(m);
    }
    messages.clear();
    return true;
  }

  /// Whether `s` may be read now. Faults, over what the rank `does` with it, where it never may.
  bool readable(int r, Rank& rank, SlotId s, const char* does = "reads ") {
    Home& home = home_of(rank, s);
    if (!settled(r, rank, home.writing)) return false;
    Content& content = content_of(rank, s);
    const Block& block = block_of(rank, s);
    if (block.empty()) return true;
    if (home.resident != s) {
      return fault(r, rank.next, does + text(block) + ", which is not in its home");
    }
    if (!content.arrived.empty()) {
      if (auto why = misfit(content.arrived, block, !content.whole)) {
        return fault(r, rank.next, does + text(block) + ", of which " + *why);
      }
      content.arrived.clear();
      content.arrivals.clear();
      content.whole = true;
    }
    if (!content.whole) {
      return fault(r, rank.next, does + text(block) + " before it is filled");
    }
    return true;
  }

  /// Whether `s` may be written now by a kernel or, with `message`, by one more message.
  bool writable(int r, Rank& rank, SlotId s, bool message) {
    Home& home = home_of(rank, s);
    if (!settled(r, rank, home.reading)) return false;
    if (message && home.resident == s) return true;  // pieces of one slot arrive side by side
    return settled(r, rank, home.writing);
  }

  int post(int r, const Rank& rank, bool is_send) {
    return messages_.post({r, static_cast<int>(rank.next), is_send, rank.clock, false, 0});
  }

  bool take(int r, Rank& rank, const Send& step) {
    if (!readable(r, rank, step.slot)) return false;
    rank.clock += machine_.overhead;
    const int m = post(r, rank, true);
    home_of(rank, step.slot).reading.push_back(m);
    meet(r, step.peer, m);
    return !result_.fault;
  }

  bool take(int r, Rank& rank, const Recv& step) {
    if (!writable(r, rank, step.slot, true)) return false;
    Home& home = home_of(rank, step.slot);
    Content& content = content_of(rank, step.slot);
    if (home.resident != step.slot || content.arrived.empty()) {
      // A sum keeps what the messages leave alone; all else is void until messages fill it.
      const bool keeps = home.resident == step.slot && is_sum(block_of(rank, step.slot).kind);
      move_in(rank, step.slot);
      if (!keeps) content = {};
    }
    append_rects(content.arrived, step.block);
    content.arrivals.push_back(static_cast<int>(rank.next));
    rank.clock += machine_.overhead;
    const int m = post(r, rank, false);
    home.writing.push_back(m);
    meet(step.peer, r, m);
    return !result_.fault;
  }

  /// Makes `s` the slot whose Block lies in its home; the one before it has nothing any more.
  void move_in(Rank& rank, SlotId s) {
    Home& home = home_of(rank, s);
    const SlotId before = std::exchange(home.resident, s);
    if (before < 0) return;
    unread(rank, before);
    if (before != s) content_of(rank, before) = {};
  }

  /// Notes messages into `s` that nobody has read when it is overwritten or left.
  void unread(Rank& rank, SlotId s) {
    Content& content = content_of(rank, s);
    for (const int step : content.arrivals) result_.dead.emplace_back(rank.program->rank, step);
    content.arrivals.clear();
  }

  bool take(int r, Rank& rank, const Attend& step) {
    if (!readable(r, rank, step.q) || !readable(r, rank, step.k) || !readable(r, rank, step.v) ||
        !changeable(r, rank, step.out)) {
      return false;
    }
    contribute(r, rank, step, {step.out});
    return true;
  }

  bool take(int r, Rank& rank, const AttendBackward& step) {
    for (const SlotId s : {step.q, step.k, step.v, step.d_o, step.stats}) {
      if (!readable(r, rank, s)) return false;
    }
    for (const SlotId s : {step.dq, step.dk, step.dv}) {
      if (!changeable(r, rank, s)) return false;
    }
    contribute(r, rank, step, {step.dq, step.dk, step.dv});
    return true;
  }

  /// Whether a kernel may add to `s` now.
  bool changeable(int r, Rank& rank, SlotId s) {
    return readable(r, rank, s) && writable(r, rank, s, false);
  }

  /// An Attend or AttendBackward adds to `sums`.
  template <class Work>
  void contribute(int r, Rank& rank, const Work& work, std::initializer_list<SlotId> sums) {
    const Ranges heads = heads_served(*rank.program, work, problem_.shape());
    const Index pairs = pairs_.count(*rank.program, work);
    const double seconds = pairs_.seconds(*rank.program, work, pairs, machine_);
    rank.clock += seconds + machine_.overhead;
    result_.compute_seconds[static_cast<std::size_t>(r)] += seconds;
    result_.pairs[static_cast<std::size_t>(r)] += pairs;
    const int number = static_cast<int>(contributions_.size());
    contributions_.push_back({r, static_cast<int>(rank.next), heads, &block_of(rank, work.q).rows,
                              &block_of(rank, work.k).rows});
    for (const SlotId s : sums) {
      const Block& sum = block_of(rank, s);
      // Of a key head only if some head that was served reads it.
      for (const Range touched : heads_touched(sum.kind, heads, problem_.shape())) {
        for (const Range rows : sum.rows) {
          content_of(rank, s).cells.push_back({touched, rows, number});
        }
      }
    }
  }

  /// Beside kernels as many bytes of memory as a sum has are read or written, so many times. (Of
  /// Partials over no key only two numbers a record are.)
  void touch(int r, Rank& rank, SlotId sum, int times) {
    if (machine_.rows <= 0) return;
    const Index bytes = bytes_of(block_of(rank, sum), problem_.shape(), problem_.type());
    const double seconds =
        static_cast<double>(times * bytes) / machine_.rows / problem_.speeds().of(r);
    rank.clock += seconds;
    result_.compute_seconds[static_cast<std::size_t>(r)] += seconds;
    result_.sum_seconds[static_cast<std::size_t>(r)] += seconds;
  }

  bool take(int r, Rank& rank, const Merge& step) { return join(r, rank, step.from, step.into); }
  bool take(int r, Rank& rank, const Add& step) { return join(r, rank, step.from, step.into); }

  bool join(int r, Rank& rank, SlotId from, SlotId into) {
    if (!readable(r, rank, from) || !changeable(r, rank, into)) return false;
    rank.clock += machine_.overhead;
    touch(r, rank, from, 3);  // both read, one written
    const auto& cells = content_of(rank, from).cells;
    auto& target = content_of(rank, into).cells;
    target.insert(target.end(), cells.begin(), cells.end());
    return true;
  }

  bool take(int r, Rank& rank, const Clear& step) {
    if (!writable(r, rank, step.slot, false)) return false;
    move_in(rank, step.slot);
    Content& content = content_of(rank, step.slot);
    content = {};
    content.whole = true;
    rank.clock += machine_.overhead;
    if (block_of(rank, step.slot).kind != Kind::O) touch(r, rank, step.slot, 1);
    return true;
  }

  bool take(int r, Rank& rank, const Reduce& step) {
    if (!rank.reduced && !rank.at_reduce) {
      if (!changeable(r, rank, step.slot)) return false;
      rank.at_reduce = true;
      const std::vector<int> group = problem_.mesh().group(r, step.axis);
      int& arrived = reduces_[{group.front(), step.axis}];
      if (++arrived == static_cast<int>(group.size())) {
        arrived = 0;
        reduce(group, step.axis);
      }
    }
    return std::exchange(rank.reduced, false);
  }

  /// All of `group` stand at a Reduce along `axis`.
  void reduce(const std::vector<int>& group, int axis) {
    std::vector<Cell> cells;
    double start = 0;
    const Block* block = nullptr;
    for (const int member : group) {
      Rank& rank = ranks_[static_cast<std::size_t>(member)];
      const auto& step = std::get<Reduce>(rank.program->steps[rank.next]);
      if (block != nullptr && (*block != block_of(rank, step.slot) || step.axis != axis)) {
        fault(member, rank.next,
              "reduces " + text(block_of(rank, step.slot)) + " where rank " +
                  std::to_string(group.front()) + " reduces " + text(*block));
        return;
      }
      block = &block_of(rank, step.slot);
      const auto& own = content_of(rank, step.slot).cells;
      cells.insert(cells.end(), own.begin(), own.end());
      start = std::max(start, rank.clock);
    }
    const Reduction how(group, problem_.hosts(), block->row_count() * block->head_count());
    const Index record = record_bytes(block->kind, problem_.shape(), problem_.type());
    const double seconds = how.seconds(machine_, record);
    for (std::size_t i = 0; i < group.size(); ++i) {
      const int member = group[i];
      Rank& rank = ranks_[static_cast<std::size_t>(member)];
      const auto& step = std::get<Reduce>(rank.program->steps[rank.next]);
      content_of(rank, step.slot).cells = cells;
      result_.bytes_sent[static_cast<std::size_t>(member)] +=
          count(group, static_cast<int>(i), how, record);
      result_.wait_seconds[static_cast<std::size_t>(member)] += start + seconds - rank.clock;
      rank.clock = start + seconds;
      ++result_.messages;
      rank.at_reduce = false;
      rank.reduced = true;
      wake(member, rank.clock);
    }
  }

  /// Counts what a member of the group sends in an all-reduce, and gives it.
  Index count(const std::vector<int>& group, int member, const Reduction& how, Index record) {
    for (std::size_t host = 0; host < how.by_host().size(); ++host) {
      const int there = group[static_cast<std::size_t>(how.by_host()[host].front())];
      count(group[static_cast<std::size_t>(member)], there,
            how.sent_to(member, static_cast<int>(host)) * record);
    }
    return how.sent_by(member) * record;
  }

  // ---- messages --------------------------------------------------------------------------------

  /// Message `m` of the channel from `from` to `to` is taken to the oldest of the other side, or
  /// waits for it.
  void meet(int from, int to, int m) {
    if (const auto pair = messages_.meet(from, to, m)) transfer(pair->sent, pair->received);
  }

  void transfer(int sent, int received) {
    Message& s = messages_.at(sent);
    Message& r = messages_.at(received);
    Rank& from = ranks_[static_cast<std::size_t>(s.rank)];
    Rank& to = ranks_[static_cast<std::size_t>(r.rank)];
    const auto& send = std::get<Send>(from.program->steps[static_cast<std::size_t>(s.step)]);
    const auto& recv = std::get<Recv>(to.program->steps[static_cast<std::size_t>(r.step)]);
    if (send.block != recv.block) {
      fault(r.rank, static_cast<std::size_t>(r.step),
            "expects " + text(recv.block) + " from rank " + std::to_string(s.rank) +
                ", whose step " + std::to_string(s.step) + " sends " + text(send.block));
      return;
    }
    if (is_sum(recv.block.kind)) {
      move_cells(content_of(from, send.slot).cells, recv.block, content_of(to, recv.slot).cells);
    }
    const Index bytes = wire_bytes(*from.program, send, problem_);
    const double finished = links_.arrival(s.rank, r.rank, std::max(s.posted, r.posted), bytes);
    if (bytes > 0) {
      count(s.rank, r.rank, bytes);
      result_.bytes_sent[static_cast<std::size_t>(s.rank)] += bytes;
      result_.links[{s.rank, r.rank}] += bytes;
      ++result_.messages;
    }
    for (Message* m : {&s, &r}) {
      m->done = true;
      m->finished = finished;
      wake(m->rank, finished);
    }
  }

  // ---- at the end ------------------------------------------------------------------------------

  void check_all_finished() {
    // Name a message that never meets its partner, where there is one, rather than who waits.
    if (const Message* alone = messages_.first_alone()) {
      const Rank& rank = ranks_[static_cast<std::size_t>(alone->rank)];
      const auto step = static_cast<std::size_t>(alone->step);
      fault(alone->rank, step,
            "'" + dattn::text(*rank.program, rank.program->steps[step]) +
                "' never meets its partner" + standing(rank));
      return;
    }
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const Rank& rank = ranks_[r];
      if (!rank.finished) {
        fault(static_cast<int>(r), rank.next, "waits for ever" + standing(rank));
        return;
      }
    }
  }

  static std::string standing(const Rank& rank) {
    if (rank.next >= rank.program->steps.size()) return "; the rank waits at its end";
    return "; the rank stands at step " + std::to_string(rank.next) + ", '" +
           dattn::text(*rank.program, rank.program->steps[rank.next]) + "'";
  }

  void check_results() {
    for (Rank& rank : ranks_) {
      rank.next = rank.program->steps.size();
      for (const Result& result : rank.program->results) {
        if (!result.block.empty() && !readable(rank.program->rank, rank, result.slot)) return;
      }
      for (const SlotId s : rank.program->kept) {
        if (!readable(rank.program->rank, rank, s, "keeps ")) return;
      }
    }
    const auto cells = [&](int rank, SlotId s) -> const std::vector<Cell>& {
      return content_of(ranks_[static_cast<std::size_t>(rank)], s).cells;
    };
    result_.fault = dattn::check_results(problem_, plan_, cells, contributions_);
    if (result_.fault) return;
    for (Rank& rank : ranks_) {
      for (std::size_t s = 0; s < rank.slots.size(); ++s) unread(rank, static_cast<SlotId>(s));
    }
    for (const Contribution& c : contributions_) {
      if (!c.used) result_.dead.emplace_back(c.rank, c.step);
    }
    std::sort(result_.dead.begin(), result_.dead.end());
  }

  const Problem& problem_;
  const Plan& plan_;
  const Machine& machine_;
  PairCounter pairs_;
  LinkTimes links_;
  std::vector<int> all_;  ///< ranks
  Rehearsal result_;
  std::vector<Rank> ranks_;
  using Turn = std::pair<double, int>;  ///< (time, rank)
  std::priority_queue<Turn, std::vector<Turn>, std::greater<>> ready_;
  Messages messages_;
  std::map<std::pair<int, int>, int> reduces_;  ///< (first member, axis) -> how many have come
  std::vector<Contribution> contributions_;
};

}  // namespace

std::string Fault::text() const {
  return "rank " + std::to_string(rank) + ", step " + std::to_string(step) + ": " + what;
}

Index Rehearsal::bytes_sent_total() const {
  return std::accumulate(bytes_sent.begin(), bytes_sent.end(), Index{0});
}

Index Rehearsal::bytes_inside_hosts() const { return bytes_sent_total() - bytes_between_hosts(); }

Index Rehearsal::bytes_between_hosts() const {
  Index sum = 0;
  for (const auto& [hosts, bytes] : host_links) sum += hosts.first == hosts.second ? 0 : bytes;
  return sum;
}

Index Rehearsal::pairs_total() const {
  return std::accumulate(pairs.begin(), pairs.end(), Index{0});
}

double Rehearsal::forecast_seconds() const {
  return seconds.empty() ? 0.0 : *std::max_element(seconds.begin(), seconds.end());
}

Rehearsal rehearse(const Problem& problem, const Plan& plan, const Machine& machine) {
  return Stage(problem, plan, machine).run();
}

}  // namespace dattn
