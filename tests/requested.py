"""Shared by the tests of finished requests: a request is carried out once, and each test gets a copy of its files.

The report names files by absolute paths, so all tests of a module work in one folder, which is emptied before each.
"""

import shutil

import pytest


@pytest.fixture(scope="module")
def _folders(tmp_path_factory):
    """Return the folder in which tests work, and where the output of the request is kept."""
    return tmp_path_factory.mktemp("request"), tmp_path_factory.mktemp("kept") / "out"


@pytest.fixture
def tmp_path(_folders):
    """Return an empty folder, the same one for all tests of a module."""
    shutil.rmtree(_folders[0])
    _folders[0].mkdir()
    return _folders[0]


@pytest.fixture
def requested(forget, _folders):
    """Fill `out` with the output of a request, as `forget()` does."""
    folder, kept = _folders
    if not kept.exists():
        code, _, printed = forget()
        assert code == 0, printed
        shutil.copytree(folder / "out", kept)
    else:
        shutil.copytree(kept, folder / "out")
