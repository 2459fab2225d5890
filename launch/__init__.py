"""Entry points: gin, flags, devices and processes. The library below imports none of them."""
