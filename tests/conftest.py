"""Settings that must be in force before transformers or matplotlib are imported, and the way to real data."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf_ehr-tests-"))

import pytest


@pytest.fixture(scope="session")
def real_data():
    """``real_data("mimic3_demo")`` → its folder, or a skip that says what is missing."""

    def find(name: str) -> Path:
        root = os.environ.get("HF_EHR_TEST_DATA")
        if not root:
            pytest.skip("HF_EHR_TEST_DATA is not set: tests on real data are skipped")
        folder = Path(root) / name
        if not folder.is_dir():
            pytest.skip(f"{folder} does not exist: tests on {name} are skipped")
        return folder

    return find
