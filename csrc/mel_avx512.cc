#define SE_LANES 16
#define SE_KERNELS kAvx512Kernels
#define SE_NAME "avx512"
#define SE_SUPPORTED                                                                                     \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                            \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
#include "mel_lanes.inc"
