# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's handwritten digits as spike trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ['STEPS', 'Digits', 'encode', 'load']

#: Steps that a line is shown.
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Digits:
    """Spike trains ``[samples, T, inputs]`` and labels."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    test_images: np.ndarray

    def batches(self, size: int, epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shuffled batches of an epoch, time first; the rest of the division is left out."""
        order = np.random.RandomState(seed + epoch).permutation(len(self.train_y))
        for i in range(0, len(order) - size + 1, size):
            pick = order[i:i + size]
            yield self.train_x[pick].swapaxes(0, 1), self.train_y[pick]


def encode(images: np.ndarray) -> np.ndarray:
    """Show a picture line by line: brighter pixels fire more often while their line is shown.

    Eight inputs see its rows from the top, eight its columns from the left, a few steps a line.
    What the first lines looked like is gone when the last ones come, so the network has to
    remember.

    Parameters
    ----------
    images : array, ``[samples, 8, 8]``
        Grey levels in [0, 1].

    Returns
    -------
    array, ``[samples, 8 * STEPS, 16]``, float32, 0 or 1
    """
    lines = np.concatenate([images, images.swapaxes(1, 2)], axis=2)
    levels = (np.arange(STEPS) + 0.5) / STEPS
    spikes = lines[:, :, None, :] > levels[:, None]
    return spikes.reshape(len(images), -1, 16).astype(np.float32)


def load() -> Digits:
    """Three quarters to train, a quarter to test, the same for everybody."""
    digits = load_digits()
    images = digits.images / 16.
    split = train_test_split(images, digits.target, test_size=0.25, random_state=0,
                             stratify=digits.target)
    train, test, train_y, test_y = split
    return Digits(encode(train), train_y.astype(np.int32), encode(test),
                  test_y.astype(np.int32), test)
