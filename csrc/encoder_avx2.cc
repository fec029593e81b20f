#define SE_LANES 8
#define SE_PANEL_BLOCKS 1
#define SE_POINTWISE_TILE 6  // 12 sums, 2 weights and an input in 16 registers
#define SE_DEPTHWISE_TILE 6
#define SE_KERNELS kAvx2Encoder
#define SE_NAME "avx2"
#define SE_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#include "encoder_lanes.inc"
