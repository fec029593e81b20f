#define SE_LANES 16
#define SE_PANEL_BLOCKS 2
#define SE_POINTWISE_TILE 14  // 28 sums, 2 weights and an input in 32 registers
#define SE_DEPTHWISE_TILE 8
#define SE_KERNELS kAvx512Encoder
#define SE_NAME "avx512"
#define SE_SUPPORTED                                                                                     \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                            \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
#include "encoder_lanes.inc"
