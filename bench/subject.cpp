#include "bench/subject.hpp"

#include <chrono>
#include <cmath>
#include <fstream>
#include <stdexcept>

#include "bench/ceilings.hpp"
#include "kernels/area.hpp"
#include "kernels/attend_backward.hpp"
#include "kernels/in_parts.hpp"
#include "kernels/partial.hpp"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A tensor [rows, heads, dim] without numbers yet.
template <class T>
struct Tensor {
  Tensor(Index rows_, Index heads_, Index dim_)
      : rows(rows_),
        heads(heads_),
        dim(dim_),
        numbers(static_cast<std::size_t>(rows_ * heads_ * dim_)) {}

  Index rows, heads, dim;
  Uninitialized<T> numbers;

  View<T> view() { return {numbers.data(), rows, heads, dim}; }
  View<const T> view() const { return {numbers.data(), rows, heads, dim}; }
};

/// About N(0, 1) (the sum of four uniform numbers), a function of seed and place only.
float random_number(std::uint64_t seed, std::uint64_t place) {
  std::uint64_t x = (seed << 48U) + place + 1;  // splitmix64
  x *= 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  x ^= x >> 31U;
  float sum = -2.0F;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<float>((x >> (16U * static_cast<unsigned>(i))) & 0xffffU) / 65536.0F;
  }
  return sum * std::sqrt(3.0F);
}

template <class T>
void randomize(Tensor<T>& tensor, std::uint64_t seed, int threads) {
  in_parts(threads, tensor.view().size(), static_cast<Index>(sizeof(T)), [&](Range numbers) {
    for (Index i = numbers.begin; i < numbers.end; ++i) {
      tensor.numbers.data()[i] = T(random_number(seed, static_cast<std::uint64_t>(i)));
    }
  });
}

void zero(Tensor<float>& tensor, int threads) {
  in_parts(threads, tensor.view().size(), static_cast<Index>(sizeof(float)), [&](Range numbers) {
    std::fill_n(tensor.numbers.data() + numbers.begin, numbers.size(), 0.0F);
  });
}

template <class T>
void read_raw(Tensor<T>& tensor, const std::string& file) {
  const auto bytes = static_cast<std::streamsize>(tensor.numbers.size() * sizeof(T));
  std::ifstream in(file, std::ios::binary);
  if (!in.read(reinterpret_cast<char*>(tensor.numbers.data()), bytes) || in.peek() != EOF) {
    throw std::runtime_error(file + ": not " + std::to_string(bytes) + " readable bytes");
  }
}

void write_raw(const Tensor<float>& tensor, const std::string& file) {
  std::ofstream out(file, std::ios::binary);
  out.write(reinterpret_cast<const char*>(tensor.numbers.data()),
            static_cast<std::streamsize>(tensor.numbers.size() * sizeof(float)));
  if (!out.flush()) throw std::runtime_error(file + ": cannot be written");
}

Score score_of(const Cell& cell) {
  Score score;
  score.scale = 1.0 / std::sqrt(static_cast<double>(cell.d));
  score.soft_cap = cell.soft_cap;
  for (Index h = 0; cell.alibi && h < cell.heads; ++h) {
    score.alibi.push_back(static_cast<float>(
        std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(cell.heads))));
  }
  return score;
}

/// Where the time between two polls is longest.
class PollClock {
 public:
  void start() {
    longest_ = 0;
    last_ = Clock::now();
  }
  void tick() {
    longest_ = std::max(longest_, since(last_));
    last_ = Clock::now();
  }
  double longest() const { return longest_; }

 private:
  Clock::time_point last_;
  double longest_ = 0;
};

template <class T>
class Attention : public Subject {
 public:
  Attention(const Cell& cell, const Shape& shape)
      : cell_(cell),
        shape_(shape),
        mask_(parse_mask(cell.mask, shape)),
        where_{shape,
               {0, shape.query_heads},
               {0, shape.key_heads},
               {0, shape.value_heads},
               {{shape.first_query(), shape.queries, 1}},
               {{0, shape.keys, 1}}},
        work_{.score = score_of(cell),
              .threads = cell.threads,
              .isa = cell.isa,
              .workspace = &workspace_},
        q_(shape.queries, shape.query_heads, shape.d_qk),
        records_(shape.queries, shape.query_heads, record_length(shape.d_v)),
        o_(shape.queries, shape.query_heads, shape.d_v),
        lse_(shape.queries, shape.query_heads, 1) {
    if (cell.poll) {
      work_.poll = [this] { poll_.tick(); };
    }
    // Decode reads K and V once: enough copies that no run finds them in a cache.
    const auto bytes =
        static_cast<std::size_t>(shape.keys * shape.key_heads * (shape.d_qk + shape.d_v)) *
        sizeof(T);
    const std::size_t copies = cell.decode() ? (beyond_caches() + bytes - 1) / bytes : 1;
    for (std::size_t i = 0; i < copies; ++i) {
      k_.emplace_back(shape.keys, shape.key_heads, shape.d_qk);
      v_.emplace_back(shape.keys, shape.value_heads, shape.d_v);
      randomize(k_.back(), 2, cell.threads);
      randomize(v_.back(), 3, cell.threads);
    }
    randomize(q_, 1, cell.threads);
    for (const auto& [head, count] : variants(*mask_, where_.query_heads)) {
      area_ += static_cast<double>(dattn::area(*mask_, head, where_.queries, where_.keys)) *
               static_cast<double>(count);
    }
  }

  void load(const std::string& tensor, const std::string& file) override {
    if (tensor == "q") {
      read_raw(q_, file);
    } else if (tensor == "k") {
      for (Tensor<T>& k : k_) read_raw(k, file);
    } else if (tensor == "v") {
      for (Tensor<T>& v : v_) read_raw(v, file);
    } else {
      throw std::runtime_error("no tensor '" + tensor + "' to load");
    }
  }
  void dump(const std::string& tensor, const std::string& file) const override {
    if (tensor != "o") throw std::runtime_error("no tensor '" + tensor + "' to dump");
    write_raw(o_, file);
  }

  void prepare() override {}

  double run() override {
    if (!cell_.whole) clear_records();
    const auto start = Clock::now();
    if (cell_.whole) clear_records();
    poll_.start();
    attend(q_.view(), k().view(), v().view(), records_.view(), where_, *mask_, work_);
    poll_.tick();
    if (cell_.whole) finish_records();
    const double seconds = since(start);
    turn_ = (turn_ + 1) % k_.size();
    return seconds;
  }

  double area() const override { return area_; }
  double work() const override {
    if (!cell_.decode()) return area_ * shape_.flops_per_pair();
    const Index keys = size(keys_seen(*mask_, 0, where_.queries, shape_.keys));
    return static_cast<double>(keys * shape_.key_heads * (shape_.d_qk + shape_.d_v)) * sizeof(T);
  }
  double poll_gap() const override { return poll_.longest(); }

 protected:
  const Tensor<T>& k() const { return k_[turn_]; }
  const Tensor<T>& v() const { return v_[turn_]; }

  void clear_records() { start(records_.view(), cell_.threads); }
  void finish_records() {
    const auto all = [](View<float> view) {
      return std::span(view.data, static_cast<std::size_t>(view.size()));
    };
    finish(std::as_const(records_).view(), all(o_.view()), all(lse_.view()), cell_.threads);
  }

  Cell cell_;
  Shape shape_;
  MaskPtr mask_;
  Where where_;
  Workspace workspace_;
  Work work_;
  Tensor<T> q_;
  std::vector<Tensor<T>> k_, v_;  ///< equal copies
  std::size_t turn_ = 0;          ///< the copy that the next run reads
  Tensor<float> records_, o_, lse_;
  PollClock poll_;
  double area_ = 0;
};

template <class T>
class Backward final : public Attention<T> {
 public:
  Backward(const Cell& cell, const Shape& shape)
      : Attention<T>(cell, shape),
        d_o_(shape.queries, shape.query_heads, shape.d_v),
        delta_(shape.queries, shape.query_heads, 1),
        dq_(shape.queries, shape.query_heads, shape.d_qk),
        dk_(shape.keys, shape.key_heads, shape.d_qk),
        dv_(shape.keys, shape.value_heads, shape.d_v) {
    randomize(d_o_, 4, cell.threads);
  }

  void load(const std::string& tensor, const std::string& file) override {
    if (tensor == "do") {
      read_raw(d_o_, file);
    } else {
      Attention<T>::load(tensor, file);
    }
  }
  void dump(const std::string& tensor, const std::string& file) const override {
    if (tensor == "dq") {
      write_raw(dq_, file);
    } else if (tensor == "dk") {
      write_raw(dk_, file);
    } else if (tensor == "dv") {
      write_raw(dv_, file);
    } else {
      Attention<T>::dump(tensor, file);
    }
  }

  void prepare() override {
    Attention<T>::run();
    if (!this->cell_.whole) this->finish_records();
    find_delta();
  }

  double run() override {
    const bool whole = this->cell_.whole;
    if (!whole) zero_gradients();
    const auto start = Clock::now();
    if (whole) {
      zero_gradients();
      find_delta();
    }
    this->poll_.start();
    attend_backward(this->q_.view(), this->k().view(), this->v().view(), d_o_.view(),
                    std::as_const(this->lse_).view(), std::as_const(delta_).view(), dq_.view(),
                    dk_.view(), dv_.view(), this->where_, *this->mask_, this->work_);
    this->poll_.tick();
    return since(start);
  }

  double work() const override {
    const Shape& s = this->shape_;
    return this->area_ * 2.0 * static_cast<double>(3 * s.d_qk + 2 * s.d_v);
  }

 private:
  void zero_gradients() {
    for (Tensor<float>* gradient : {&dq_, &dk_, &dv_}) zero(*gradient, this->cell_.threads);
  }
  void find_delta() {
    delta_of(std::as_const(this->o_).view(), std::as_const(d_o_).view(), delta_.view(),
             this->cell_.threads);
  }

  Tensor<T> d_o_;
  Tensor<float> delta_, dq_, dk_, dv_;
};

template <class T>
std::unique_ptr<Subject> make(const Cell& cell, const Shape& shape) {
  if (cell.kernel == "backward") return std::make_unique<Backward<T>>(cell, shape);
  return std::make_unique<Attention<T>>(cell, shape);
}

}  // namespace

std::unique_ptr<Subject> make_subject(const Cell& cell) {
  const Shape shape = cell.shape();
  if (const auto wrong = complaint(shape)) throw std::invalid_argument(*wrong);
  return cell.dtype == "bf16" ? make<BFloat16>(cell, shape) : make<float>(cell, shape);
}

}  // namespace dattn
