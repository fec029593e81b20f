#define SE_LANES 16
#define SE_PANEL_BLOCKS 2
#define SE_POINTWISE_TILE 14  // 28 sums, 2 weights and an input in 32 registers
#define SE_VNNI 1
#define SE_KERNELS kVnniInt8
#define SE_NAME "avx512-vnni"
#define SE_SUPPORTED \
  (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
#include "encoder_int8.inc"
