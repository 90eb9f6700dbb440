"""Pictures are cut without loading an encoder library: importing one takes seconds and hundreds of megabytes."""

import subprocess
import sys

import pytest

from tests.project import ROOT

MODULES = sorted(f"fieldmark.pictures.{file.stem}" for file in (ROOT / "fieldmark/pictures").glob("[!_]*.py"))
IMPORT = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"


@pytest.mark.parametrize("name", MODULES)
def test_pictures_import_no_encoder(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT, name], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert name in loaded
    assert not {"open_clip", "timm", "transformers"}.intersection(loaded)
    assert not [each for each in loaded if each.startswith("fieldmark.encoders")]
