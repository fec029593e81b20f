// Four lanes: SSE2 on x86-64, NEON on 64-bit ARM; the compiler's choice elsewhere.
#define SE_LANES 4
#define SE_KERNELS kPortableKernels
#define SE_NAME "portable"
#define SE_SUPPORTED true
#include "mel_lanes.inc"
