"""A whole search on a cluster, whose worker dies in the middle."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

import pytest
from tests.cluster.cluster_nodes import TARGET, Nodes, trained, wait_for

from equipoise import extras
from equipoise.bundle.reading import read_manifest
from equipoise.search.budget import Budget
from equipoise.search.goal import Goal
from equipoise.tuning.config import TuneConfig
from equipoise.tuning.tune import JOURNALS, tune

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not extras.installed("ray"), reason="needs the extra cluster"),
]

TRIALS = 6


def ended(cache: Path) -> list[str]:
    """Verdicts in the journal."""
    (journal,) = (cache / JOURNALS).glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(journal)) as opened:
        return [verdict for (verdict,) in opened.execute("select verdict from trials")]


def test_a_search_loses_no_trial_when_a_node_dies(
    nodes: Nodes, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trials end as measured ones or twins, and what was chosen is a bundle like any other."""
    monkeypatch.chdir(repository)
    monkeypatch.syspath_prepend(repository)
    config = TuneConfig(
        source="module:examples.digits.model:build",
        data="digits",
        weights=trained(tmp_path, monkeypatch),
        metric="accuracy",
        target=TARGET,
        calibration_samples=32,
        threads=1,
        rounds=12,
        goal=Goal(max_drop=0.05),
        budget=Budget(trials=TRIALS),
        prune=(),
        cluster=nodes.address,
        storage=str(tmp_path / "storage"),
        cache=tmp_path / "cache",
        output=tmp_path / "out",
    )
    killer = threading.Thread(target=kill_after_work, args=(nodes,))
    killer.start()
    result = tune(config)
    killer.join(60)
    assert "worker" not in nodes.by_name
    assert len(result.candidates) == TRIALS
    verdicts = {candidate.verdict for candidate in result.candidates}
    assert verdicts <= {"baseline", "accepted", "refused", "not applicable"}
    assert len(ended(tmp_path / "cache")) == TRIALS
    assert read_manifest(tmp_path / "out" / "bundle").engines


def kill_after_work(nodes: Nodes) -> None:
    """End the worker once it has got files to work on."""
    wait_for(lambda: list((nodes.folder / "worker").glob("inputs/*")), seconds=600)
    nodes.kill("worker")
