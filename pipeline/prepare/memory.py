"""How a process that works clip after clip holds memory."""

import ctypes
import functools

import pyarrow as pa

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's <malloc.h>."""

KEPT_BYTES = 128 << 20
LARGEST_KEPT_BYTES = 32 << 20
"""Of one allocation; glibc takes no more than this."""


@functools.cache
def keep_freed_memory() -> None:
    """Have this process keep what it frees, up to `KEPT_BYTES`, for what it allocates next.

    Clip after clip, the same megabytes of samples were handed back to the system and asked for again, which clears
    each page anew: a sixth of the time that decoding took. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own gives back after 10 ms
