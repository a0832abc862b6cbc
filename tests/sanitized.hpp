#pragma once

namespace dattn {

/// Whether a sanitizer slows this build down; large tables then take a sample.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DATTN_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)  // clang's words for these
#define DATTN_SANITIZED 1
#endif
#endif
#ifdef DATTN_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace dattn
