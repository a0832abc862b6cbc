#include "parallel/flights.hpp"

#include <algorithm>
#include <cstring>

#include "comm/digest.hpp"
#include "kernels/check.hpp"
#include "parallel/lending.hpp"
#include "parallel/wire.hpp"

namespace dattn {
namespace {

RoundedRecord rounded_record(Kind kind, const Problem& problem) {
  return {dim_of(kind, problem.shape()), kind == Kind::O ? 2 : 0};
}

}  // namespace

template <comm::Transport T>
Flights<T>::Flights(const Problem& problem, const Program& program, T& transport, Homes& homes,
                    Course& course, const EngineOptions& options)
    : problem_(problem),
      program_(program),
      transport_(transport),
      homes_(homes),
      course_(course),
      poll_every_(options.poll_every),
      checked_(options.checked),
      seen_(static_cast<std::size_t>(program.homes)),
      digests_(program.slots.size()),
      borrowable_(borrowable_slots(program)) {
  if (options.checked || options.verify_wire) {
    envelopes_.emplace(program, options.verify_wire || comm::has_digest());
  }
  const auto allocate = [&](Index size) {
    if constexpr (comm::Lending<T>) return transport.allocate(size);
    return comm::allocate(size);
  };
  for (const Index size : staging_bytes(program, problem)) {
    staging_.push_back({size > 0 ? allocate(size) : comm::Memory(), size, 0});
  }
  if constexpr (comm::Lending<T>) last_writes_ = last_writes(program, problem);
}

template <comm::Transport T>
void Flights<T>::start() {
  on_the_wire_ = 0;
  polled_ = 0;
  for (int home = 0; home < homes_.count(); ++home) homes_.give_back(home);
  std::fill(digests_.begin(), digests_.end(), std::nullopt);
  if (envelopes_) envelopes_->start();
  if constexpr (comm::Lending<T>) moved_ = transport_.moved();
}

template <comm::Transport T>
void Flights<T>::finish() {
  RunTimes& times = course_.times;
  if constexpr (comm::Lending<T>) {
    for (int home = 0; home < homes_.count(); ++home) check_still(home);
    const double from = course_.now();
    try {
      transport_.give_back();
    } catch (const comm::Timeout& e) {
      throw StepFailure(std::string("end of the run: ") + e.what(), true);
    }
    times.wait += course_.now() - from;
    const comm::Windows::Moved moved = transport_.moved();
    times.moved = {moved.viewed - moved_.viewed, moved.copied - moved_.copied,
                   moved.abroad - moved_.abroad};
  }
  times.hidden = std::max(0.0, on_the_wire_ - times.wait);
}

/// Room for a message that travels rounded; null for others.
template <comm::Transport T>
template <class Message>
std::byte* Flights<T>::stage(const Message& step) {
  if (step.peer == program_.rank || !is_rounded(step.block.kind, problem_)) return nullptr;
  const int home = homes_.slot(step.slot).home;
  Staging& here = staging_[static_cast<std::size_t>(home)];
  const bool in_use = std::any_of(flights_.begin(), flights_.end(), [&](const Flight& f) {
    return f.home == home && f.staged != nullptr;
  });
  const Index from = in_use ? here.used : 0;
  here.used = from + wire_bytes(step.block, problem_);
  CHECK(here.used <= here.size, home, here.used, here.size);
  return here.memory.get() + from;
}

/// Starts what goes beside a message of these bytes, once their digest is known: they are on their
/// way meanwhile.
template <comm::Transport T>
typename T::Request Flights<T>::seal(const Send& step, const comm::ConstStrips& pieces,
                                     bool rounded) {
  if (!envelopes_) return {};
  Envelope& envelope = envelopes_->write(course_.step, comm::total(pieces));
  if (envelopes_->digests()) {
    // What came whole is passed on with its first sender's digest: this rank's memory is on the
    // way, too.
    const auto& came = digests_[static_cast<std::size_t>(step.slot)];
    const bool same = came && !rounded && step.block == homes_.slot(step.slot).block;
    const double from = course_.now();
    dattn::seal(envelope, same ? *came : digest(pieces));
    course_.computed(from);
  }
  if (step.peer != program_.rank) ++course_.times.envelopes;
  return transport_.send(comm::strips_of(std::as_bytes(std::span(&envelope, 1))), step.peer,
                         kEnvelopeTag);
}

template <comm::Transport T>
typename T::Request Flights<T>::expect(const Recv& step) {
  if (!envelopes_) return {};
  Envelope& envelope = envelopes_->expect(course_.step);
  return transport_.recv(comm::strips_of(std::as_writable_bytes(std::span(&envelope, 1))),
                         step.peer, kEnvelopeTag);
}

template <comm::Transport T>
std::uint64_t Flights<T>::digest(const comm::ConstStrips& pieces) {
  return comm::digest_of(pieces, [this] { transport_.poll(); });
}

/// Holds what has arrived, as it lies, against its envelope.
template <comm::Transport T>
void Flights<T>::check(const Flight& flight, const Recv& step) {
  named(flight.step, [&] {
    envelopes_->check_identity(flight.step);
    if (!envelopes_->digests()) return;
    comm::ConstStrips pieces;
    if (flight.staged != nullptr) {
      pieces = {{flight.staged, 1, wire_bytes(step.block, problem_), 0}};
    } else {
      pieces = homes_.readable(step.slot, step.block);
    }
    if constexpr (comm::Lending<T>) {
      if (const auto& there = flight.request.view()) {
        seen_[static_cast<std::size_t>(flight.home)] = Seen{*there, flight.step};
      }
    }
    const std::uint64_t got = digest(pieces);
    envelopes_->check_bytes(flight.step, got);
    if (flight.staged == nullptr && borrowable_[static_cast<std::size_t>(step.slot)]) {
      digests_[static_cast<std::size_t>(step.slot)] = got;
    }
  });
}

/// What was looked at in another rank's memory must be the same to the end.
template <comm::Transport T>
void Flights<T>::check_still(int home) {
  auto& seen = seen_[static_cast<std::size_t>(home)];
  if (!seen) return;
  const double from = course_.now();
  named(seen->step, [&] { envelopes_->check_still(seen->step, digest({seen->bytes})); });
  seen.reset();
  course_.computed(from);
}

template <comm::Transport T>
void Flights<T>::post(const Send& step) {
  before_reading(step.slot);
  auto pieces = homes_.readable(step.slot, step.block);
  std::byte* rounded = stage(step);
  RunTimes& times = course_.times;
  if (rounded != nullptr) {
    const double from = course_.now();
    round(pieces, rounded_record(step.block.kind, problem_), rounded,
          [this] { transport_.poll(); });
    pieces = {{rounded, 1, wire_bytes(step.block, problem_), 0}};
    course_.computed(from);
  }
  if (step.peer != program_.rank) {
    times.bytes_sent += comm::total(pieces);
    if (!problem_.hosts().together(step.peer, program_.rank)) {
      times.between_hosts += comm::total(pieces);
    }
    ++times.messages;
  }
  if constexpr (comm::Lending<T>) {
    // What is borrowed stays as well: its owner does not write it either.
    const bool stays =
        rounded == nullptr &&
        (homes_.is_borrowed(step.slot) ||
         last_writes_[static_cast<std::size_t>(homes_.slot(step.slot).home)] < course_.step);
    if (stays) {
      auto request = transport_.lend(pieces, step.peer);
      return depart(std::move(request), step, rounded, seal(step, pieces, rounded != nullptr));
    }
  }
  auto request = transport_.send(pieces, step.peer);
  depart(std::move(request), step, rounded, seal(step, pieces, rounded != nullptr));
}

template <comm::Transport T>
void Flights<T>::post(const Recv& step) {
  // Pieces of one slot arrive side by side; whatever else touches the home must be over.
  settle([&](const Flight& f) {
    return f.home == homes_.slot(step.slot).home && !(f.writes && f.slot == step.slot);
  });
  check_still(homes_.slot(step.slot).home);
  homes_.give_back(homes_.slot(step.slot).home);
  auto pieces = homes_.writable(step.slot, step.block);
  if (checked_) {
    for (const comm::Strip& p : pieces) {
      for (Index i = 0; i < p.count; ++i) {  // all bits set: a NaN of either width
        std::memset(p.data + i * p.stride, 0xff, static_cast<std::size_t>(p.length));
      }
    }
  }
  std::byte* rounded = stage(step);
  if (rounded != nullptr) pieces = {{rounded, 1, wire_bytes(step.block, problem_), 0}};
  if constexpr (comm::Lending<T>) {
    if (rounded == nullptr && borrowable_[static_cast<std::size_t>(step.slot)]) {
      const Index row = homes_.row_bytes(step.slot);
      return depart(transport_.borrow(pieces, step.peer, row), step, rounded, expect(step));
    }
  }
  depart(transport_.recv(pieces, step.peer), step, rounded, expect(step));
}

template <comm::Transport T>
template <class Message>
void Flights<T>::depart(typename T::Request request, const Message& step, std::byte* in_staging,
                        typename T::Request envelope) {
  const bool counts = step.peer != program_.rank;
  if (counts && under_way_++ == 0) since_ = course_.now();
  flights_.push_back({std::move(request), homes_.slot(step.slot).home, step.slot,
                      std::is_same_v<Message, Recv>, counts, course_.step, in_staging,
                      std::move(envelope)});
}

template <comm::Transport T>
void Flights<T>::land(std::size_t i) {
  const Flight flight = std::move(flights_[i]);
  flights_.erase(flights_.begin() + static_cast<std::ptrdiff_t>(i));
  if (flight.counts && --under_way_ == 0) on_the_wire_ += course_.now() - since_;
  if (!flight.writes) return;
  const double from = course_.now();
  const auto& step = std::get<Recv>(program_.steps[static_cast<std::size_t>(flight.step)]);
  if constexpr (comm::Lending<T>) {
    if (const auto& there = flight.request.view()) {
      homes_.borrow(flight.slot, there->data, there->count == 1 ? 0 : there->stride);
    }
  }
  if (envelopes_) check(flight, step);
  if (flight.staged != nullptr) {
    widen(flight.staged, rounded_record(step.block.kind, problem_),
          homes_.writable(step.slot, step.block), [this] { transport_.poll(); });
  }
  landing_ += course_.now() - from;
}

template <comm::Transport T>
void Flights<T>::poll() {
  if (flights_.empty() || course_.now() - polled_ < poll_every_) return;
  // Testing one message that is not done moves all; flights take turns at being that one.
  for (std::size_t n = flights_.size(); n > 0; --n) {
    if (turn_ >= flights_.size()) turn_ = 0;
    if (!test(flights_[turn_])) {
      ++turn_;
      break;
    }
    land(turn_);
  }
  polled_ = course_.now();
}

template <comm::Transport T>
bool Flights<T>::test(Flight& flight) {
  return named(flight.step, [&] { return flight.request.test() && flight.envelope.test(); });
}

template <comm::Transport T>
std::string Flights<T>::place(int step) const {
  return "step " + std::to_string(step) + " (" +
         text(program_, program_.steps[static_cast<std::size_t>(step)]) + "): ";
}

/// Waits for every flight that `conflicts`.
template <comm::Transport T>
template <class Conflicts>
void Flights<T>::settle(const Conflicts& conflicts) {
  const double from = course_.now();
  const double landed = landing_;
  bool waited = false;
  for (std::size_t i = 0; i < flights_.size();) {
    if (!conflicts(flights_[i])) {
      ++i;
      continue;
    }
    waited = true;
    named(flights_[i].step, [&] {
      flights_[i].request.wait();
      flights_[i].envelope.wait();
    });
    land(i);
  }
  if (waited) {
    course_.times.compute += landing_ - landed;
    course_.waited(course_.now() - from - (landing_ - landed));
  }
}

template <comm::Transport T>
void Flights<T>::before_reading(SlotId s) {
  settle([&](const Flight& f) { return f.home == homes_.slot(s).home && f.writes; });
}

template <comm::Transport T>
void Flights<T>::before_writing(SlotId s) {
  settle([&](const Flight& f) { return f.home == homes_.slot(s).home; });
}

template <comm::Transport T>
void Flights<T>::land_all() {
  settle([](const Flight&) { return true; });
}

template class Flights<comm::Communicator>;
template class Flights<comm::Windows>;
template class Flights<comm::Loopback::Endpoint>;

}  // namespace dattn
