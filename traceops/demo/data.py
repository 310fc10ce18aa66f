# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits as spike trains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ['LINES', 'STEPS', 'Digits', 'Part', 'encode', 'load']

#: Input lines: one per pixel of an 8 x 8 image.
LINES = 64
_ROWS, _STEPS_PER_ROW, _SILENT_STEPS = 8, 4, 8
#: Steps of 1 ms: eight rows of four, then silence.
STEPS = _ROWS * _STEPS_PER_ROW + _SILENT_STEPS


class Part(NamedTuple):
    """``spikes [T, samples, 64]`` float32 0/1, ``labels [samples]`` int32, ``images``."""

    spikes: np.ndarray
    labels: np.ndarray
    images: np.ndarray


class Digits(NamedTuple):
    """To learn from, to choose settings with, and to judge the one that was chosen."""

    train: Part
    validation: Part
    test: Part


def encode(images: np.ndarray) -> np.ndarray:
    """Scan images from top to bottom, as a rolling shutter does.

    A row is seen for four steps and is gone afterwards; the last eight steps are silent. So
    the answer, which is due at the end, needs a memory of what was seen up to 40 steps ago.
    While its row is seen, a pixel fires ``round(4 * brightness)`` evenly spaced spikes.

    Parameters
    ----------
    images : array ``[samples, 8, 8]``
        Brightness from 0 to 1.

    Returns
    -------
    array ``[40, samples, 64]``
        float32, 1 where a pixel's line fires. The same image always gives the same spikes.

    Raises
    ------
    ValueError
        Not 8 x 8 images, or a brightness outside 0 to 1.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 3 or images.shape[1:] != (_ROWS, 8):
        raise ValueError(f'encode() takes images [samples, 8, 8], got shape {images.shape}; for '
                         f'one image pass image[None].')
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f'encode() takes a brightness from 0 to 1, got {images.min():g} to '
                         f'{images.max():g}; divide the digits of scikit-learn by 16.')
    # A perfect integrator that starts half full fires when its charge passes an integer.
    charge = 0.5 + images * np.arange(_STEPS_PER_ROW + 1, dtype=np.float32)[:, None, None, None]
    fired = np.diff(np.floor(charge), axis=0)                     # [4, samples, row, column]
    scanned: np.ndarray = np.zeros((_ROWS, _STEPS_PER_ROW, len(images), _ROWS, 8), np.float32)
    for row in range(_ROWS):
        scanned[row, :, :, row] = fired[:, :, row]
    spikes: np.ndarray = scanned.reshape(-1, len(images), LINES)
    return np.concatenate([spikes, np.zeros((_SILENT_STEPS, *spikes.shape[1:]), np.float32)])


def load(validation: int = 200, test: int = 400) -> Digits:
    """The 1797 digits of scikit-learn, split once and for all (stratified, fixed seed)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    labels = labels.astype(np.int32)
    rest, unseen, rest_labels, unseen_labels = train_test_split(
        images, labels, test_size=test, stratify=labels, random_state=0)
    seen, held, seen_labels, held_labels = train_test_split(
        rest, rest_labels, test_size=validation, stratify=rest_labels, random_state=0)
    return Digits(*(Part(encode(i), n, i) for i, n in (
        (seen, seen_labels), (held, held_labels), (unseen, unseen_labels))))
