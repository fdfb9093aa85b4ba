"""One checkpoint for all layouts: what one layout wrote, any other goes on from, with moving averages and schedules."""

import pytest

from tests.ranks.forked import run_ranks
from tests.ranks.layouts import SERIAL, TOLERANCE, Layout, mostly_long, resume_from, save_after, worst

SETTINGS = ("ema.decay=0.9", "optim.schedule=wsd", "optim.cooldown_from=48", "optim.cooldown_images=96")
SOURCES = [SERIAL, Layout(4, 2, 1), Layout(3, 1, 3), Layout(4, 2, 3), Layout(4, 4, 0)]
TARGETS = [SERIAL, Layout(2, 1, 2), Layout(3, 1, 1), Layout(2, 2, 3), Layout(4, 2, 0), Layout(2, 2, 1, True)]


@pytest.mark.parametrize("source", mostly_long(*SOURCES, quick=[Layout(4, 2, 1)]))
def test_a_checkpoint_goes_on_at_any_layout(tmp_path, source):
    """Bit-equal at the same layout, rounding elsewhere; every file is one format."""
    losses, averages = run_ranks(save_after, source.ranks, source, tmp_path, 5, *SETTINGS)[0]
    assert averages, "a moving average was asked for"
    for target in TARGETS:
        resumed, averaged = run_ranks(resume_from, target.ranks, target, tmp_path, 5, *SETTINGS)[0]
        assert worst(resumed, losses) < TOLERANCE, target
        assert averaged.keys() == averages.keys()
        assert max(float((averaged[n] - averages[n]).abs().max()) for n in averages) < TOLERANCE, target
    again, averaged = run_ranks(resume_from, source.ranks, source, tmp_path, 5, *SETTINGS)[0]
    assert again == losses
    assert all((averaged[n] == averages[n]).all() for n in averages)


FORGOTTEN = ["optimizer:exp_avg/", "optimizer:exp_avg_sq/", "step", "ema:"]


@pytest.mark.parametrize("forgotten", FORGOTTEN)
@pytest.mark.parametrize("layout", mostly_long(Layout(2, 1, 1), Layout(2, 1, 3), quick=[Layout(2, 1, 1)]))
def test_a_resume_that_forgets_something_is_noticed(tmp_path, layout, forgotten):
    """Sabotage twin: fresh optimizer state, Adam's count from zero, a fresh average."""
    losses, averages = run_ranks(save_after, 2, layout, tmp_path, 5, *SETTINGS)[0]
    resumed, averaged = run_ranks(lambda: resume_from(layout, tmp_path, 5, *SETTINGS, forget=forgotten), 2)[0]
    apart = max(float((averaged[n] - averages[n]).abs().max()) for n in averages)
    assert (apart if forgotten == "ema:" else worst(resumed, losses)) > 20 * TOLERANCE


def test_a_schedule_that_starts_over_is_noticed(tmp_path):
    """Sabotage twin: the rate belongs to the position, so steps from image 0 on are other steps."""
    losses, _ = run_ranks(save_after, 1, SERIAL, tmp_path, 5, *SETTINGS)[0]
    constant = [s for s in SETTINGS if not s.startswith("optim")]
    resumed, _ = run_ranks(resume_from, 1, SERIAL, tmp_path, 5, *constant)[0]
    assert worst(resumed, losses) > 20 * TOLERANCE
