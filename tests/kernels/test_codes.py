"""The proof that codes.py needs: its quotients round to the integers that a division's do."""

from __future__ import annotations

import numpy as np

# bits of the significand of a 16-bit x (fp16: 11, bf16: 8), and of fp32
X_BITS, BITS = 11, 24


def test_no_quotient_is_near_to_a_border_of_what_rounds_to_an_integer_and_a_half():
    # borders of h + 1/2 as an fp32, in odd integers of 25 bits
    h = np.arange(127)
    half = (2 * h + 1) << (BITS - np.floor(np.log2(2 * h + 1)).astype(int))
    borders = np.concatenate([half - 1, half + 1])[:, None]
    x = np.arange(1 << (X_BITS - 1), 1 << X_BITS)[None, :]
    nearest = np.full((borders.size, x.size), np.inf)
    for shift in range(BITS + 25 - X_BITS - 1, BITS + 25 - X_BITS + 3):
        lifted = x << shift
        for scale in (lifted // borders, lifted // borders + 1):
            fits = (scale >= 1 << (BITS - 1)) & (scale < (1 << BITS) - 1)
            distance = np.abs(lifted - borders * scale) / (borders * scale)
            nearest = np.where(fits, np.minimum(nearest, distance), nearest)
    assert np.isfinite(nearest).mean() > 0.9
    # the quotient's error is 2**-46
    assert 2.0**-40 < nearest.min() < 2.0**-39


def test_no_scale_has_the_one_significand_that_is_left_out_there():
    # which an x that is a power of two would bring within 2**-48 of a border
    absmax = np.arange(1, 1 << X_BITS, dtype=np.float32)
    significand, _ = np.frexp(absmax / np.float32(127))
    assert (significand < 1 - 2.0**-BITS).all()
