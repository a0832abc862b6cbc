#include <fmt/format.h>

#include "kernels/latent/sizes.hpp"
#include "kernels/mask.hpp"
#include "launcher/commands.hpp"
#include "launcher/output_file.hpp"
#include "launcher/values.hpp"
#include "parallel/decode_forms.hpp"
#include "parallel/strategies.hpp"

namespace dattn {

Exit list_command(const std::vector<std::string>& arguments) {
  boost::program_options::options_description options("dattn list");
  options.add_options()("help", "this text");
  const auto values = parse("dattn list", options, arguments);
  if (values.count("help") != 0) {
    write_text_file("-",
                    "dattn list: strategies, partitions, masks, forms of decoding and sizes of "
                    "layers, with what each requires\n");
    return Exit::ok;
  }
  std::string text = fmt::format("Strategies (--strategy; auto picks by forecast)\n");
  for (const Strategy& s : strategies()) {
    text += fmt::format("  {:<20} {}\n  {:<20} requires {}\n", s.name, s.summary, "", s.requires_);
  }
  text += fmt::format("\nForms of decoding (dattn decode --form)\n");
  for (const Strategy& s : decode_forms()) {
    text += fmt::format("  {:<20} {}\n  {:<20} requires {}\n", s.name, s.summary, "", s.requires_);
  }
  for (const auto& [name, summary] :
       {std::pair{"latent-exact",
                  "each rank has some dims of each latent; partial scores are added up, then one "
                  "softmax"},
        std::pair{
            "latent-tpla",
            "each rank has some dims of each latent and a softmax of its own: APPROXIMATE"}}) {
    text += fmt::format(
        "  {:<20} {}\n  {:<20} requires latent attention; --slices that divide the "
        "ranks\n",
        name, summary, "");
  }
  text += fmt::format("\nLayers of latent attention (dattn decode --model)\n");
  for (const LatentModel& m : latent_models()) {
    const LatentSizes& s = m.sizes;
    text += fmt::format(
        "  {:<20} hidden {}, {} heads, q-rank {}, kv-rank {}, nope-dim {}, rope-dim {}, v-dim {}\n",
        m.name, s.model, s.heads, s.q_rank, s.kv_rank, s.d_nope, s.d_rope, s.d_v);
  }
  text += fmt::format("\nPartitions (--partition; auto picks by forecast)\n");
  for (const PartitionKind& p : partition_kinds()) {
    text += fmt::format("  {:<20} {}\n  {:<20} requires nothing: any ranks, any length\n", p.name,
                        p.summary, "");
  }
  text += fmt::format("\nMasks (--mask)\n");
  for (const MaskKind& m : mask_kinds()) {
    const bool wide = m.form.size() > 20;  // a line of its own
    text += wide ? fmt::format("  {}\n", m.form) : "";
    text += fmt::format("  {:<20} {}\n  {:<20} requires {}\n", wide ? "" : m.form, m.summary, "",
                        m.requires_);
  }
  text += fmt::format(
      "  {:<20} both allow it; binds tighter than /\n  {:<20} either allows it; parentheses group\n"
      "  {:<20} head ranges with masks of their own, all heads in order\n",
      "A+B", "A/B", "A@0-3;B@4-7");
  write_text_file("-", text);
  return Exit::ok;
}

}  // namespace dattn
