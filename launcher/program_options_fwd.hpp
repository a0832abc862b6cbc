#pragma once

/// What headers need of Boost.Program_options, which itself is a second of compiling.
namespace boost::program_options {

class options_description;
class variables_map;

}  // namespace boost::program_options
