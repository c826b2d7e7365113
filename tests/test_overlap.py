"""What travels does so beside the work: a step on a clock of its own, a cable of a given speed (link.py)."""

import link
import pytest

import hd_pissa
import hd_pissa_extra

LAYERS, RATE = 8, 1e9
LAYER = 8 * 4 * link.RANK * 2 * link.WIDTH / RATE       # seconds that dA and dB of one layer are on their way
TOLD = 2e-6                                             # and the numbers that processes agree about


@pytest.mark.parametrize("options, exposed", [({}, 1), (dict(gradients="global", send="backward"), 2)],
                         ids=["local", "whole batch"])  # fmt: skip
def test_only_the_first_gather_and_the_last_scatter_are_waited_for(options, exposed):
    """All else is hidden: of 8 layers the step takes 1.07 of its work at most, the goal is 1.1."""
    got = link.exact(hd_pissa_extra.attach, LAYERS, RATE, bucket_mb=0, **options)
    assert got["work"] == pytest.approx(LAYERS * sum(link.AWAY))
    assert got["exchange"] == pytest.approx(exposed * LAYERS * LAYER, abs=TOLD)
    assert got["step"] == pytest.approx(got["work"] + exposed * LAYER, abs=TOLD)
    assert got["step"] < 1.1 * max(got["work"], got["exchange"])


@pytest.mark.parametrize("attach, options, exposed", [
    (hd_pissa_extra.attach, {}, LAYERS), (hd_pissa.attach, {}, LAYERS),
    (hd_pissa_extra.attach, dict(gradients="global", bucket_mb=0), LAYERS + 1)],
    ids=["one bucket", "the core", "whole batch, once a step"])  # fmt: skip
def test_what_hides_nothing(attach, options, exposed):
    """One bucket, as small models have by default, and gradients that are sent once a step."""
    got = link.exact(attach, LAYERS, RATE, **options)
    assert got["step"] == pytest.approx(got["work"] + exposed * LAYER, abs=TOLD)


def test_a_cable_that_is_slower_than_the_work_is_never_idle():
    """Then the exchange is the larger of the two, and all that is added is what nothing can travel beside."""
    got = link.exact(hd_pissa_extra.attach, LAYERS, RATE / 4, bucket_mb=0)
    assert got["exchange"] == pytest.approx(4 * LAYERS * LAYER, abs=4 * TOLD)
    forward_and_backward, last_fold = LAYERS * sum(link.AWAY[:2]), link.AWAY[2]
    assert got["step"] == pytest.approx(forward_and_backward + got["exchange"] + last_fold, abs=4 * TOLD)
