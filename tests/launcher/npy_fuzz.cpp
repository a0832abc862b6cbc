// Feeds arbitrary bytes to parse_npy_header; run by libFuzzer (see CMakeLists.txt).
// The first byte of an input chooses the file size, the rest is the front of the file.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "launcher/npy.hpp"

namespace {

using dattn::NpyHeader;

void require(bool holds) {
  if (!holds) std::abort();
}

std::string file_of(const std::string& dictionary, int major) {
  std::string out = "\x93NUMPY" + std::string(1, static_cast<char>(major)) + '\0';
  for (int i = 0; i < (major == 1 ? 2 : 4); ++i) {
    out += static_cast<char>(dictionary.size() >> (8 * i) & 0xff);
  }
  return out + dictionary;
}

std::vector<std::string> seeds() {
  const auto with = [](const std::string& descr, const std::string& order,
                       const std::string& shape) {
    return "{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + ", }\n";
  };
  std::vector<std::string> dictionaries;
  for (const char* descr : {"'<f2'", "'<f4'", "'=f8'", "'>f4'", "'|O'", "'<i8'", "'|V2'", "''",
                            "[('a', '<f4')]", "\"<f4\""}) {
    dictionaries.push_back(with(descr, "False", "(2, 3)"));
  }
  for (const char* shape :
       {"()", "(0,)", "(5,)", "(-1, 2)", "(2,621,401)", "(9223372036854775808,)", "(2**63,)",
        "(4294967296, 4294967296)", "(0, 9223372036854775807)", "(2, 3", "(2,,3)", "[2]", "(2)",
        "(1, 1, 1, 1, 1, 1, 1, 1)", "(1, 1, 1, 1, 1, 1, 1, 1, 1)"}) {
    dictionaries.push_back(with("'<f4'", "False", shape));
  }
  dictionaries.push_back(with("'<f4'", "True", "(2, 3)"));
  dictionaries.push_back("{'descr': '<f4', 'descr': '<f4'}\n");
  dictionaries.push_back("{\"shape\":(2,3),\"descr\":\"<f4\",\"fortran_order\":False}\n");
  dictionaries.push_back("{'colour': 1}\n");
  dictionaries.push_back("");
  dictionaries.push_back("{}");
  std::vector<std::string> out = {"\x93NUMPY", "PK\x03\x04", file_of("{}\n", 3)};
  for (const std::string& dictionary : dictionaries) {
    for (const int major : {1, 2}) out.push_back(file_of(dictionary, major));
  }
  return out;
}

}  // namespace

/// Writes the seeds into the corpus folder (the first argument without a dash) if that is new.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  namespace fs = std::filesystem;
  for (int i = 1; i < *argc; ++i) {
    const std::string folder = (*argv)[i];
    if (folder.empty() || folder[0] == '-') continue;
    if (!fs::create_directories(folder)) break;
    int number = 0;
    for (const std::string& seed : seeds()) {
      for (const char sizing : {'\0', '\x18', '\xff'}) {
        const fs::path path = fs::path(folder) / ("seed" + std::to_string(number++));
        std::ofstream(path, std::ios::binary) << sizing << seed;
      }
    }
    break;
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const auto front = std::as_bytes(std::span(data, size)).subspan(1);
  const std::int64_t held = std::ssize(front);
  // Mostly small files that can be right to the byte, and some that are as large as a file can be.
  const std::int64_t file_size = data[0] == 255   ? INT64_MAX
                                 : data[0] == 254 ? held + (std::int64_t{1} << 40)
                                                  : held + data[0];
  try {
    const NpyHeader header = dattn::parse_npy_header(front, file_size, "fuzz.npy");
    require(!header.shape.empty() && header.shape.size() <= 8);
    std::int64_t bytes = dattn::npy_item_bytes(header.type);
    for (const std::int64_t extent : header.shape) {
      require(extent >= 0 && !__builtin_mul_overflow(bytes, extent, &bytes));
    }
    require(header.data_offset > 0 && header.data_offset <= held);
    require(header.data_offset + bytes == file_size);

    // What we write for this header must read back as the same.
    const std::string written = dattn::npy_header(header.type, header.shape);
    const NpyHeader again = dattn::parse_npy_header(std::as_bytes(std::span(written)),
                                                    std::ssize(written) + bytes, "again.npy");
    require(again.type == header.type && again.shape == header.shape);
  } catch (const dattn::Failure& failure) {
    const std::string line = failure.what();
    require(failure.code == dattn::Exit::input);
    require(line.starts_with("'fuzz.npy': ") && line.find("; fix: ") != std::string::npos);
    require(line.find_first_of("\n\r") == std::string::npos && line.size() < 500);
  }
  return 0;
}
