"""Numbers that the plain form and the kernels share."""

# Added to the length of a row that is divided by it.
UNIT_EPS = 1e-5
