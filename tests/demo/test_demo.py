# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end, on a few batches."""

import re

import numpy as np
import pytest

from traceops import demo
from traceops.demo import data


def test_the_digits_are_the_same_spikes_every_time():
    a, b = data.load(), data.load()
    assert a.train_spikes.shape == (data.STEPS, 1397, data.LINES)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert set(np.unique(a.test_spikes)) == {0., 1.} and 0.02 < a.test_spikes[:32].mean() < 0.2
    assert not a.test_spikes[32:].any()


def test_brighter_pixels_fire_more_and_only_in_their_row():
    image = np.zeros((1, 8, 8))
    image[0, 2] = np.linspace(0, 1, 8)
    spikes = data.encode(image)[:, 0].reshape(-1, 8, 8)
    counts = spikes.sum(0)[2]
    assert (np.diff(counts) >= 0).all() and counts[-1] == 4 and counts[0] == 0
    assert spikes[8:12].sum() == spikes.sum()


@pytest.mark.parametrize('images, text', [(np.zeros((8, 8)), r'image\[None\]'),
                                          (np.full((1, 8, 8), 16.), 'divide')])
def test_what_is_no_picture(images, text):
    with pytest.raises(ValueError, match=text):
        data.encode(images)


def test_a_quick_run_is_repeatable_and_draws(tmp_path, capsys):
    said = []
    for i in range(2):
        out = tmp_path / str(i)
        assert demo.main(['--quick', '--hidden', '16', '--out', str(out)]) == 0
        assert (out / 'demo.png').stat().st_size > 20_000
        said.append(capsys.readouterr().out)
    found = [re.search(r'accuracy: +(\S+) %', s)[1] for s in said]
    assert found[0] == found[1]
    difference = float(re.search(r'difference of a leaf (\S+)', said[0])[1])
    assert difference <= 1e-5
    assert 'recurrent.weight' in said[0] and 'window' in said[0] and 'times faster' in said[0]
