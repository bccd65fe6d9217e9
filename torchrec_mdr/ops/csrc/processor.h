// The kinds of processor that kernels are compiled for, and which of them this one is.

#pragma once

#include <cstdint>

#define ALWAYS __attribute__((always_inline))
#define INLINE static inline ALWAYS

// LEVEL(name, what makes a function one for this kind, bytes of its vectors) for each kind.
#if defined(__x86_64__)
#define FOR_EACH_PROCESSOR(LEVEL)                         \
  LEVEL(Plain, , 16)                                      \
  LEVEL(Avx2, __attribute__((target("avx2,fma"))), 32)    \
  LEVEL(Avx512, __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), 64)
#else
#define FOR_EACH_PROCESSOR(LEVEL) LEVEL(Plain, , 16)
#endif

// Bytes of the widest vectors that this processor has, `most` at most.
inline int vector_bytes(int64_t most) {
#if defined(__x86_64__)
  const bool has_512 = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (most >= 64 && has_512) return 64;
  if (most >= 32 && has_2) return 32;
#endif
  return 16;
}
