#define SE_LANES 8
#define SE_PANEL_BLOCKS 1
#define SE_POINTWISE_TILE 6  // 12 sums, 2 weights, an input and a product in 16 registers
#define SE_VNNI 0
#define SE_KERNELS kAvx2Int8
#define SE_NAME "avx2"
#define SE_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#include "encoder_int8.inc"
