import numpy as np
import pytest

from fastvae import schedules


def test_linear():
    assert [schedules.linear(step, 4) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert schedules.linear(5, 10, start=2.0, end=1.0) == 1.5


def test_cosine():
    values = [schedules.cosine(step, 100, start=1.0, end=3.0) for step in range(150)]
    expected = 2 - np.cos(np.pi * np.minimum(np.arange(150) / 100, 1))
    np.testing.assert_allclose(values, expected)


def test_cyclical():
    values = [schedules.cyclical(step, 80, cycles=4, ramp=0.5) for step in range(90)]
    np.testing.assert_allclose(values[:20], np.minimum(np.arange(20) / 10, 1))
    for cycle in range(4):
        np.testing.assert_allclose(values[20 * cycle : 20 * cycle + 20], values[:20], atol=1e-12)
    assert values[80:] == [1] * 10
    assert schedules.cyclical(10, 80, cycles=2, ramp=1.0, start=1.0, end=5.0) == 2.0


@pytest.mark.parametrize("kind", schedules.SCHEDULES)
def test_by_name(kind):
    for step in (0, 3, 39, 40, 10**9):
        expected = {"constant": 2.0, "cyclical": None}.get(kind, 0.0)
        value = schedules.schedule(kind, step, 40, start=0.5, end=2.0)
        if expected is None:
            assert value == schedules.cyclical(step, 40, start=0.5, end=2.0)
        elif kind != "constant":
            assert value == getattr(schedules, kind)(step, 40, start=0.5, end=2.0)
        assert 0.5 <= value <= 2.0
        assert step < 40 or value == 2.0
    assert schedules.schedule("constant", 0, 40, start=0.5, end=2.0) == 2.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: schedules.linear(-1, 10), "step must be at least 0, got -1"),
        (lambda: schedules.cosine(0, 0), "steps must be at least 1, got 0"),
        (lambda: schedules.cyclical(0, 10, cycles=0), "cycles must be at least 1, got 0"),
        (lambda: schedules.cyclical(0, 10, ramp=0.0), "ramp must be greater than 0 and at most 1, .* got 0"),
        (lambda: schedules.schedule("quadratic", 0, 1), "kind must be one of 'constant', 'linear', 'cosine', 'cyclical', got 'quadratic'"),
    ],
)
def test_error_sentences(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
