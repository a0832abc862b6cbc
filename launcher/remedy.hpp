#pragma once

#include <string>
#include <vector>

#include "launcher/memory.hpp"
#include "launcher/options.hpp"

namespace dattn {

/// How a task would run, as far as its memory goes.
struct Setting {
  Task task;
  std::vector<int> threads;  ///< by rank
  bool check = false;
  std::vector<Room> rooms;  ///< beside --memory
  bool verify_wire = false;

  int ranks() const { return static_cast<int>(threads.size()); }
  /// What takes memory beside slots.
  Beside beside() const;
};

/// Small changes with which the setting would fit, in the words of the options: "--prefetch 1; or
/// --dtype bf16", "no --check, --threads 1", "16 ranks on 4 hosts". Each has been planned and fits;
/// where none of those that are tried does, or planning them would take long, it is empty.
std::string remedy(const Setting& setting);

/// choose_for() within the setting's memory. Where nothing fits, Failure(memory) that names a
/// remedy; with `tell` the table of what is needed goes to standard error before.
Choice choose_within(const Setting& setting, const Machine& machine, bool tell);

/// The same table for what was chosen.
std::vector<Needs> needs_of(const Setting& setting, const Choice& choice);

}  // namespace dattn
