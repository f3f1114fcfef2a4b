// The functions between ALIGNVEC_TARGET_BEGIN and _END are compiled for an instruction set that the CPU may lack: they
// are reached through the table of their file alone. Standard headers are included before, so that no function of
// theirs is.
#pragma once

#include <cstdint>
#include <cstring>

#define ALIGNVEC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ALIGNVEC_TARGET_BEGIN(features) \
  ALIGNVEC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ALIGNVEC_TARGET_END ALIGNVEC_PRAGMA(clang attribute pop)
#else
#define ALIGNVEC_TARGET_BEGIN(features) ALIGNVEC_PRAGMA(GCC push_options) ALIGNVEC_PRAGMA(GCC target(features))
#define ALIGNVEC_TARGET_END ALIGNVEC_PRAGMA(GCC pop_options)
#endif
