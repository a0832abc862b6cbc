#include "parallel/mesh.hpp"

#include <algorithm>

#include "kernels/check.hpp"

namespace dattn {
namespace {

/// Distance between neighbours along `axis`.
int stride(const Mesh& mesh, int axis) {
  int product = 1;
  for (std::size_t i = static_cast<std::size_t>(axis) + 1; i < mesh.axes.size(); ++i) {
    product *= mesh.axes[i].size;
  }
  return product;
}

int place_of(const Mesh& mesh, int rank) {
  if (mesh.order.empty()) return rank;
  const auto found = std::find(mesh.order.begin(), mesh.order.end(), rank);
  CHECK(found != mesh.order.end(), rank);
  return static_cast<int>(found - mesh.order.begin());
}

}  // namespace

int Mesh::ranks() const {
  int product = 1;
  for (const Axis& axis : axes) product *= axis.size;
  return product;
}

int Mesh::coordinate(int rank, int axis) const {
  CHECK(axis >= 0 && axis < static_cast<int>(axes.size()), axis, axes.size());
  return place_of(*this, rank) / stride(*this, axis) % axes[static_cast<std::size_t>(axis)].size;
}

std::vector<int> Mesh::group(int rank, int axis) const {
  const int step = stride(*this, axis);
  const int first = place_of(*this, rank) - coordinate(rank, axis) * step;
  std::vector<int> members;
  for (int i = 0; i < axes[static_cast<std::size_t>(axis)].size; ++i) {
    const int place = first + i * step;
    members.push_back(order.empty() ? place : order[static_cast<std::size_t>(place)]);
  }
  return members;
}

std::string Mesh::text() const {
  std::string out;
  for (const Axis& axis : axes) out += (out.empty() ? "" : "x") + std::to_string(axis.size);
  return out;
}

Mesh line(int ranks) { return {{{"ranks", ranks}}}; }

}  // namespace dattn
