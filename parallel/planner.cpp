#include "parallel/planner.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>

#include "kernels/area.hpp"
#include "parallel/pairs.hpp"

namespace dattn {
namespace {

/// Up to this many ranks every candidate is rehearsed; beyond, only the best by estimate().
constexpr int kFewRanks = 16;
constexpr std::size_t kFinalists = 2;
/// How far ahead inputs are asked for where nobody says, one by default, and the part of the time
/// that a larger one, which takes more memory, must leave of the time of a smaller one.
constexpr int kDeeper[] = {2, 4};
constexpr double kDeeperMustLeave = 0.99;

Mesh mesh_of(const Strategy& strategy, const std::vector<int>& extents) {
  Mesh mesh;
  std::string_view names = strategy.axes;
  for (const int extent : extents) {
    const std::string_view name = names.substr(0, names.find(','));
    names.remove_prefix(std::min(names.size(), name.size() + 1));
    mesh.axes.push_back(
        {name.empty() ? "axis" + std::to_string(mesh.axes.size()) : std::string(name), extent});
  }
  return mesh;
}

/// What a choice costs.
struct Cost {
  double seconds = 0;
  Index bytes = 0;

  Cost& operator+=(const Cost& other) {
    seconds += other.seconds;
    bytes += other.bytes;
    return *this;
  }
};

/// The one that sends least of those that end first, the earlier one where two are equal. Times
/// that differ by less than a forecast can tell count as equal: a partition whose areas fit by a
/// hundredth more must not send all keys around where a contiguous one sends a window's halo.
std::size_t cheapest(const std::vector<Cost>& costs) {
  constexpr double kEqual = 1.03;
  double least = std::numeric_limits<double>::infinity();
  for (const Cost& cost : costs) least = std::min(least, cost.seconds);
  std::size_t best = costs.size();
  for (std::size_t i = 0; i < costs.size(); ++i) {
    if (costs[i].seconds > kEqual * least) continue;
    if (best == costs.size() || costs[i].bytes < costs[best].bytes) best = i;
  }
  return best;
}

/// Cost of one rank's program if its peers keep pace with it, and for how long it takes the link of
/// its host to others.
struct Walk {
  Cost cost;
  double net_out = 0;
  double net_in = 0;
};
Walk walk(const Problem& problem, const Program& program, PairCounter& pairs,
          const Machine& machine) {
  std::vector<double> arrives(static_cast<std::size_t>(program.homes), 0);
  double clock = 0;
  double out_free = 0;
  double in_free = 0;
  Walk walk;
  Index bytes = 0;
  const auto arrival = [&](SlotId s) -> double& {
    return arrives[static_cast<std::size_t>(program.slots[static_cast<std::size_t>(s)].home)];
  };
  const auto link = [&](int peer) {
    return problem.hosts().together(program.rank, peer) ? machine.inside() : machine.between();
  };
  const auto wire = [&](const Block& block, int peer, double& net) {
    if (peer == program.rank) return 0.0;
    const double seconds = static_cast<double>(wire_bytes(block, problem)) / link(peer).bandwidth;
    if (!problem.hosts().together(program.rank, peer)) net += seconds;
    return seconds;
  };
  for (const Step& step : program.steps) {
    if (const auto* attend = std::get_if<Attend>(&step)) {
      clock = std::max({clock, arrival(attend->q), arrival(attend->k), arrival(attend->v)});
      clock += pairs.seconds(program, *attend, pairs.count(program, *attend), machine);
    } else if (const auto* back = std::get_if<AttendBackward>(&step)) {
      for (const SlotId s : {back->q, back->k, back->v, back->d_o, back->stats}) {
        clock = std::max(clock, arrival(s));
      }
      clock += pairs.seconds(program, *back, pairs.count(program, *back), machine);
    } else if (const auto* add = std::get_if<Add>(&step)) {
      clock = std::max(clock, arrival(add->from));
    } else if (const auto* send = std::get_if<Send>(&step)) {
      clock = std::max(clock, arrival(send->slot));
      if (send->peer != program.rank) {
        out_free = std::max(out_free, clock) + wire(send->block, send->peer, walk.net_out);
      }
      bytes += wire_bytes(program, *send, problem);
    } else if (const auto* recv = std::get_if<Recv>(&step)) {
      if (recv->peer != program.rank) {
        in_free = std::max(in_free, clock) + wire(recv->block, recv->peer, walk.net_in);
      }
      arrival(recv->slot) = std::max(arrival(recv->slot), in_free + link(recv->peer).latency);
    } else if (const auto* merge = std::get_if<Merge>(&step)) {
      clock = std::max(clock, arrival(merge->from));
    } else if (const auto* reduce = std::get_if<Reduce>(&step)) {
      const Reduction how = reduction(program, *reduce, problem);
      const Index record = record_bytes(program, *reduce, problem);
      clock += how.seconds(machine, record);
      bytes += how.sent_by(problem.mesh().coordinate(program.rank, reduce->axis)) * record;
    }
    clock += machine.overhead;
  }
  walk.cost = {std::max({clock, out_free, in_free}), bytes};
  return walk;
}

/// First and last ranks of equal parts: the last rank of all is where uneven cuts of tokens or
/// heads leave most. And a slowest and a fastest one, which has most rows.
std::vector<int> some_ranks(int ranks, const Speeds& speeds) {
  std::set<int> some;
  some.insert(speeds.slowest());
  some.insert(speeds.fastest());
  for (int i = 0; i < kFewRanks; ++i) {
    const Range part = even_part(ranks, kFewRanks / 2, i / 2);
    some.insert(static_cast<int>(i % 2 == 0 ? part.begin : part.end - 1));
  }
  return {some.begin(), some.end()};
}

std::vector<int> all_ranks(int ranks) {
  std::vector<int> all(static_cast<std::size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

/// The slowest of a few ranks by walk(): what a rehearsal would say, nearly, for much less. Of
/// several hosts all ranks of the first, the last and a slowest one's, as these share a link.
Cost estimate(const Choice& choice, Pass pass, const Machine& machine) {
  const Problem& problem = *choice.problem;
  const Hosts& hosts = problem.hosts();
  PairCounter pairs(problem);
  Cost whole;
  const auto look = [&](const std::vector<int>& ranks) {
    double net_out = 0;
    double net_in = 0;
    for (const int rank : ranks) {
      const Walk one =
          walk(problem, make_program(*choice.strategy, problem, rank, pass), pairs, machine);
      whole.seconds = std::max(whole.seconds, one.cost.seconds);
      whole.bytes += one.cost.bytes;
      net_out += one.net_out;
      net_in += one.net_in;
    }
    return std::max(net_out, net_in);
  };
  if (hosts.count() == 1) {
    look(some_ranks(problem.ranks(), problem.speeds()));
    return whole;
  }
  const Speeds& speeds = problem.speeds();
  for (const int host : std::set{0, hosts.count() - 1, hosts.of(speeds.slowest())}) {
    whole.seconds = std::max(whole.seconds, look(hosts.ranks(host)));
  }
  return whole;
}

/// Whether rows see many spans of keys. Dealt out token by token, no tile of such a mask is allowed
/// whole, and even counting its pairs goes row by row.
bool scattered(const Mask& mask, const Shape& shape) {
  constexpr Index kRows = 8;  // looked at, of each kind of head
  constexpr std::size_t kManySpans = 8;
  std::vector<Range> spans;
  for (const auto& [head, times] : variants(mask, {0, shape.query_heads})) {
    for (Index i = 0; i < kRows; ++i) {
      spans.clear();
      const Index query = shape.first_query() + even_part(shape.queries, kRows, i).end - 1;
      mask.spans(head, query, {0, shape.keys}, spans);
      if (spans.size() > kManySpans) return true;
    }
  }
  return false;
}

std::vector<Choice> candidates(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
                               std::string& refusals) {
  std::vector<Problem> dealt;  // one a partition; dealing tokens out can be the longest part
  for (const PartitionKind& partition : partition_kinds()) {
    if (wish.partition != "auto" && wish.partition != partition.name) continue;
    if (wish.partition == "auto" && partition.strided && scattered(*mask, shape)) continue;
    const Problem problem(shape, mask, line(wish.ranks), partition.name, type, wish.wire,
                          wish.speeds);
    dealt.push_back(problem.prefetching(wish.prefetch.value_or(1))
                        .compensating(wish.compensate)
                        .across(wish.hosts));
  }
  std::vector<Choice> out;
  for (const Strategy& strategy : strategies()) {
    if (wish.strategy != "auto" && wish.strategy != strategy.name) continue;
    const Mesh mesh = wish.mesh ? side_by_side(mesh_of(strategy, *wish.mesh), wish.hosts)
                                : mesh_across(strategy, wish.hosts, wish.ranks, shape);
    if (mesh.ranks() != wish.ranks) {
      refusals = "a mesh of " + mesh.text() + " has " + std::to_string(mesh.ranks()) +
                 " ranks, but there are " + std::to_string(wish.ranks);
      continue;
    }
    for (const Problem& problem : dealt) {
      const bool relays = wish.relays.value_or(true);
      Choice choice{&strategy, std::make_shared<const Problem>(problem.on(mesh).relaying(relays))};
      if (const auto refusal = strategy.refuses(*choice.problem)) {
        refusals = std::string(strategy.name) + " " + *refusal;
        break;  // no partition changes what ranks and mesh a strategy takes
      }
      const bool either = wish.strategy == "auto" && !wish.relays && strategy.relays;
      out.push_back(choice);
      if (!either || !choice.problem->relays()) continue;
      choice.problem = std::make_shared<const Problem>(choice.problem->relaying(false));
      out.push_back(std::move(choice));
    }
  }
  return out;
}

bool limited(const Wish& wish) { return wish.memory > 0 || !wish.budgets.empty(); }

/// What a rank may use, of budgets its share.
Index may_use(const Wish& wish) {
  Index least = wish.memory;
  for (const Budget& budget : wish.budgets) {
    const Index share = budget.bytes / std::ssize(budget.ranks);
    if (least == 0 || share < least) least = std::max<Index>(share, 1);
  }
  return least;
}

/// What some ranks need.
struct Needed {
  Index most = 0;     ///< bytes of the one that needs most
  bool fits = false;  ///< each, and all of each budget together
};

/// By the needs of `ranks`; the others are taken to need as much in the mean.
Needed needed(const Wish& wish, const Strategy& strategy, const Problem& problem,
              const std::vector<int>& ranks) {
  Needed all;
  std::vector<Index> by_rank(static_cast<std::size_t>(wish.ranks), -1);
  for (const int rank : ranks) {
    const Program forward = make_program(strategy, problem, rank, Pass::forward);
    std::optional<Program> backward;
    if (wish.gradients) backward = make_program(strategy, problem, rank, Pass::backward);
    const Index bytes =
        needs_of(problem, forward, backward ? &*backward : nullptr, wish.beside).sum();
    by_rank[static_cast<std::size_t>(rank)] = bytes;
    all.most = std::max(all.most, bytes);
  }
  all.fits = wish.memory == 0 || all.most <= wish.memory;
  for (const Budget& budget : wish.budgets) {
    Index sum = 0;
    Index known = 0;
    for (const int rank : budget.ranks) {
      const Index bytes = by_rank[static_cast<std::size_t>(rank)];
      if (bytes < 0) continue;
      sum += bytes;
      ++known;
    }
    const Index others = std::ssize(budget.ranks) - known;
    if (known > 0 && sum + sum / known * others > budget.bytes) all.fits = false;
  }
  return all;
}

/// Decides whether the choice keeps, and says whether it then fits, by the needs of `ranks`.
bool fit(const Wish& wish, Choice& choice, const std::vector<int>& ranks) {
  const Strategy& strategy = *choice.strategy;
  Problem keeping = choice.problem->keeping(true);
  // All ranks keep something, or none does.
  const bool may_keep = wish.gradients && wish.keeps.value_or(true) &&
                        !make_program(strategy, keeping, 0, Pass::forward).kept.empty();
  Problem sending = choice.problem->keeping(false);
  if (!limited(wish)) {
    choice.problem = std::make_shared<const Problem>(may_keep ? keeping : sending);
    return true;
  }
  choice.may_use = may_use(wish);
  const Needed to_keep = may_keep ? needed(wish, strategy, keeping, ranks) : Needed{};
  choice.needs_to_keep = to_keep.most;
  const bool keeps = may_keep && (wish.keeps || to_keep.fits);
  const Needed planned = keeps ? to_keep : needed(wish, strategy, sending, ranks);
  choice.needs = planned.most;
  choice.problem = std::make_shared<const Problem>(keeps ? keeping : sending);
  return planned.fits;
}

/// The candidates that fit.
class Fitting {
 public:
  explicit Fitting(const Wish& wish) : wish_(&wish) {}

  /// Takes the candidate if it fits, by the needs of `ranks`.
  void offer(Choice choice, const std::vector<int>& ranks) {
    const bool fits = fit(*wish_, choice, ranks);
    if (least_.strategy == nullptr || choice.needs < least_.needs) least_ = choice;
    if (fits) all_.push_back(std::move(choice));
  }
  std::size_t size() const { return all_.size(); }

  /// Those that were taken; throws DoesNotFit if none was.
  std::vector<Choice> all() && {
    if (all_.empty()) throw DoesNotFit(least_);
    return std::move(all_);
  }

 private:
  const Wish* wish_;
  Choice least_;  ///< of those that were offered, the one that needs least
  std::vector<Choice> all_;
};

/// All passes of the choice, rehearsed. Nothing where a plan has a Fault; whoever runs the choice
/// rehearses it too, and reports.
std::optional<Cost> rehearsed(const Choice& choice, const std::vector<Pass>& passes,
                              const Machine& machine) {
  Cost sum;
  for (const Planned& pass : plan_passes(*choice.strategy, *choice.problem, passes, machine)) {
    if (pass.rehearsal.fault) return {};
    sum += {pass.rehearsal.forecast_seconds(), pass.rehearsal.bytes_sent_total()};
  }
  return sum;
}

Cost estimate(const Choice& choice, const std::vector<Pass>& passes, const Machine& machine) {
  Cost sum;
  for (const Pass pass : passes) sum += estimate(choice, pass, machine);
  return sum;
}

/// The choice, prefetching as far ahead as the forecast says that it pays.
Choice prefetching(const Wish& wish, Choice choice, const Machine& machine) {
  // Many small stages even out anyway, and an estimate, which looks at single ranks, sees nothing.
  if (wish.prefetch || wish.ranks <= kDeeper[0] || wish.ranks > kFewRanks) return choice;
  const std::vector<Pass> passes = wish.passes();
  const std::optional<Cost> shallow = rehearsed(choice, passes, machine);
  if (!shallow) return choice;
  double seconds = shallow->seconds;
  const Choice first = choice;
  for (const int stages : kDeeper) {
    Choice deeper = first;
    deeper.problem = std::make_shared<const Problem>(first.problem->prefetching(stages));
    const std::optional<Cost> cost = rehearsed(deeper, passes, machine);
    if (!cost || cost->seconds > kDeeperMustLeave * seconds) continue;
    if (!fit(wish, deeper, all_ranks(wish.ranks))) break;
    if (deeper.problem->keeps() != first.problem->keeps()) break;  // keeping saves more
    choice = deeper;
    seconds = cost->seconds;
  }
  return choice;
}

/// choose() but for what prefetching() finds.
Choice best(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
            const Machine& machine) {
  std::string refusals;
  std::vector<Choice> all = candidates(wish, shape, mask, type, refusals);
  if (all.empty()) throw std::invalid_argument(refusals);
  const std::vector<int> every = all_ranks(wish.ranks);
  const bool few = wish.ranks <= kFewRanks || all.size() == 1;
  const auto fitting = [&](const std::vector<int>& ranks) {
    Fitting some(wish);
    for (const Choice& choice : all) some.offer(choice, ranks);
    return some;
  };
  Fitting found = fitting(few ? every : some_ranks(wish.ranks, wish.speeds));
  if (found.size() == 0 && !few) found = fitting(every);  // what is refused is refused exactly
  all = std::move(found).all();
  if (all.size() == 1 && few) return all.front();
  const std::vector<Pass> passes = wish.passes();
  if (!few) {
    std::vector<Cost> costs;
    for (const Choice& choice : all) costs.push_back(estimate(choice, passes, machine));
    Fitting finalists(wish);
    while (finalists.size() < kFinalists && !all.empty()) {
      const auto best = static_cast<std::ptrdiff_t>(cheapest(costs));
      finalists.offer(all[static_cast<std::size_t>(best)], every);
      all.erase(all.begin() + best);
      costs.erase(costs.begin() + best);
    }
    all = std::move(finalists).all();
  }
  std::vector<Cost> costs;
  std::vector<const Choice*> proved;
  for (const Choice& choice : all) {
    const std::optional<Cost> cost = rehearsed(choice, passes, machine);
    if (!cost) continue;
    costs.push_back(*cost);
    proved.push_back(&choice);
  }
  return proved.empty() ? all.front() : *proved[cheapest(costs)];
}

}  // namespace

DoesNotFit::DoesNotFit(const Choice& least_in)
    : std::invalid_argument(std::string(least_in.strategy->name) + " needs " +
                            std::to_string(least_in.needs) + " bytes on a rank, which may use " +
                            std::to_string(least_in.may_use)),
      least(least_in) {}

std::vector<Pass> Wish::passes() const {
  if (gradients) return {Pass::forward, Pass::backward};
  return {Pass::forward};
}

std::optional<Choice> leanest(const Wish& wish, const Shape& shape, const MaskPtr& mask,
                              Type type) {
  std::string refusals;
  std::vector<Choice> all = candidates(wish, shape, mask, type, refusals);
  if (all.empty()) throw std::invalid_argument(refusals);
  const bool few = wish.ranks <= kFewRanks;
  std::vector<Choice> fitting;
  for (Choice& choice : all) {
    const std::vector<int> ranks =
        few ? all_ranks(wish.ranks) : some_ranks(wish.ranks, wish.speeds);
    if (fit(wish, choice, ranks)) {
      fitting.push_back(choice);
    }
  }
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Choice& a, const Choice& b) { return a.needs < b.needs; });
  for (Choice& choice : fitting) {
    if (few || fit(wish, choice, all_ranks(wish.ranks))) return choice;
  }
  return {};
}

Choice choose(const Wish& wish, const Shape& shape, const MaskPtr& mask, Type type,
              const Machine& machine) {
  return prefetching(wish, best(wish, shape, mask, type, machine), machine);
}

}  // namespace dattn
