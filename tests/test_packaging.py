"""What ``pip install .`` gives a downstream project: the model modules, PyTorch and NumPy, and no more."""

import ast
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from deterministic_model import DeterministicModel
from dynamics_model import KINDS

pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    *("dynamics_model", *(module for module, _ in KINDS.values())),
    *("mujoco_tasks", "model_env", "model_planning", "model_export"),
}
EXTRAS = {  # which files say what each brings
    "envs": ["envs"],
    "export": ["export"],
    "minari": ["minari"],
    "ray": ["", "ray"],
    "bench": ["", "bench"],
    "dev": ["", "envs", "export", "dev"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built in a copy of what could get into it: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for pattern in ("*.py", "*.txt", "*.toml", "README.md", "LICENSE", "*/*.py"):
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of an installation."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(installed):
    """What the package says of itself."""
    (path,) = installed.glob("*.dist-info/METADATA")
    return message_from_bytes(path.read_bytes())


def normalise(requirement):
    """Brings a requirement to one form: its parts sorted, without spaces, quotes and the name of the extra."""
    requirement = re.sub(r"""( and )?extra == ["']\w+["']|[\s'"]""", "", requirement).rstrip(";").lower()
    return sorted(re.split(r",|(?=[<>=])(?<![<>=])", requirement))


def required_by(name):
    """Returns the requirements in ``requirements-NAME.txt``, or ``requirements.txt`` for no name, in one form."""
    text = (ROOT / (f"requirements-{name}.txt" if name else "requirements.txt")).read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [normalise(line) for line in lines if line]


def test_the_model_modules_are_installed_and_nothing_else(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {
        f"{module}.py" for module in MODULES
    }


def test_pytorch_and_numpy_are_all_that_an_installation_needs(metadata):
    assert metadata["Requires-Python"] == ">=3.10"
    assert [line for line in metadata.get_all("Requires-Dist") if "extra" not in line] == [
        "torch<3,>=2.2",
        "numpy<3,>=1.26",
    ]


def test_every_extra_brings_what_its_files_say(metadata):
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    for extra, names in EXTRAS.items():
        lines = [line for line in metadata.get_all("Requires-Dist") if re.search(rf"extra == .{extra}.$", line)]
        assert [normalise(line) for line in lines] == [line for name in names for line in required_by(name)], extra


def test_every_requirement_has_a_range():
    for path in ROOT.glob("requirements*.txt"):
        for requirement in required_by(path.stem.partition("-")[2]):
            bounds = "".join(requirement)
            assert "==" in bounds or (">=" in bounds and re.search(r"<\d", bounds)), (path.name, requirement)


USE_INSTALLED = """
import importlib, pickle, sys
folder, model, *modules = sys.argv[1:]
sys.path.insert(0, folder)
for module in modules:
    assert importlib.import_module(module).__file__.startswith(folder), module
with open(model, "rb") as file:
    models, metadata = pickle.load(file)
print(type(models[0]).__name__, models[0].predict([[1.0, 2.0, 3.0]], [[0.5, 0.5]]).shape)
"""


def test_installed_modules_import_and_load_a_model_far_from_the_repository(installed, random_member, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(DeterministicModel)], {"format_version": 1, "seed": 0})))
    # -I: neither the current folder nor PYTHONPATH
    modules = sorted(path.stem for path in installed.glob("*.py"))
    command = [sys.executable, "-I", "-c", USE_INSTALLED, str(installed), str(path), *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "DeterministicModel (1, 3)\n"), done.stderr


def test_no_syntax_is_newer_than_the_oldest_python():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/*/*.py")]:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
