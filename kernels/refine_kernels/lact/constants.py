"""Constants that the plain-torch form and the Triton kernels share."""

# Added to the length by which a vector is divided.
UNIT_EPS = 1e-5
# Added to the length of a row of the fast weights.
ROW_EPS = 1e-5
