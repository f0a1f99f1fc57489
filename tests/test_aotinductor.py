"""The example of C++ without Python: export, build and run, on photographs, with what Python computes as the truth."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effops import _library

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "aotinductor"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="the example is built with CMake"),
]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ("cmake", "-S", EXAMPLE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", prefix),
        ("cmake", "--build", folder),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout
    return folder / "aotinductor_example"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what the export printed."""
    folder = tmp_path_factory.mktemp("exported")
    done = run(sys.executable, EXAMPLE / "export.py", "--out", folder, "--count", "3")
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_cpp_agrees_with_python(program: Path, exported: tuple[Path, str], cpp: str) -> None:
    folder, printed = exported
    assert "  1 x effops.dsconv_fwd.default\n 16 x effops.mbconv_fwd.default\n" in printed
    done = run(program, folder, _library.LIBRARY_PATH)
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:3]] == ["image 0", "image 1", "image 2"]
    expected = torch.load(folder / "logits.pt").argmax(1).tolist()
    labels = (folder / "labels.txt").read_text().splitlines()
    assert all(f": {labels[best]} " in line for best, line in zip(expected, done.stdout.splitlines(), strict=False))
    assert "batch 1: " in done.stdout and "batch 3: " in done.stdout


def test_cpp_tells_other_logits(program: Path, exported: tuple[Path, str], cpp: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "changed"))
    logits = torch.load(folder / "logits.pt")
    logits[0, 0] += 0.01 * logits.abs().max()
    torch.save(logits, folder / "logits.pt")
    assert run(program, folder, _library.LIBRARY_PATH).returncode == 1


def test_cpp_says_what_is_missing(program: Path, exported: tuple[Path, str], tmp_path: Path) -> None:
    done = run(program, exported[0], "/nonexistent.so")
    assert done.returncode == 1 and done.stdout.startswith("/nonexistent.so: cannot open shared object file")
    done = run(program, tmp_path, _library.LIBRARY_PATH)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
    assert run(program).returncode == 2


def test_export_wants_two_images(tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLE / "export.py", "--out", tmp_path, "--count", "1")
    assert done.returncode == 2 and "--count must be at least 2" in done.stdout
