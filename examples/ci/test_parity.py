"""Parity as tests among others. Copy it, and name your own model, engine and data.

EQUIPOISE_ENGINE=bundle EQUIPOISE_SOURCE=model EQUIPOISE_DATA=data.jsonl pytest test_parity.py
"""

from __future__ import annotations

import os

import pytest

ENGINE = os.environ.get("EQUIPOISE_ENGINE", "bundle")
SOURCE = os.environ.get("EQUIPOISE_SOURCE", "model")
DATA = os.environ.get("EQUIPOISE_DATA", "data.jsonl")


@pytest.mark.equipoise_parity(engine=ENGINE, against=SOURCE, data=DATA, min_sqnr_db=20.0)
def test_engine_decides_as_the_model(equipoise_record):
    """The record of the check is there for claims of your own."""
    assert equipoise_record.samples >= 30


def test_first_samples_are_close(equipoise_parity):
    """The same as a call: one test may check several engines."""
    equipoise_parity(ENGINE, against=SOURCE, data=DATA, samples=10, min_cosine=0.99)
