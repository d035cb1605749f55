import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # misses 4-bit kernels that nobody asked for
