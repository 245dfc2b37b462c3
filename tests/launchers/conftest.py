"""The batch script of a test."""

import pytest
from script_job import Job


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job(tmp_path)
