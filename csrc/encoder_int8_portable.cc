// Four lanes: correct everywhere, and nothing else.
#define SE_LANES 4
#define SE_PANEL_BLOCKS 1
#define SE_POINTWISE_TILE 2
#define SE_VNNI 0
#define SE_KERNELS kPortableInt8
#define SE_NAME "portable"
#define SE_SUPPORTED true
#include "encoder_int8.inc"
