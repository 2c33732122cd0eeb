"""Who imports whom: the architecture of the README's file tree, read from the imports of every module.

Imports count wherever they stand: at the top, inside functions, and under ``TYPE_CHECKING``. There is one exception:
``tracking`` writes models to MLflow (``mlflow_model.py``), fetches them in ``load_run``, and names their type: it may
import the model modules in that module, in that function, and for annotations.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamics_model import KINDS

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = {"learn_model", "evaluate_model", "compare_models", "collect_dataset"}
KIND_MODULES = {module for module, _ in KINDS.values()}
MODELS = {"dynamics_model", "mujoco_tasks", "model_env", "model_planning", "model_export"} | KIND_MODULES
SHARED = {"config", "cli", "utils"}
PACKAGES = {"data", "training", "tracking", "evaluation", "reporting", "study"}
EVERYTHING = PACKAGES | MODELS | SHARED  # that may be imported at all: no commands, examples or benchmarks

# By package or root module: which others it may import. Modules of one package may import each other.
MAY_IMPORT = {
    "utils": set(),
    "config": {"utils"},
    "cli": {"utils"},
    **dict.fromkeys(MODELS, MODELS),
    "data": {"utils"},
    "reporting": {"utils"},
    "tracking": {"utils"},
    "training": {"config", "data", "utils"} | MODELS,
    "evaluation": {"data", "reporting", "utils"} | MODELS,
    "study": EVERYTHING,
    **dict.fromkeys(COMMANDS, EVERYTHING),
    "benchmarks": EVERYTHING,
    "examples": MODELS,  # what a planner has of this repository
}


class Import(NamedTuple):
    """An import statement: the dotted name of what it imports, and where it stands.

    ``functions`` are the functions around it, the outermost first.
    """

    name: str
    line: int
    functions: tuple[str, ...]
    is_for_types: bool


def dotted_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top(module):
    return module.split(".")[0]


FOLDERS = (ROOT, *(ROOT / name for name in sorted(PACKAGES | {"benchmarks", "examples"})))
FILES = {dotted_name(path): path for folder in FOLDERS for path in sorted(folder.glob("*.py"))}


def read_imports(source, functions=(), is_for_types=False):
    """Returns every import of a module's source, or of a piece of its syntax tree."""
    tree = ast.parse(source) if isinstance(source, str) else source
    found = []
    for node in ast.iter_child_nodes(tree):
        names, inner, types = [], functions, is_for_types
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of what is imported"
            # What is imported from a package may be one of its modules.
            names = [name if (name := f"{node.module}.{a.name}") in FILES else node.module for a in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (*functions, node.name)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            types = True
        found += [Import(name, node.lineno, functions, is_for_types) for name in names]
        found += read_imports(node, inner, types)
    return found


IMPORTS = {module: read_imports(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def is_allowed(module, imported):
    """Whether a module may import a module of this project."""
    here, there = top(module), top(imported.name)
    if here == there:
        return here in PACKAGES | {"benchmarks"}
    if here == "tracking" and there in MODELS:
        return module == "tracking.mlflow_model" or "load_run" in imported.functions or imported.is_for_types
    return there in MAY_IMPORT[here]


def violations(module, imports):
    """Returns the imports of a module that no rule allows, as lines."""
    ours = {top(name) for name in FILES}
    return [
        f"{module.replace('.', '/')}.py:{imported.line} imports {imported.name}"
        for imported in imports
        if top(imported.name) in ours and not is_allowed(module, imported)
    ]


def circle(module, imports):
    """Returns the modules through which a module imports itself, from it to it again; empty if it does not."""
    waiting, importer = [module], {}  # by module that was reached: which one imports it
    while waiting:
        here = waiting.pop()
        reached = {imported.name for imported in imports[here]} & set(imports) - set(importer)
        importer |= dict.fromkeys(reached, here)
        waiting += reached
    if module not in importer:
        return []
    path = [module, importer[module]]
    while path[-1] != module:
        path.append(importer[path[-1]])
    return path[::-1]


# --- The rules ---


@pytest.mark.parametrize("module", FILES)
def test_module_imports_only_what_the_architecture_allows(module):
    assert top(module) in MAY_IMPORT, f"{module} has no place in the architecture"
    assert violations(module, IMPORTS[module]) == []


@pytest.mark.parametrize("module", FILES)
def test_module_does_not_import_itself_in_a_circle(module):
    assert circle(module, IMPORTS) == []


@pytest.mark.parametrize("module", sorted(MODELS & set(FILES)))
def test_model_module_imports_nothing_but_pytorch_numpy_and_other_models(module):
    gymnasium = {"gymnasium", "stable_baselines3"} if module == "model_env" else set()
    known = sys.stdlib_module_names | {"torch", "numpy"} | gymnasium | MODELS
    assert {top(imported.name) for imported in IMPORTS[module]} <= known


def test_what_goes_with_a_logged_model_imports_the_model_modules_alone():
    ours = {top(name) for name in FILES}
    assert {imported.name for imported in IMPORTS["tracking.mlflow_model"] if top(imported.name) in ours} <= MODELS


def test_root_holds_what_a_user_types_or_loads():
    root = {module for module, path in FILES.items() if path.parent == ROOT}
    assert root == COMMANDS | MODELS | SHARED
    assert len(root - KIND_MODULES) <= 12


def test_packages_are_those_of_the_architecture_and_one_level_deep():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == PACKAGES | {"benchmarks"}
    assert not [path for folder in FOLDERS[1:] for path in folder.glob("*/**/*.py")]


# --- Model modules on their own ---

# Imports every module named in its arguments anew, with the top-level names in `blocked` made unimportable.
IMPORT_ALONE = """
import sys
blocked, *modules = sys.argv[1:]
sys.modules.update(dict.fromkeys(blocked.split(",")))
import torch, numpy
for module in modules:
    for name in modules:
        sys.modules.pop(name, None)
    __import__(module)
"""


def needed_distributions(*names):
    """Returns distributions with all that they require, transitively, as far as it is installed."""
    waiting, needed = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().lower())
        if name in needed:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        needed.add(name)
        waiting += [
            re.match(r"[\w.-]+", requirement)[0] for requirement in requirements if "extra ==" not in requirement
        ]
    return needed


def test_model_modules_import_where_there_is_nothing_but_pytorch_and_numpy(tmp_path):
    needed = needed_distributions("torch", "numpy")
    modules = sorted(MODELS & set(FILES) - {"model_env", "model_planning"})
    for module in modules:
        (tmp_path / f"{module}.py").write_bytes(FILES[module].read_bytes())
    blocked = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if not needed & {re.sub(r"[-_.]+", "-", distribution.lower()) for distribution in distributions}
    }
    assert {"h5py", "mlflow", "pandas", "scipy", "yaml"} <= blocked and "torch" not in blocked

    command = [sys.executable, "-c", IMPORT_ALONE, ",".join(sorted(blocked)), *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- This test itself ---


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.formats", "import config"),
        ("data.formats", "from evaluation import metrics"),
        ("data.formats", "def read():\n    import training.loop"),
        ("training.loop", "from tracking.trackers import warn"),
        ("training.loop", "if TYPE_CHECKING:\n    from tracking import trackers"),
        (
            "evaluation.evaluate",
            "class A:\n    def f(self):\n        with b:\n            from config import LearnConfig",
        ),
        ("study.cells", "import learn_model"),
        ("study.cells", "from benchmarks import harness"),
        ("benchmarks.harness", "importlib.import_module('learn_model')"),
        ("tracking.mlflow_tracker", "from dynamics_model import load_ensemble"),
        ("tracking.mlflow_tracker", "if typing.TYPE_CHECKING:\n    import data.trajectories"),
        ("dynamics_model", "from utils import atomic_write"),
        ("utils", "import cli"),
        ("cli", "import config"),
        ("learn_model", "import evaluate_model"),
        ("examples.load_model", "import data.sources"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(violations(module, read_imports(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.formats", "import json, numpy\nfrom utils import InputError\nfrom data import trajectories"),
        ("training.loop", "from config import LearnConfig\nimport torch.utils.data"),
        ("study.cells", "from tracking.trackers import warn\nfrom training import loop"),
        ("tracking.mlflow_tracker", "def load_run():\n    from dynamics_model import load_ensemble"),
        ("tracking.mlflow_tracker", "if TYPE_CHECKING:\n    from dynamics_model import DynamicsEnsemble"),
        ("tracking.mlflow_tracker", "from mlflow.tracking import MlflowClient"),
        ("tracking.mlflow_model", "from dynamics_model import load_ensemble"),
        ("evaluate_model", "def main():\n    from evaluation import report"),
    ],
)
def test_an_allowed_import_is_no_finding(module, source):
    assert violations(module, read_imports(source)) == []


def test_a_circle_is_found_and_told():
    sources = {
        "a": "import d, b",
        "b": "def f():\n    import c",
        "c": "if TYPE_CHECKING:\n    import a",
        "d": "import os",
    }
    imports = {module: read_imports(source) for module, source in sources.items()}
    assert circle("a", imports) == ["a", "b", "c", "a"]
    assert circle("d", imports) == []
    assert circle("e", {"e": read_imports("import e")}) == ["e", "e"]
