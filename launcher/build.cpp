#include "launcher/build.hpp"

#include <elf.h>
#include <fmt/format.h>
#include <link.h>

#include <algorithm>
#include <cstddef>
#include <string_view>

#include "comm/communicator.hpp"
#include "launcher/version.hpp"

namespace dattn {
namespace {

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 3) / 4 * 4; }

/// The build-id among these notes; empty if there is none.
std::string id_among(std::string_view notes) {
  while (notes.size() >= sizeof(ElfW(Nhdr))) {
    const auto* note = reinterpret_cast<const ElfW(Nhdr)*>(notes.data());
    notes.remove_prefix(sizeof *note);
    const std::size_t name = aligned(note->n_namesz);
    if (name > notes.size() || note->n_descsz > notes.size() - name) break;
    if (note->n_type == NT_GNU_BUILD_ID && notes.starts_with(std::string_view("GNU\0", 4))) {
      std::string id;
      for (const char c : notes.substr(name, note->n_descsz)) {
        id += fmt::format("{:02x}", static_cast<unsigned char>(c));
      }
      return id;
    }
    notes.remove_prefix(std::min(notes.size(), name + aligned(note->n_descsz)));
  }
  return {};
}

int read_id(dl_phdr_info* program, std::size_t, void* out) {
  for (int i = 0; i < program->dlpi_phnum; ++i) {
    const auto& part = program->dlpi_phdr[i];
    if (part.p_type != PT_NOTE) continue;
    const std::string id =
        id_among({reinterpret_cast<const char*>(program->dlpi_addr + part.p_vaddr), part.p_memsz});
    if (!id.empty()) *static_cast<std::string*>(out) = id;
  }
  return 1;  // the first is the program itself, the others are its libraries
}

}  // namespace

std::string build_id() {
  std::string id;
  dl_iterate_phdr(read_id, &id);
  return id.empty() ? "unknown" : id;
}

Signature build_signature() {
  return {{"version", std::string(kVersion)},
          {"build", build_id()},
          {"MPI library", comm::library_version()}};
}

}  // namespace dattn
