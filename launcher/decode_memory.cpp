#include "launcher/decode_memory.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "kernels/partial.hpp"
#include "launcher/host.hpp"
#include "launcher/memory.hpp"
#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "parallel/all_reduce.hpp"
#include "parallel/latent_prefill.hpp"
#include "parallel/latent_slices.hpp"
#include "parallel/verifying.hpp"

namespace dattn {
namespace {

class Settling {
 public:
  Settling(comm::Communicator& world, const DecodeOptions& options, const Hosts& hosts)
      : world_(world), o_(options), hosts_(hosts) {}

  DecodePlace settle() {
    RankReport own;
    together(world_, [&] { own.host = this_host(); });
    std::vector<RankReport> ranks;
    for (const std::string& text : world_.all_gather(encoded(own))) ranks.push_back(decoded(text));
    // Some rank has its share of the cache at least: told at once, where to settle for far more
    // tokens than anybody has memory for would take minutes.
    const Decoding& d = o_.decoding;
    const Index numbers = d.key_heads * d.d_qk + (d.values_in_keys ? 0 : d.value_heads * d.d_v);
    needs_[Use::inputs] = d.keys() / world_.size() * numbers * bytes_of(d.type);
    if (d.masks.empty()) refuse_beyond(ranks);
    together(world_, [&] {
      needs_ = {};
      o_.slicing ? settle_slices() : settle_form();
      if (o_.prefills) settle_prefill();
      needs_[Use::transport] = transport_bytes(world_.size());
      const Index each = sizeof(float);
      const Index rows = d.queries * static_cast<Index>(o_.context.size());
      needs_[Use::results] =
          rows * (o_.latent ? 2 * o_.latent->model : d.query_heads * (d.d_v + 1)) * each;
      if (o_.latent) {  // to add y up
        const Reduction of_y(all_ranks(world_.size()), hosts_, rows * o_.latent->model,
                             o_.verify_wire);
        needs_[Use::staging] += of_y.scratch(world_.rank()) * each;
        if (o_.verify_wire) {  // of y or of an exchange, whichever has more
          needs_[Use::envelopes] +=
              std::max<Index>(of_y.messages(world_.rank()), 2 * (world_.size() - 1)) *
              kEnvelopeBytes;
        }
      }
    });
    refuse_beyond(ranks);
    return {mesh_, needs_};
  }

 private:
  /// Collective: refuses what is more than --memory or the hosts have.
  void refuse_beyond(const std::vector<RankReport>& ranks) {
    const auto all = world_.all_gather(nlohmann::json(needs_.bytes).dump());
    together(world_, [&] {
      if (world_.rank() != 0) return;
      std::vector<Needs> needs;
      for (const std::string& text : all) {
        needs.push_back({nlohmann::json::parse(text).get<decltype(Needs::bytes)>()});
      }
      const std::vector<Room> rooms = rooms_of(ranks);
      if (fits(needs, rooms, o_.memory)) return;
      std::fputs(memory_table(needs, rooms, o_.memory).c_str(), stderr);
      Index most = 0;
      for (const Needs& one : needs) most = std::max(most, one.sum());
      Index may = bytes_a_rank(ranks);
      if (o_.memory > 0 && (may == 0 || o_.memory < may)) may = o_.memory;
      throw Failure(
          Exit::memory,
          fmt::format("{} needs {} on a rank, which has {}; use more hosts, fewer "
                      "ranks on this one, a larger --memory, a smaller --context, --prefix-tree or "
                      "--batch, or another --form",
                      o_.form_name, in_bytes(most), in_bytes(may)));
    });
  }

  /// The prefill has all heads, and is over, but for its rows and y, when the layer is made.
  void settle_prefill() {
    const LatentSizes& s = *o_.latent;
    const int ranks = world_.size();
    Index tokens = 0;
    for (const Stretch& stretch : o_.decoding.stretches(o_.context)) {
      tokens += (stretch.keys.size() + ranks - 1) / ranks;
    }
    const Index all = weight_bytes(s.heads);
    const Index held = o_.weight_type == Type::bf16 ? all / 2 : all;
    const Index made = o_.slicing || o_.weight_type == Type::bf16 ? 2 * all : all;
    needs_[Use::inputs] +=
        tokens * (s.row() * bytes_of(o_.decoding.type) + s.model * bytes_of(Type::f4));
    // Prefill is over before decoding begins: what it needs beyond that counts.
    const Index at_most =
        std::max(made, held + prefill_bytes(s, o_.decoding, o_.context, ranks, o_.threads));
    needs_[Use::kernels] += std::max<Index>(0, at_most - needs_.sum());
  }

  void settle_form() {
    const Shape shape{1, 1, o_.decoding.query_heads, o_.decoding.key_heads, o_.decoding.value_heads,
                      1, 1};
    mesh_ = o_.mesh ? *o_.mesh : o_.form->mesh(world_.size(), shape);
    if (mesh_.ranks() != world_.size()) {
      throw Failure(Exit::usage, fmt::format("--mesh: a mesh of {} has {} ranks, but there are {}",
                                             mesh_.text(), mesh_.ranks(), world_.size()));
    }
    const Problem problem = decoding_problem(o_.decoding, mesh_).across(hosts_);
    if (const auto why = o_.form->refuses(problem)) {
      throw Failure(Exit::usage, fmt::format("--form: {} {}", o_.form->name, *why));
    }
    const Program program = o_.form->program(problem, world_.rank());
    needs_ =
        needs_of(problem, program, nullptr,
                 {.kernels = [this](const Problem& p,
                                    const Program& of) { return kernel_bytes(p, of, o_.threads); },
                  .check = {},
                  .verifies = o_.verify_wire});
    const auto block = [&](SlotId slot) -> const Block& {
      return program.slots[static_cast<std::size_t>(slot)].block;
    };
    if (!o_.decoding.masks.empty()) {
      for (const Kind kind : {Kind::K, Kind::V}) {
        needs_[Use::inputs] -=
            bytes_of(block(program.input(kind)), problem.shape(), problem.type());
      }
      needs_[Use::inputs] += ragged_bytes(o_.decoding, problem, program, o_.context);
      return;
    }
    needs_[Use::inputs] +=
        o_.decoding.keys() * static_cast<Index>(sizeof(Index));  // rows of tokens
    if (!o_.latent) return;
    needs_[Use::inputs] -=
        bytes_of(block(program.input(Kind::V)), problem.shape(), problem.type());  // is in K
    const Index heads = std::max(block(program.input(Kind::Q)).head_count(),
                                 program.result(Kind::O).block.head_count());
    if (o_.values == Values::before) {  // W_UV of all heads, and Partials of all before and after
      const LatentSizes& s = *o_.latent;
      const Index rows = o_.decoding.queries * static_cast<Index>(o_.context.size());
      needs_[Use::inputs] += s.heads * s.kv_rank * s.d_v * bytes_of(o_.weight_type);
      needs_[Use::kernels] +=
          rows * s.heads * (s.kv_rank + 3 * record_length(s.d_v)) * bytes_of(Type::f4);
    }
    if (o_.weight_type == Type::f4) {
      needs_[Use::weights] = weight_bytes(heads);
    } else {  // made in float, then rounded matrix by matrix, before there is anything in the cache
      const LatentSizes& s = *o_.latent;
      const Index largest = heads * std::max(s.q_width() * s.d_qk(), s.d_v * s.model);
      needs_[Use::weights] =
          std::max(weight_bytes(heads) / 2,
                   weight_bytes(heads) + largest * bytes_of(Type::bf16) - needs_.sum());
    }
  }

  void settle_slices() {
    if (const auto why = complaint(*o_.slicing, *o_.latent, world_.size())) {
      throw Failure(Exit::usage, "--slices, --basis: " + *why);
    }
    const int parts = world_.size() / o_.slicing->slices;
    mesh_ = {{{"heads", parts}, {"latent", o_.slicing->slices}}};
    const Index heads = (o_.latent->heads + parts - 1) / parts;
    const Index latent = (o_.latent->kv_rank + o_.slicing->slices - 1) / o_.slicing->slices;
    // The weights are cut from those of the whole latent.
    needs_[Use::weights] = 2 * weight_bytes(heads);
    needs_[Use::inputs] =
        o_.decoding.keys() * (latent + o_.latent->d_rope) * bytes_of(o_.decoding.type);
    const std::vector<int> group = ranks_with_the_same_heads(world_.rank(), o_.slicing->slices);
    const Index rows = o_.decoding.queries * static_cast<Index>(o_.context.size());
    needs_[Use::kernels] =
        step_bytes(*o_.slicing, *o_.latent, o_.decoding, rows, heads, o_.threads);
    const Reduction of_slices(group, hosts_,
                              summed_over_slices(*o_.slicing, *o_.latent, o_.decoding, rows, heads),
                              o_.verify_wire);
    needs_[Use::staging] +=
        of_slices.scratch(world_.rank() % o_.slicing->slices) * bytes_of(Type::f4);
  }

  Index weight_bytes(Index heads) const {
    const LatentSizes& s = *o_.latent;
    const Index down = s.model * (s.q_rank + s.row());  // once more: the columns of a rank
    const Index numbers =
        down + down / world_.size() +
        heads * (s.q_width() * s.d_qk() + s.kv_rank * (s.d_nope + s.d_v) + s.d_v * s.model);
    return numbers * static_cast<Index>(sizeof(float));
  }

  comm::Communicator& world_;
  const DecodeOptions& o_;
  const Hosts& hosts_;
  Mesh mesh_;
  Needs needs_;  ///< of this rank
};

}  // namespace

DecodePlace settle_decoding(comm::Communicator& world, const DecodeOptions& options,
                            const Hosts& hosts) {
  return Settling(world, options, hosts).settle();
}

}  // namespace dattn
