#include "bench/contender.hpp"

#include "parallel/stats.hpp"

namespace dattn {

template <class E, comm::Transport T>
Contender<E, T>::Contender(const Task& task, const Choice& choice, T& ranks, int threads)
    : choice_(choice), threads_(threads) {
  for (const Pass pass : task.passes()) {
    programs_.push_back(make_program(*choice.strategy, *choice.problem, ranks.rank(), pass));
  }
  for (const Program& program : programs_) {
    engines_.push_back(std::make_unique<Engine>(
        *choice_.problem, program, ranks,
        EngineOptions{
            .score = task.scoring.score, .sinks = task.scoring.sinks, .threads = threads}));
    load(task, program, *engines_.back());
    if (program.pass == Pass::forward && task.wish.gradients) engines_.back()->run();
  }
}

template <class E, comm::Transport T>
void Contender<E, T>::load(const Task& task, const Program& program, Engine& engine) {
  for (const SlotId slot : program.inputs) {
    const Block& block = program.slots[static_cast<std::size_t>(slot)].block;
    if (const auto kept = kept_slot(programs_.front(), block)) {
      engine.bind(slot, engines_.front()->kept(*kept));
      continue;
    }
    std::byte* to = engine.input(slot).data();
    if (block.kind != Kind::Stats) {
      read(task, block, reinterpret_cast<E*>(to));
      continue;
    }
    const Shape& shape = task.shape;
    const Index rows = block.row_count();
    using Sum = SumOf<E>;
    std::vector<Sum> lse(static_cast<std::size_t>(rows * shape.query_heads));
    std::vector<Sum> o(lse.size() * static_cast<std::size_t>(shape.d_v));
    std::vector<E> d_o(o.size());
    engines_.front()->result(std::span(o), std::span(lse));
    read(task, {Kind::dO, block.heads, block.rows}, d_o.data());
    fill_stats<E>({o.data(), rows, shape.query_heads, shape.d_v}, lse,
                  {d_o.data(), rows, shape.query_heads, shape.d_v},
                  {reinterpret_cast<Sum*>(to), rows, shape.query_heads, 2}, threads_);
  }
}

template <class E, comm::Transport T>
void Contender<E, T>::read(const Task& task, const Block& block, E* to) const {
  const Partition& tokens =
      of_queries(block.kind) ? choice_.problem->queries() : choice_.problem->keys();
  task.source.read(block.kind, tokens.positions(block.rows), to, threads_);
}

template class Contender<BFloat16>;
template class Contender<float>;
template class Contender<double>;
template class Contender<BFloat16, comm::Windows>;
template class Contender<float, comm::Windows>;
template class Contender<double, comm::Windows>;

}  // namespace dattn
