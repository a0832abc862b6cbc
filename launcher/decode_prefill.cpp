#include "launcher/decode_prefill.hpp"

#include <fmt/format.h>

#include <array>

#include "launcher/report.hpp"
#include "launcher/together.hpp"
#include "launcher/watch.hpp"

namespace dattn {

DecodePrefill::DecodePrefill(comm::Communicator& world, const DecodeOptions& options,
                             const std::function<LatentWeights()>& weights,
                             const MakeWeights& model, const Hidden& hidden,
                             const EngineOptions& engine, const Hosts& hosts)
    : world_(world), options_(options) {
  together(world, [&] {
    prefill_.emplace(*options.latent, weights(), options.decoding, options.context, world, engine,
                     options.weight_type, hosts);
    prefill_->make(hidden);
  });
  note_program(world, prefill_->program());
  world.barrier();
  times_ = prefill_->run();
  if (options.check) {
    verdict_ =
        check_prefill(world, model, options.decoding, options.context, hidden, prefill_->y());
    if (options.slicing && options.weight_type == Type::bf16) verdict_->bound = 8e-3;
  }
}

void DecodePrefill::sum(const HandOver& done) {
  std::array<double, 5> slowest{times_.seconds, times_.project, times_.attention.compute,
                                times_.attention.wait, done.seconds};
  world_.all_reduce_max(std::span<double>(slowest));
  std::array<std::int64_t, 5> sums{times_.bytes_sent, times_.messages, done.bytes_sent,
                                   done.messages, times_.between_hosts};
  world_.all_reduce_sum(std::span<std::int64_t>(sums));
  json_ = {{"seconds", slowest[0]},
           {"project_seconds", slowest[1]},
           {"attention_seconds", slowest[2]},
           {"wait_seconds", slowest[3]},
           {"ring_bytes", sums[0]},
           {"ring_messages", sums[1]},
           {"ring_bytes_between_hosts", sums[4]},
           {"hand_over_seconds", slowest[4]},
           {"hand_over_bytes", sums[2]},
           {"hand_over_messages", sums[3]}};
  if (verdict_) {
    json_["check"] = {
        {"error", verdict_->error}, {"bound", verdict_->bound}, {"passed", verdict_->passed()}};
  }
}

std::string DecodePrefill::text() const {
  std::string text = fmt::format(
      "prefill: {:.6f} s (exposed wait {:.6f}), a ring of latents, proved, sends {} in {} "
      "messages; handed over in {:.6f} s, {} in {} messages\n",
      json_["seconds"].get<double>(), json_["wait_seconds"].get<double>(),
      in_bytes(json_["ring_bytes"].get<Index>()), json_["ring_messages"].get<Index>(),
      json_["hand_over_seconds"].get<double>(), in_bytes(json_["hand_over_bytes"].get<Index>()),
      json_["hand_over_messages"].get<Index>());
  if (verdict_) {
    text += fmt::format(
        "check: the layer's y of all tokens of the prefill, ||X-Xref||/||Xref|| = {:.3e} (bound "
        "{:.0e}) ...... {}\n",
        verdict_->error, verdict_->bound, verdict_->passed() ? "PASSED" : "FAILED");
  }
  return text;
}

}  // namespace dattn
