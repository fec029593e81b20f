"""How near two computations of the same thing have to be, each with its reason."""

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

# How much lower a short run's equal error rate is to be than the better floor's: a fraction of what it reaches.
LEARNT_EER_MARGIN = 0.02
