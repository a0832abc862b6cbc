#include "launcher/npy.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "launcher/failure.hpp"
#include "tests/launcher/complaint.hpp"

namespace dattn {
namespace {

using std::string_literals::operator""s;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;
using Type = NpyHeader::Type;

/// A file in format 1.0 or 2.0 around the text of its dictionary, newline included.
std::string npy(const std::string& dictionary, int major = 1) {
  std::string out = "\x93NUMPY" + std::string(1, static_cast<char>(major)) + '\0';
  for (int i = 0; i < (major == 1 ? 2 : 4); ++i) {
    out += static_cast<char>(dictionary.size() >> (8 * i) & 0xff);
  }
  return out + dictionary;
}

/// The usual dictionary with one of its three values replaced.
std::string with(const std::string& descr, const std::string& order, const std::string& shape) {
  return "{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + ", }\n";
}

NpyHeader parse(const std::string& file, std::int64_t more_bytes = 0) {
  return parse_npy_header(std::as_bytes(std::span(file)), std::ssize(file) + more_bytes, "x.npy");
}

struct Bad {
  std::string file, message;
};

TEST(NpyHeader, RefusesEachBadHeaderWithItsOwnLine) {
  const std::string good = with("'<f4'", "False", "(2, 3)");
  const auto shape = [](const std::string& text) { return npy(with("'<f4'", "False", text)); };
  const auto descr = [](const std::string& text) { return npy(with(text, "False", "(2, 3)")); };
  const Bad table[] = {
      {"", "is empty (0 bytes)"},
      {"\x93NUM", "wrong magic"},
      {"NUMPY\x01\x00"s, "wrong magic"},
      {"\x93NUMPX\x01\x00"s, "wrong magic"},
      {"PK\x03\x04 and so on", "zip file (.npz)"},
      {"\x93NUMPY", "ends within its first 8 bytes"},
      {"\x93NUMPY\x01\x00\x10"s, "ends within its header length"},
      {"\x93NUMPY\x02\x00\x10\x00"s, "ends within its header length"},
      {npy(good, 0), "format version 0.0, not 1.0 or 2.0"},
      {npy(good, 3), "format version 3.0, not 1.0 or 2.0"},
      {npy(good, 4), "format version 4.0, not 1.0 or 2.0"},
      {"\x93NUMPY\x01\x01\x10\x00"s + good, "format version 1.1"},
      {npy(""), "header of 0 bytes"},
      {"\x93NUMPY\x01\x00\xff\xff"s + good, "ends within its header"},
      {"\x93NUMPY\x02\x00\x00\x10\x00\x00"s + good, "ends within its header"},
      {"\x93NUMPY\x02\x00\xff\xff\xff\xff"s + good, "4294967295 bytes, more than 1 MiB"},
      {npy(good.substr(0, good.size() - 1)), "does not end in a newline"},
      {npy("\n"), "does not start with '{'"},
      {npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), \n"),
       "lacks the quoted text"},
      {npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)\n"), "',' or '}' is missing"},
      {npy("{'descr': '<f4' 'fortran_order': False}\n"), "',' or '}' is missing"},
      {npy("{, 'descr': '<f4'}\n"), "lacks the quoted text of a key"},
      {npy("{'descr' '<f4'}\n"), "':' is missing after the key 'descr'"},
      {npy("{'descr: 1}\n"), "has no end"},
      {npy("{'de\\scr': 1}\n"), "has a backslash"},
      {npy("{'descr': '<f4', 'descr': '<f4'}\n"), "the key 'descr' twice"},
      {npy("{'fortran_order': False, 'fortran_order': False}\n"), "the key 'fortran_order' twice"},
      {npy("{'shape': (2,), 'shape': (2,)}\n"), "the key 'shape' twice"},
      {npy("{'colour\n\x1b[31m': 1}\n"), "the unknown key 'colour\\n\\x1b[31m'"},
      {npy("{}\n"), "has no 'descr'"},
      {npy("{'descr': '<f4'}\n"), "has no 'fortran_order'"},
      {npy("{'descr': '<f4', 'fortran_order': False}\n"), "has no 'shape'"},
      {npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)} x\n"), "more text after"},
      {npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}\0\n"s), "more text after"},
      {npy(with("'<f4'", "True", "(2, 3)")), "numpy.ascontiguousarray"},
      {npy(with("'<f4'", "0", "(2, 3)")), "neither True nor False"},
      {npy(with("'<f4'", "Falsehood", "(2, 3)")), "',' or '}' is missing"},
      {descr("'>f4'"), "big-endian floats ('>f4')"},
      {descr("'<i4'"), "signed integers ('<i4')"},
      {descr("'|u1'"), "unsigned integers"},
      {descr("'|b1'"), "booleans"},
      {descr("'|O'"), "Python objects"},
      {descr("'<c8'"), "complex numbers"},
      {descr("'|S5'"), "byte strings"},
      {descr("'<U5'"), "texts"},
      {descr("'<M8[ns]'"), "dates"},
      {descr("'<m8[ns]'"), "time spans"},
      {descr("'|V2'"), "raw bytes (what bfloat16 turns into"},
      {descr("'<f16'"), "elements of an unknown type ('<f16')"},
      {descr("'|f4'"), "elements of an unknown type"},
      {descr("'<'"), "elements of an unknown type"},
      {descr("''"), "elements of an unknown type ('')"},
      {descr("[('a', '<f4'), ('b', '<f4')]"), "records (structured dtype)"},
      {descr("('<f4', (2,))"), "records (structured dtype)"},
      {descr("4"), "lacks the quoted text of 'descr'"},
      {shape("()"), "holds a single number (shape ())"},
      {shape("5"), "'shape' is not a tuple"},
      {shape("[2, 3]"), "'shape' is not a tuple"},
      {shape("(6)"), "lacks the ',' that makes it a tuple"},
      {shape("(2 3)"), "lacks the ','"},
      {shape("(2, 3 4)"), "lacks ',' or ')'"},
      {shape("(2, 3"), "not a number"},
      {shape("(,)"), "not a number"},
      {shape("(2,,3)"), "not a number"},
      {shape("(2.0, 3)"), "lacks"},
      {shape("(2, 3L)"), "lacks ',' or ')'"},
      {shape("(2, +3)"), "not a number"},
      {shape("(-2, 3)"), "a negative number"},
      {shape("(-2, -3)"), "a negative number"},
      {shape("(02, 3)"), "a leading zero"},
      {shape("(2**63, 3)"), "lacks"},
      {shape("(9223372036854775808,)"), "does not fit into 64 bits"},
      {shape("(1" + std::string(300, '0') + ",)"), "does not fit into 64 bits"},
      {shape("(9223372036854775807,)"), "more than 2^63 bytes"},
      {shape("(4294967296, 4294967296)"), "more than 2^63 bytes"},
      {shape("(0, 4294967296, 4294967296)"), "more than 2^63 bytes"},
      {shape("(1, 1, 1, 1, 1, 1, 1, 1, 1)"), "more than 8 dimensions"},
      {npy(good), "is cut short: 0 bytes of data, 'shape' needs 24"},
      {npy(good) + std::string(23, 'd'), "is cut short: 23 bytes"},
      {npy(good) + std::string(25, 'd'), "goes on after its array: 25 bytes"},
      {shape("(0,)") + "d", "goes on after its array: 1 bytes"},
  };
  for (const Bad& bad : table) {
    const std::string line = complaint(Exit::input, [&] { parse(bad.file); });
    EXPECT_THAT(line, StartsWith("'x.npy': "));
    EXPECT_THAT(line, HasSubstr(bad.message));
    EXPECT_THAT(line, HasSubstr("; fix: "));
  }
}

TEST(NpyHeader, AcceptsWhatPythonWouldRead) {
  const std::string dictionaries[] = {
      with("'<f4'", "False", "(2, 3)"),
      with("'=f4'", "False", "(2,3,)"),
      "{\"shape\":(2,3),\"descr\":\"<f4\",\"fortran_order\":False}\n",
      " {  'fortran_order' : False , 'shape' : ( 2 , 3 , ) , 'descr' : '<f4' , } \n \n",
  };
  for (const std::string& dictionary : dictionaries) {
    for (const int major : {1, 2}) {
      const std::string file = npy(dictionary, major);
      const NpyHeader header = parse(file, 24);
      EXPECT_EQ(header.type, Type::f4);
      EXPECT_THAT(header.shape, ElementsAre(2, 3));
      EXPECT_EQ(header.data_offset, std::ssize(file));
    }
  }
}

TEST(NpyHeader, ReadsOtherTypesAndShapes) {
  EXPECT_EQ(parse(npy(with("'<f2'", "False", "(5,)")), 10).type, Type::f2);
  EXPECT_EQ(parse(npy(with("'<f8'", "False", "(5,)")), 40).type, Type::f8);
  // Not 2621401: a comma is never a thousands separator.
  const std::int64_t elements = std::int64_t{2} * 621 * 401;
  EXPECT_THAT(parse(npy(with("'<f2'", "False", "(2,621,401)")), elements * 2).shape,
              ElementsAre(2, 621, 401));
  EXPECT_THAT(parse(npy(with("'<f4'", "False", "(0, 3)"))).shape, ElementsAre(0, 3));
  EXPECT_EQ(parse(npy(with("'<f4'", "False", "(1, 1, 1, 1, 1, 1, 1, 2)")), 8).shape.size(), 8U);
  const std::int64_t big = std::int64_t{1} << 40;
  EXPECT_THAT(parse(npy(with("'<f4'", "False", "(1099511627776, 2)")), 8 * big).shape,
              ElementsAre(big, 2));
}

/// Taken from numpy.save of NumPy 1.24.2.
TEST(NpyHeader, WritesTheBytesOfNumpySave) {
  struct Case {
    Type type;
    std::vector<std::int64_t> shape;
    std::string text;
    std::size_t size;
  };
  const std::int64_t huge = std::int64_t{1} << 60;
  const Case table[] = {
      {Type::f4, {2, 3}, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 128},
      {Type::f2, {5}, "{'descr': '<f2', 'fortran_order': False, 'shape': (5,), }", 128},
      {Type::f8,
       {1, 2, 3, 4},
       "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 2, 3, 4), }",
       128},
      {Type::f4, {0, 3}, "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3), }", 128},
      {Type::f4,
       {65536, 8, 128},
       "{'descr': '<f4', 'fortran_order': False, 'shape': (65536, 8, 128), }",
       128},
      {Type::f4,
       {1, 1, 1, 1, 1, 1, 1, 1},
       "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1, 1), }",
       128},
      {Type::f8,
       {huge},
       "{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }",
       128},
      {Type::f2,
       {1000000000, 1000000},
       "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000, 1000000), }",
       128},
      {Type::f2,
       {100, 200, 300, 400, 500, 600, 700, 0},
       "{'descr': '<f2', 'fortran_order': False, 'shape': (100, 200, 300, 400, 500, 600, 700, 0), "
       "}",
       128},
      {Type::f4,
       {7, 1000000, 1000000, 1000000, 1000000, 1},
       "{'descr': '<f4', 'fortran_order': False, 'shape': (7, 1000000, 1000000, 1000000, 1000000, "
       "1), }",
       128},
      {Type::f4,
       {7, 1000000, 1000000, 1000000, 1000000, 10},
       "{'descr': '<f4', 'fortran_order': False, 'shape': (7, 1000000, 1000000, 1000000, 1000000, "
       "10), }",
       128},
      {Type::f4,
       {7, 1000000, 1000000, 1000000, 1000000, 100},
       "{'descr': '<f4', 'fortran_order': False, 'shape': (7, 1000000, 1000000, 1000000, 1000000, "
       "100), }",
       192},
      {Type::f4,
       {7, 1000000, 1000000, 1000000, 1000000, 1000},
       "{'descr': '<f4', 'fortran_order': False, 'shape': (7, 1000000, 1000000, 1000000, 1000000, "
       "1000), }",
       192},
  };
  for (const Case& c : table) {
    const std::string header = npy_header(c.type, c.shape);
    std::string expected = "\x93NUMPY\x01\x00"s + static_cast<char>(c.size - 10) + '\0' + c.text;
    expected.resize(c.size - 1, ' ');
    expected += '\n';
    EXPECT_EQ(header, expected);
  }
  EXPECT_THROW(npy_header(Type::f4, {}), Failure);
}

TEST(NpyHeader, ParsesWhatItWrites) {
  const std::vector<std::int64_t> shape = {7, 1, 3};
  for (const Type type : {Type::f2, Type::f4, Type::f8}) {
    const NpyHeader header = parse(npy_header(type, shape), 21 * npy_item_bytes(type));
    EXPECT_EQ(header.type, type);
    EXPECT_EQ(header.shape, shape);
    EXPECT_EQ(header.data_offset % 64, 0);
  }
}

TEST(Half, ConvertsEveryValueExactly) {
  for (unsigned half = 0; half < 0x10000; ++half) {
    const float got = half_to_float(static_cast<std::uint16_t>(half));
    const int exponent = static_cast<int>(half >> 10U & 0x1fU);
    const int fraction = static_cast<int>(half & 0x3ffU);
    EXPECT_EQ(std::signbit(got), half >= 0x8000) << half;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(got), fraction != 0) << half;
      EXPECT_EQ(std::isinf(got), fraction == 0) << half;
    } else {
      const int significand = exponent == 0 ? fraction : fraction + 1024;
      EXPECT_EQ(std::fabs(got), std::ldexp(significand, std::max(exponent, 1) - 25)) << half;
    }
  }
}

}  // namespace
}  // namespace dattn
