#pragma once

#include <string_view>

namespace dattn {
/// Version of this tree, from CMakeLists.txt.
inline constexpr std::string_view kVersion = DATTN_VERSION;
}  // namespace dattn
