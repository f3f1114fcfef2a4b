// Which kernels this CPU runs, decided once.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "types.h"

namespace alignvec {

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif
#if defined(__x86_64__) && defined(__linux__)
bool amx_runs();
Kernels amx_kernels();
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2");
#if defined(__linux__)
  static const Kernels amx = amx_kernels();
  const Choice choices[] = {{&amx, bf16 && amx_runs()},
#else
  const Choice choices[] = {
#endif
                            {&avx512_bf16_kernels, bf16},
                            {&avx512_kernels, avx512},
                            {&avx2_kernels, avx2},
                            {&portable_kernels, true}};
#else
  const Choice choices[] = {{&portable_kernels, true}};
#endif
  const char* asked = std::getenv("ALIGNVEC_CPU");
  if (asked == nullptr || *asked == '\0') {
    for (const Choice& choice : choices)
      if (choice.runs) return *choice.kernels;
  }
  std::string names;
  for (const Choice& choice : choices) {
    if (choice.runs && std::strcmp(asked, choice.kernels->name) == 0) return *choice.kernels;
    if (choice.runs) names += std::string(names.empty() ? "" : ", ") + choice.kernels->name;
  }
  throw std::runtime_error("ALIGNVEC_CPU=" + std::string(asked) + " is not one of what this CPU runs: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace alignvec
