#include <fmt/format.h>

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
                    "dattn list: strategies, partitions, masks and forms of decoding, with what "
                    "each requires\n");
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
