// dattn permute: tokens of a grid from row by row to tile by tile, as neighbor masks with tiles
// number them, and back.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "kernels/settings.hpp"
#include "kernels/tiled_grid.hpp"
#include "launcher/commands.hpp"
#include "launcher/npy.hpp"
#include "launcher/options.hpp"
#include "launcher/output_file.hpp"
#include "launcher/values.hpp"

namespace dattn {
namespace {

namespace po = boost::program_options;

/// Bytes that are held at a time, if a row is not more.
constexpr Index kBytes = Index{8} << 20;
constexpr Index kMostTokens = Index{1} << 60;

/// One to three lengths joined by 'x'.
std::vector<Index> lengths_of(const po::variables_map& values, const std::string& name) {
  if (values.count(name) == 0) {
    throw Failure(Exit::usage,
                  "--" + name + ": is missing; give one to three lengths, as in 32x48");
  }
  const std::string& text = values[name].as<std::string>();
  std::vector<Index> lengths;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find('x', at), text.size());
    try {
      lengths.push_back(parse_count(text.substr(at, end - at), 1));
    } catch (const BadValue& e) {
      throw Failure(Exit::usage, "--" + name + ": " + e.complaint);
    }
    at = end + 1;
  }
  if (lengths.size() > TiledGrid::kMostDims) {
    throw Failure(Exit::usage,
                  fmt::format("--{}: one to three lengths, not {}", name, lengths.size()));
  }
  return lengths;
}

std::string named_file(const po::variables_map& values, const char* name) {
  const std::string file = file_name(values, name);
  if (file.empty() || file == "-") {
    throw Failure(Exit::usage, fmt::format("--{}: give the name of a NumPy file", name));
  }
  return file;
}

/// Writes the rows in their new order, a piece of the file at a time.
void write_rows(const TiledGrid& grid, bool inverse, const NpyReader& in, Index row_bytes,
                const OutputFile& out, Index offset) {
  const auto source = [&](Index row) {
    return inverse ? grid.position(grid.of_row_major(row)) : grid.row_major(grid.point(row));
  };
  const Index most = std::max<Index>(1, kBytes / row_bytes);
  std::vector<std::byte> bytes(static_cast<std::size_t>(std::min(most, grid.size()) * row_bytes));
  for (Range rows{0, 0}; rows.end < grid.size();) {
    rows = {rows.end, std::min(grid.size(), rows.end + most)};
    // Rows that lie side by side in both files are read at once.
    for (Index row = rows.begin; row < rows.end;) {
      const Index first = source(row);
      Index count = 1;
      while (row + count < rows.end && source(row + count) == first + count) ++count;
      in.read_row_bytes(
          first, std::span(bytes).subspan(static_cast<std::size_t>((row - rows.begin) * row_bytes),
                                          static_cast<std::size_t>(count * row_bytes)));
      row += count;
    }
    out.write_at(offset + rows.begin * row_bytes,
                 std::span(bytes).first(static_cast<std::size_t>(rows.size() * row_bytes)));
  }
}

}  // namespace

Exit permute_command(const std::vector<std::string>& arguments) {
  po::options_description options(
      "dattn permute: tokens of a grid, row by row, numbered tile by tile as a mask "
      "neighbor:dims=...,tile=... takes them");
  options.add_options()                                                                          //
      ("dims", po::value<std::string>(), "lengths of the grid, one to three, e.g. 32x48")        //
      ("tile", po::value<std::string>(), "lengths of a tile, as many or one for all, e.g. 8x8")  //
      ("in", po::value<std::string>(),
       "NumPy file [tokens, ...] of f2, f4, f8, i4 or i8; the other dimensions move as they are")  //
      ("out", po::value<std::string>(), "NumPy file to write, of the same shape and type")  //
      ("inverse", "from tile by tile back to row by row")                                   //
      ("help", "this text");
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    return print_help(options);
  }
  const po::variables_map values = parse("dattn permute", options, arguments);
  const std::vector<Index> dims = lengths_of(values, "dims");
  std::vector<Index> tile = lengths_of(values, "tile");
  if (tile.size() == 1) tile.resize(dims.size(), tile[0]);
  if (tile.size() != dims.size()) {
    throw Failure(Exit::usage, fmt::format("--tile: {} lengths where --dims has {}; give as many, "
                                           "or one for all",
                                           tile.size(), dims.size()));
  }
  Index tokens = 1;
  for (const Index n : dims) {
    if (n > kMostTokens / tokens) throw Failure(Exit::usage, "--dims: more than 2^60 tokens");
    tokens *= n;
  }
  const std::string from = named_file(values, "in");
  const std::string to = named_file(values, "out");
  const std::string inputs[] = {from};
  const std::string outputs[] = {to};
  refuse_same_file(inputs, outputs);
  const NpyReader in(from, NpyKind::numbers);
  if (in.rows() != tokens) {
    throw Failure(Exit::input, fmt::format("{} has {} tokens (its first dimension), but --dims {} "
                                           "has {}",
                                           quoted_path(from), in.rows(), joined(dims), tokens));
  }
  refuse_unwritable(to);
  const std::string header = npy_header(in.header().type, in.header().shape);
  const Index row_bytes = in.row_size() * npy_item_bytes(in.header().type);
  const auto front = static_cast<Index>(header.size());
  OutputFile out =
      OutputFile::create(to, front + tokens * row_bytes, std::to_string(::getpid()), header);
  const bool inverse = values.count("inverse") != 0;
  // A file of rows without bytes may have any number of them.
  if (row_bytes > 0) write_rows(TiledGrid(dims, tile), inverse, in, row_bytes, out, front);
  out.sync();
  write_text_file(
      "-", fmt::format("{}: {} tokens of a grid {}, from {} to {}\n", to, tokens, joined(dims),
                       inverse ? "tiles" : "rows", inverse ? "rows" : "tiles"));
  out.commit();  // last: a line that cannot be written leaves no file behind
  return Exit::ok;
}

}  // namespace dattn
