#include "launcher/hosts_report.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "launcher/report.hpp"

namespace dattn {
namespace {

/// Whether the strategy relays in this problem.
bool relays(const Choice& choice) { return choice.strategy->relays && choice.problem->relays(); }

/// What became of the mesh, if it has two axes.
std::string of_mesh(const Problem& problem) {
  const Mesh& mesh = problem.mesh();
  if (mesh.axes.size() < 2) return "";
  bool inside = true;
  for (int rank = 0; rank < problem.ranks(); ++rank) {
    const std::vector<int> group = mesh.group(rank, static_cast<int>(mesh.axes.size()) - 1);
    inside = inside && std::all_of(group.begin(), group.end(), [&](int other) {
               return problem.hosts().together(rank, other);
             });
  }
  const std::string axis = mesh.axes.back().name;
  if (inside) return fmt::format("; axis {} of the mesh {} stays inside hosts", axis, mesh.text());
  const bool even = problem.hosts().each() > 0;
  return fmt::format("; axis {} of the mesh {} crosses hosts{}", axis, mesh.text(),
                     even ? "" : ", which have different numbers of ranks");
}

}  // namespace

std::string hosts_line(const Choice& choice, const Rehearsal& r) {
  const Problem& problem = *choice.problem;
  if (r.fault || problem.hosts().count() == 1) return "";
  Index most = 0;
  for (const auto& [link, bytes] : r.host_links) {
    if (link.first != link.second) most = std::max(most, bytes);
  }
  return fmt::format(
      "hosts: {}; {} stay inside hosts, {} go between them, {} at most from one to "
      "another{}{}\n",
      problem.hosts().count() > 64 ? fmt::format("{}", problem.hosts().count())
                                   : problem.hosts().text(),
      in_bytes(r.bytes_inside_hosts()), in_bytes(r.bytes_between_hosts()), in_bytes(most),
      relays(choice) ? ", each block once" : "", of_mesh(problem));
}

nlohmann::json hosts_json(const Choice& choice) {
  const Problem& problem = *choice.problem;
  nlohmann::json by_rank = nlohmann::json::array();
  for (int rank = 0; rank < problem.ranks(); ++rank) by_rank.push_back(problem.hosts().of(rank));
  return {{"count", problem.hosts().count()}, {"by_rank", by_rank}, {"relays", relays(choice)}};
}

nlohmann::json host_links_json(const Rehearsal& r) {
  nlohmann::json links = nlohmann::json::array();
  for (const auto& [link, bytes] : r.host_links) {
    links.push_back({{"from", link.first}, {"to", link.second}, {"bytes", bytes}});
  }
  return links;
}

}  // namespace dattn
