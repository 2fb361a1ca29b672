"""What integrations do without the frameworks. With them: tests/test_integrations_kernels.py, which runs where versions fit."""

import subprocess
import sys

import pytest

import triton_rmsnorm


def test_frameworks_are_imported_when_they_are_asked_for():
    code = "import sys, triton_rmsnorm; triton_rmsnorm.kernel_mapping(); assert not {'transformers', 'kernels'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_versions_that_do_not_fit(monkeypatch):
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"kernels must be >=.*,<.* for transformers .*, got .*; transformers 5.22.2 and kernels 0.17.2 fit"
    ):
        triton_rmsnorm.kernel_config()


def test_transformers_without_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", None)
    with pytest.raises(ImportError, match=r"transformers must be 5.22 or later for kernel_config, got "):
        triton_rmsnorm.kernel_config()
