"""The wheel works outside the checkout and contains every file of the package, including py.typed and tables of configurations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from triton_rmsnorm.runtime import config, table

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one worker builds the wheel, once

ROOT = Path(__file__).parents[1]
KEY = config.Key("forward", 4096, 2, 2)
PLANTED = table.Measured(config.Config(1, 4096, 2), 1.0, 2.0)


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The files from which the wheel is built, plus one table of configurations."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "triton_rmsnorm", tree / "triton_rmsnorm", ignore=shutil.ignore_patterns("__pycache__"))
    table.write(tree / "triton_rmsnorm" / "tuned" / "planted.json", config.SM_90, {KEY: PLANTED})
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, cwd=tree)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_files(tree, wheel):
    package = tree / "triton_rmsnorm"
    files = {path.relative_to(tree).as_posix() for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files >= {"triton_rmsnorm/py.typed", "triton_rmsnorm/tuned/planted.json", "triton_rmsnorm/runtime/kernels.py"}
    names = set(ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_is_imported_from_there(installed, tmp_path):
    file, configuration = run(ROOT / "tests" / "scripts" / "shipped_tables.py", cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(file).parent == installed / "triton_rmsnorm"
    assert configuration == repr(PLANTED.config)
