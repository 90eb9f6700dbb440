"""Pictures are cut without loading an encoder library: importing one takes seconds and hundreds of megabytes."""

import subprocess
import sys

import pytest

from tests.project import ROOT

MODULES = sorted(f"fieldmark.pictures.{file.stem}" for file in (ROOT / "fieldmark/pictures").glob("[!_]*.py"))
IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"


@pytest.mark.slow
def test_pictures_import_no_encoder() -> None:
    """All of them in one process: what one of them loads is loaded."""
    words = [sys.executable, "-c", IMPORT, *MODULES]
    loaded = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(MODULES) <= set(loaded)
    assert not {"open_clip", "timm", "transformers"}.intersection(loaded)
    assert not [each for each in loaded if each.startswith("fieldmark.encoders")]
