#pragma once

#include "launcher/decode_options.hpp"

namespace dattn {

/// --mask, --head-masks and --layer of dattn decode.
boost::program_options::options_description decode_mask_options();

/// Sets the words of the mask and, unless all tokens see all that is before them, the masks of the
/// sequences, each made for what its sequence may reach. Returns the files that say so.
/// @pre o.decoding is sound
/// @throws Failure(usage or input) with what is wrong and the fix
std::vector<std::string> read_decode_masks(const boost::program_options::variables_map& values,
                                           DecodeOptions& o);

}  // namespace dattn
