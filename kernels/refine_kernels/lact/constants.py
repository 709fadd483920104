"""Constants that the plain-torch form and the Triton kernels share."""

# Added to the length by which a vector is divided.
UNIT_EPS = 1e-5
