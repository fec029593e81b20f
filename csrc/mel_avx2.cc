#define SE_LANES 8
#define SE_KERNELS kAvx2Kernels
#define SE_NAME "avx2"
#define SE_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#include "mel_lanes.inc"
