#include "launcher/tensors.hpp"

#include "kernels/in_parts.hpp"
#include "kernels/random.hpp"
#include "launcher/failure.hpp"

namespace dattn {
namespace {

std::shared_ptr<const NpyReader> open(const std::string& path) {
  auto file = std::make_shared<const NpyReader>(path);
  const auto& shape = file->header().shape;
  if (shape.size() != 3) {
    throw Failure(Exit::input, quoted_path(path) + " has " + std::to_string(shape.size()) +
                                   " dimensions; it must have three, [tokens, heads, dim]");
  }
  for (const std::int64_t extent : shape) {
    if (extent < 1) {
      throw Failure(Exit::input, quoted_path(path) +
                                     " is empty; tokens, heads and dim must be "
                                     "at least 1");
    }
  }
  return file;
}

void require_equal(const NpyReader& a, const NpyReader& b, std::size_t axis, const char* what) {
  const auto in_a = a.header().shape[axis];
  const auto in_b = b.header().shape[axis];
  if (in_a != in_b) {
    throw Failure(Exit::input, quoted_path(b.path()) + " has " + std::to_string(in_b) + " " + what +
                                   " where " + quoted_path(a.path()) + " has " +
                                   std::to_string(in_a) + "; they must be equal");
  }
}

}  // namespace

Source Source::files(const std::string& q, const std::string& k, const std::string& v) {
  Source source;
  source.q_ = open(q);
  source.k_ = open(k);
  source.v_ = open(v);
  require_equal(*source.k_, *source.v_, 0, "tokens");
  require_equal(*source.q_, *source.k_, 2, "numbers a head");
  const auto& qs = source.q_->header().shape;
  const auto& ks = source.k_->header().shape;
  const auto& vs = source.v_->header().shape;
  source.shape_ = {.queries = qs[0],
                   .keys = ks[0],
                   .query_heads = qs[1],
                   .key_heads = ks[1],
                   .value_heads = vs[1],
                   .d_qk = qs[2],
                   .d_v = vs[2]};
  for (const auto* file : {source.q_.get(), source.k_.get(), source.v_.get()}) {
    source.wide_ = source.wide_ || file->header().type == NpyHeader::Type::f8;
  }
  if (const auto why = complaint(source.shape_)) {
    throw Failure(Exit::input,
                  quoted_path(q) + ", " + quoted_path(k) + ", " + quoted_path(v) + ": " + *why);
  }
  return source;
}

Source Source::random(const Shape& shape, std::int64_t seed) {
  Source source;
  source.shape_ = shape;
  source.seed_ = static_cast<std::uint64_t>(seed);
  return source;
}

void Source::add_d_o(const std::string& d_o) {
  d_o_ = open(d_o);
  const std::vector<std::int64_t> want{shape_.queries, shape_.query_heads, shape_.d_v};
  const auto& have = d_o_->header().shape;
  if (have != want) {
    const auto words = [](const std::vector<std::int64_t>& s) {
      return "[" + std::to_string(s[0]) + ", " + std::to_string(s[1]) + ", " +
             std::to_string(s[2]) + "]";
    };
    throw Failure(Exit::input, quoted_path(d_o) + " is " + words(have) +
                                   "; dO must have the shape of O, " + words(want));
  }
  wide_ = wide_ || d_o_->header().type == NpyHeader::Type::f8;
}

void Source::add_d_o(std::int64_t seed) { seed_ = static_cast<std::uint64_t>(seed); }

const std::shared_ptr<const NpyReader>& Source::file(Kind kind) const {
  return kind == Kind::Q ? q_ : kind == Kind::K ? k_ : kind == Kind::V ? v_ : d_o_;
}

template <class T>
void Source::read(Kind kind, const Runs& positions, T* out, int threads) const {
  if (file(kind)) return read_rows(kind, positions, out);
  const Index row = heads_of(kind, shape_) * dim_of(kind, shape_);
  in_parts(threads, size(positions), row * static_cast<Index>(sizeof(T)),
           [&](Range rows) { read_rows(kind, part(positions, rows), out + rows.begin * row); });
}

template <>
void Source::read_rows(Kind kind, const Runs& positions, BFloat16* out) const {
  const Index row = heads_of(kind, shape_) * dim_of(kind, shape_);
  constexpr Index kRows = 64;  // at a time
  std::vector<float> numbers(static_cast<std::size_t>(kRows * row));
  for (Range rows{0, kRows}; rows.begin < size(positions); rows = {rows.end, rows.end + kRows}) {
    rows.end = std::min(rows.end, size(positions));
    read_rows(kind, part(positions, rows), numbers.data());
    for (Index i = 0; i < rows.size() * row; ++i) {
      *out++ = BFloat16(numbers[static_cast<std::size_t>(i)]);
    }
  }
}

template <class T>
void Source::read_rows(Kind kind, const Runs& positions, T* out) const {
  const Index row = heads_of(kind, shape_) * dim_of(kind, shape_);
  const Index first = of_queries(kind) ? shape_.first_query() : 0;
  const auto& tensor = file(kind);
  // Of each seed four streams: Q, K, V, dO.
  const auto number = kind == Kind::dO ? 3 : static_cast<std::uint64_t>(kind);
  const std::uint64_t stream = mixed(seed_ * 4 + number);
  for (const Run& run : positions) {
    if (tensor) {
      tensor->read_rows<T>(run.first - first, run.count, run.step, out);
    } else {
      for (Index i = 0; i < run.count; ++i) {
        const Index base = (run.at(i) - first) * row;
        for (Index j = 0; j < row; ++j) {
          out[i * row + j] = static_cast<T>(normal(stream, static_cast<std::uint64_t>(base + j)));
        }
      }
    }
    for (Index i = 0; rounds_ && i < run.count * row; ++i) {
      out[i] = static_cast<T>(BFloat16(out[i]));
    }
    out += run.count * row;
  }
}

template void Source::read(Kind, const Runs&, BFloat16*, int) const;
template void Source::read(Kind, const Runs&, float*, int) const;
template void Source::read(Kind, const Runs&, double*, int) const;

}  // namespace dattn
