// For processors with AVX-512 without VNNI.
#define SE_LANES 16
#define SE_PANEL_BLOCKS 2
#define SE_POINTWISE_TILE 12  // 24 sums, 2 weights, an input and products in 32 registers
#define SE_VNNI 0
#define SE_KERNELS kAvx512Int8
#define SE_NAME "avx512"
#define SE_SUPPORTED (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
#include "encoder_int8.inc"
