#include "launcher/flight.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "launcher/failure.hpp"
#include "launcher/output_file.hpp"

namespace dattn {
namespace {

using comm::Progress;
using Event = Progress::Event;
using Kind = Progress::Kind;

constexpr std::array<std::pair<Kind, const char*>, 3> kKinds{
    {{Kind::phase, "phase"}, {Kind::step, "step"}, {Kind::wait, "wait"}}};

/// A number that the launcher put into the environment; -1 if it did not.
int from_environment(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const char* text = std::getenv(name);
    if (text == nullptr) continue;
    int value = -1;
    const char* end = text + std::strlen(text);
    if (const auto [stop, error] = std::from_chars(text, end, value);
        error == std::errc{} && stop == end && value >= 0) {
      return value;
    }
  }
  return -1;
}

/// What all ranks of the job, and no other's, can call it without having talked to each other.
std::string job_name() {
  std::string name;
  for (const char* variable : {"PMIX_NAMESPACE", "SLURM_JOB_ID"}) {
    if (const char* text = std::getenv(variable); name.empty() && text != nullptr) name = text;
  }
  if (name.empty()) name = std::to_string(::getpid());
  for (char& c : name) {
    const bool plain = std::strchr("0123456789.-_", c) != nullptr || (c >= 'a' && c <= 'z') ||
                       (c >= 'A' && c <= 'Z');
    if (!plain) c = '_';
  }
  return name;
}

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown";
}

std::string with_article(const std::string& what) {
  return (std::strchr("aeiou", what.empty() ? 'x' : what.front()) != nullptr ? "an " : "a ") + what;
}

nlohmann::json to_json(const Event& event) {
  nlohmann::json json{{"phase", event.phase}, {"begin", event.begin}};
  for (const auto& [kind, name] : kKinds) {
    if (event.kind == kind) json["kind"] = name;
  }
  if (!event.what.empty()) json["what"] = event.what;
  if (event.step >= 0) json["step"] = event.step;
  if (event.kind != Kind::wait) return json;
  json["peer"] = event.peer;
  json["bytes"] = event.bytes;
  json["sequence"] = event.sequence;
  json["state"] = event.end < 0 ? "waiting" : "done";
  if (event.end >= 0) json["end"] = event.end;
  return json;
}

Event event_of(const nlohmann::json& json) {
  Event event{.phase = json.at("phase"),
              .what = json.value("what", ""),
              .step = json.value("step", -1),
              .peer = json.value("peer", -1),
              .bytes = json.value("bytes", std::int64_t{0}),
              .sequence = json.value("sequence", std::int64_t{-1}),
              .begin = json.at("begin"),
              .end = json.value("end", -1.0)};
  for (const auto& [kind, name] : kKinds) {
    if (json.at("kind") == name) event.kind = kind;
  }
  return event;
}

}  // namespace

const Event* FlightRecord::step() const {
  for (auto event = events.rbegin(); event != events.rend(); ++event) {
    if (event->kind == Kind::phase) break;
    if (event->kind == Kind::step) return &*event;
  }
  return nullptr;
}

std::string FlightRecord::place() const {
  const Event* last = at();
  if (last == nullptr) return "before anything was noted";
  std::string text = last->phase;
  if (const Event* taken = step()) {
    text += fmt::format(", step {}", taken->step);
    if (!taken->what.empty()) text += " (" + taken->what + ")";
  }
  if (last->kind != Kind::wait || last->end >= 0) {
    return text +
           fmt::format(", at work of its own for {:.1f} s", now - std::max(last->begin, last->end));
  }
  text += ", waiting for ";
  if (last->peer >= 0) {
    text += fmt::format("{} of {} bytes {} rank {}", with_article(last->what), last->bytes,
                        last->what == "send" ? "to" : "from", last->peer);
  } else {
    text += fmt::format("all ranks in {}", last->what);
    if (last->bytes > 0) text += fmt::format(" of {} bytes", last->bytes);
  }
  return text + fmt::format(" for {:.1f} s", now - last->begin);
}

nlohmann::json to_json(const FlightRecord& r) {
  nlohmann::json events = nlohmann::json::array();
  for (const Event& event : r.events) events.push_back(to_json(event));
  return {{"version", 1},
          {"command", r.command},
          {"cause", r.cause == Cause::failed ? "failed" : "stuck"},
          {"told", r.told},
          {"rank", r.rank},
          {"ranks", r.ranks},
          {"host", r.host},
          {"pid", r.pid},
          {"line", r.line},
          {"now", r.now},
          {"seconds", r.seconds},
          {"paused", r.paused},
          {"silent", r.silent},
          {"events", std::move(events)}};
}

FlightRecord flight_record(const nlohmann::json& json) {
  FlightRecord r{.cause = json.at("cause") == "failed" ? Cause::failed : Cause::stuck,
                 .told = json.at("told"),
                 .command = json.at("command"),
                 .rank = json.at("rank"),
                 .ranks = json.at("ranks"),
                 .host = json.at("host"),
                 .pid = json.at("pid"),
                 .line = json.at("line"),
                 .now = json.at("now"),
                 .seconds = json.at("seconds"),
                 .paused = json.at("paused"),
                 .silent = json.at("silent")};
  for (const nlohmann::json& event : json.at("events")) r.events.push_back(event_of(event));
  return r;
}

Flight::Flight(std::string command, std::string folder, const Progress& progress)
    : command_(std::move(command)),
      folder_(folder.empty() ? "dattn-flight-" + job_name() : std::move(folder)),
      progress_(progress),
      host_(host_name()) {
  set_rank(std::max(0, from_environment({"OMPI_COMM_WORLD_RANK", "PMIX_RANK"})),
           std::max(1, from_environment({"OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"})));
}

void Flight::set_rank(int rank, int ranks) {
  rank_ = rank;
  ranks_ = ranks;
}

FlightRecord Flight::here() const {
  return {.command = command_,
          .rank = rank_,
          .ranks = ranks_,
          .host = host_,
          .pid = static_cast<int>(::getpid()),
          .now = progress_.now(),
          .events = progress_.events()};
}

std::string Flight::write(const FlightRecord& record) const {
  if (::mkdir(folder_.c_str(), 0777) != 0 && errno != EEXIST) return std::strerror(errno);
  const std::string path = fmt::format("{}/rank-{:05}.json", folder_, record.rank);
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) return std::strerror(errno);
  const std::string text = to_json(record).dump() + "\n";
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t put = ::write(file, text.data() + done, text.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) break;
    done += static_cast<std::size_t>(put);
  }
  const int error = errno;
  ::close(file);
  return done == text.size() ? "" : std::strerror(error);
}

std::string Flight::write_and_say(const FlightRecord& record) const {
  const std::string why = write(record);
  return why.empty() ? fmt::format("; see dattn report {}", folder_)
                     : fmt::format("; no flight record in {}: {}", quoted_path(folder_), why);
}

void Flight::report(const comm::Watchdog::Verdict& verdict) const noexcept {
  remove_temporaries();
  try {
    FlightRecord record = here();
    record.cause = Cause::stuck;
    record.told = verdict.told;
    record.seconds = verdict.seconds;
    record.paused = verdict.paused;
    record.silent = verdict.silent;
    record.line = fmt::format("on {}, pid {}: {}", host_, record.pid, record.place());
    if (record.paused > 0) record.line += fmt::format("; stood still for {:.1f} s", record.paused);
    if (!record.silent.empty()) {
      record.line += fmt::format("; heard no more: rank {}", fmt::join(record.silent, ", "));
    }
    if (verdict.alarm != comm::Alarm::stuck) {  // the rank that failed has said so
      write(record);
      return;
    }
    const std::string why = verdict.told
                                ? "another rank is stuck"
                                : fmt::format("no rank has moved for {:.1f} s", verdict.seconds);
    const std::string line = fmt::format("[rank {}] {}: {}; {}{}\n", rank_, command_, why,
                                         record.line, write_and_say(record));
    [[maybe_unused]] const auto put = ::write(STDERR_FILENO, line.data(), line.size());
  } catch (const std::exception&) {  // no memory for words: the exit code has to do
  }
}

std::string Flight::failed(const std::string& line) const noexcept {
  try {
    FlightRecord record = here();
    record.cause = Cause::failed;
    record.line = line;
    return write_and_say(record);
  } catch (const std::exception&) {
    return {};
  }
}

FlightRecords read_flight_records(const std::string& folder) {
  std::error_code error;
  std::filesystem::directory_iterator files(folder, error);
  if (error) {
    throw Failure(Exit::input, fmt::format("{}: {}; name the folder that the job's last lines name",
                                           quoted_path(folder), error.message()));
  }
  FlightRecords records;
  for (const auto& file : files) {
    const std::string name = file.path().filename().string();
    if (!name.starts_with("rank-") || !name.ends_with(".json")) continue;
    if (!file.is_regular_file(error)) {  // a pipe could keep us for ever
      records.unreadable.push_back(name);
      continue;
    }
    try {
      std::ifstream text(file.path());
      FlightRecord record = flight_record(nlohmann::json::parse(text));
      records.ranks.insert_or_assign(record.rank, std::move(record));
    } catch (const nlohmann::json::exception&) {
      records.unreadable.push_back(name);
    }
  }
  std::sort(records.unreadable.begin(), records.unreadable.end());
  if (records.ranks.empty()) {
    throw Failure(Exit::input,
                  fmt::format("{}: has no flight record that can be read (rank-*.json); name the "
                              "folder that the job's last lines name",
                              quoted_path(folder)));
  }
  return records;
}

}  // namespace dattn
