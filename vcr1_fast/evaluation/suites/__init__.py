"""Public benchmarks by name. A new one is one file with a `SUITE`, one line here and one row in docs/suites.md."""

from __future__ import annotations

from vcr1_fast.evaluation.suites import (
    activitynet_captions,
    charades_sta,
    got10k,
    longvideobench,
    lvbench,
    mlvu,
    mvbench,
    nextgqa,
    perception_test,
    qvhighlights,
    timelens_bench,
    videomme,
    vsibench,
)
from vcr1_fast.evaluation.suites.suite import Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (
        videomme,
        mvbench,
        perception_test,
        longvideobench,
        mlvu,
        lvbench,
        vsibench,
        charades_sta,
        activitynet_captions,
        qvhighlights,
        timelens_bench,
        nextgqa,
        got10k,
    )
}
