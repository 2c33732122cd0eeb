"""config: what people write becomes the value they mean, or one line that says what is expected."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import config as config_module
from config import LearnConfig, config_from_dict, load_config
from dynamics_model import KINDS, member_class
from training.build import loss_settings
from utils import InputError

ROOT = Path(config_module.__file__).parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FIELDS = [field.name for field in dataclasses.fields(LearnConfig)]


@pytest.fixture
def empty_file(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# Every setting is the default.\n")
    return path


# --- The files in configs/ ---


def test_there_are_configurations_and_published_ones():
    folders = {path.parent for path in CONFIGS}
    assert folders >= {ROOT / "configs", ROOT / "configs" / "published"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_loads_and_states_only_what_differs(path):
    stated = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    config, default = load_config(path), LearnConfig()

    if "published" in path.parts:  # these are stated in full, also where a setting happens to be our default
        assert config.reduced_precision == 0
    else:
        assert [key for key in stated if getattr(config, key) == getattr(default, key)] == []
    assert path.read_text(encoding="utf-8").startswith("# "), "a configuration says first what it is for"


# --- What people write ---


@pytest.mark.parametrize(
    ("written", "field", "meant"),
    [
        ("hidden_size=256,256", "hidden_size", (256, 256)),
        ("hidden_size=[256, 256]", "hidden_size", (256, 256)),
        ("hidden_size=(256, 256)", "hidden_size", (256, 256)),
        ("hidden_size=256, 128", "hidden_size", (256, 128)),
        ("hidden_size=256,", "hidden_size", (256,)),
        ("hidden_size=256", "hidden_size", (256,)),
        ("hidden_size=[]", "hidden_size", ()),
        ("activation_fn=relu", "activation_fn", "relu"),
        ("activation_fn=ReLU", "activation_fn", "relu"),
        ("activation_fn='swish'", "activation_fn", "swish"),
        ("scheduler=null", "scheduler", None),
        ("scheduler='None'", "scheduler", None),
        ("scheduler=None", "scheduler", None),
        ("scheduler=~", "scheduler", None),
        ("scheduler=", "scheduler", None),
        ("scheduler=cosine", "scheduler", "cosine"),
        ("fit_lr=5e-4", "fit_lr", 0.0005),
        ("fit_lr=0.0005", "fit_lr", 0.0005),
        ("fit_lr=1", "fit_lr", 1.0),
        ("fit_epochs=1e2", "fit_epochs", 100),
        ("fit_epochs=100", "fit_epochs", 100),
        ("fit_epochs=100.0", "fit_epochs", 100),
        ("probabilistic=true", "probabilistic", True),
        ("probabilistic=True", "probabilistic", True),
        ("probabilistic=no", "probabilistic", False),
        ("bootstrap='false'", "bootstrap", False),
        ("weight_decay=1e-4", "weight_decay", 0.0001),
        ("weight_decay=1e-4,2e-4,3e-4,4e-4,5e-4", "weight_decay", (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)),
        ("weight_decay=[1e-4, 2e-4, 0, 0, 1]", "weight_decay", (1e-4, 2e-4, 0.0, 0.0, 1.0)),
        ("grad_clip=none", "grad_clip", None),
        ("grad_clip=10", "grad_clip", 10.0),
        ("split_seed=4294967295", "split_seed", 4294967295),
        ("kind=probabilistic", "kind", "probabilistic"),
        ("kind=none", "kind", None),
    ],
)
def test_params_do_what_a_person_means(empty_file, written, field, meant):
    value = getattr(load_config(empty_file, [written]), field)

    assert value == meant
    assert type(value) is type(meant)
    if isinstance(meant, tuple):
        assert [type(item) for item in value] == [type(item) for item in meant]


def test_yaml_file_means_the_same_as_params(tmp_path, empty_file):
    path = tmp_path / "small.yaml"
    path.write_text("fit_lr: 5e-4\nscheduler: 'None'\nhidden_size: 64,64\nprobabilistic: yes\n")
    params = ["fit_lr=5e-4", "scheduler='None'", "hidden_size=64,64", "probabilistic=yes"]

    assert load_config(path) == load_config(empty_file, params)
    assert load_config(path) == LearnConfig(fit_lr=5e-4, scheduler=None, hidden_size=(64, 64), probabilistic=True)


def test_params_override_the_file_and_the_last_one_wins(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("fit_epochs: 10\nbatch_size: 32\n")

    config = load_config(path, ["fit_epochs=20", "fit_epochs=30"])

    assert (config.fit_epochs, config.batch_size) == (30, 32)


def test_empty_file_and_no_params_are_the_defaults(empty_file):
    assert load_config(empty_file) == LearnConfig()


# --- What is refused ---


@pytest.mark.parametrize(
    ("written", "closest"), [("fit_epoch=3", "fit_epochs"), ("hiden_size=3", "hidden_size"), ("Seed=1", "seed")]
)
def test_unknown_setting_names_the_closest(empty_file, written, closest):
    with pytest.raises(InputError, match=rf"unknown setting '{written.split('=')[0]}' \(did you mean '{closest}'\?\)"):
        load_config(empty_file, [written])


def test_unknown_setting_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("zzz: 1\n1: 2\n")
    with pytest.raises(InputError, match=re.escape(f"{path}: unknown setting 'zzz'; config.py lists every setting")):
        load_config(path)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("fit_epochs=many", "fit_epochs is 'many'; expected a whole number"),
        ("fit_epochs=1.5", "fit_epochs is 1.5; expected a whole number"),
        ("fit_epochs=null", "fit_epochs is None; expected a whole number"),
        ("fit_epochs=true", "fit_epochs is True; expected a whole number"),
        ("fit_epochs=[1]", "fit_epochs is [1]; expected a whole number"),
        ("fit_epochs={a: 1}", "fit_epochs is {'a': 1}; expected a whole number"),
        ("fit_lr=fast", "fit_lr is 'fast'; expected a number"),
        ("fit_lr=.nan", "fit_lr is nan; expected a number"),
        ("fit_lr=inf", "fit_lr is 'inf'; expected a number"),
        ("probabilistic=1", "probabilistic is 1; expected true or false"),
        ("probabilistic=maybe", "probabilistic is 'maybe'; expected true or false"),
        ("probabilistic=null", "probabilistic is None; expected true or false"),
        ("hidden_size=large", "hidden_size is 'large'; expected a list, each a whole number"),
        ("hidden_size=[256, 1.5]", "hidden_size is [256, 1.5]; expected a list, each a whole number"),
        ("hidden_size=null", "hidden_size is None; expected a list, each a whole number"),
        ("activation_fn=sine", "activation_fn is 'sine'; expected one of silu, swish, relu, gelu, elu, tanh"),
        ("activation_fn=null", "activation_fn is None; expected one of silu, swish, relu, gelu, elu, tanh"),
        ("scheduler=constant", "expected one of exponential, multistep, cosine, onecycle or null"),
        ("kind=3", "kind is 3; expected a name or null"),
        ("grad_clip=small", "grad_clip is 'small'; expected a number or null"),
        ("weight_decay=null", "weight_decay is None; expected a number or a list, each a number"),
    ],
)
def test_wrong_type_says_what_was_given_and_what_is_expected(empty_file, written, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        load_config(empty_file, [written])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ensemble_size": 0}, "ensemble_size is 0; expected at least 1"),
        ({"fit_epochs": 0}, "fit_epochs is 0; expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1; expected at least 1"),
        ({"hidden_size": [256, 0]}, "hidden_size is (256, 0); expected positive layer sizes"),
        ({"reward_hidden_size": [-1]}, "reward_hidden_size is (-1,); expected positive layer sizes"),
        ({"patience": 0}, "patience is 0; expected null or at least 1"),
        ({"num_elites": 0}, "num_elites is 0; expected null or at least 1"),
        ({"num_elites": 8}, "num_elites is 8; expected at most ensemble_size (7)"),
        ({"fit_lr": 0}, "fit_lr is 0.0; expected a positive number"),
        ({"scheduler_gamma": -0.5}, "scheduler_gamma is -0.5; expected a positive number"),
        ({"beta_nll": 1.5, "probabilistic": True}, "beta_nll is 1.5; expected a number from 0 to 1"),
        (
            {"beta_nll_decay": 1.5, "beta_nll": 1, "probabilistic": True},
            "beta_nll_decay is 1.5; expected a number from 0 to 1",
        ),
        ({"reduced_precision": -0.1}, "reduced_precision is -0.1; expected a number from 0 to 1"),
        ({"beta_nll_decay": 0.5, "probabilistic": True}, "beta_nll_decay is 0.5; expected 0 where beta_nll is 0"),
        ({"warmup_fraction": -0.1}, "warmup_fraction is -0.1; expected a number from 0 to 1"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 to 2^32 - 1"),
        ({"split_seed": 2**32}, "split_seed is 4294967296; expected a whole number from 0 to 2^32 - 1"),
        ({"grad_clip": 0}, "grad_clip is 0.0; expected null or a positive number"),
        ({"huber_width": 0}, "huber_width is 0.0; expected null or a positive number"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001; expected no negative number"),
        ({"weight_decay": [0, 0, 0, 0, -1]}, "expected no negative number"),
        ({"weight_decay": [1e-4, 1e-4]}, "one for each of the 5 layers (hidden layers and output)"),
        ({"scheduler": "multistep"}, "scheduler_milestones is (); expected the epochs"),
        ({"scheduler_milestones": [0, 3]}, "scheduler_milestones is (0, 3); expected epochs from 1 on"),
        (
            {"kind": "deterministic", "probabilistic": True},
            "kind is 'deterministic'; expected null or probabilistic, as `probabilistic` is true",
        ),
    ],
)
def test_value_out_of_range_says_what_is_expected(values, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        config_from_dict(values, source="test")


def test_ranges_include_their_ends():
    ends = {"ensemble_size": 1, "fit_epochs": 1, "batch_size": 1, "num_elites": 1, "patience": 1, "seed": 2**32 - 1}
    config = config_from_dict(ends | {"warmup_fraction": 0, "beta_nll": 1, "probabilistic": True}, source="test")

    assert config.num_elites == config.ensemble_size == 1


@pytest.mark.parametrize("written", ["fit_epochs", "=3", "fit_epochs:3", "256"])
def test_params_without_key_or_value_show_the_form(empty_file, written):
    with pytest.raises(InputError, match=re.escape(f"--params got {written!r}; expected key=value")):
        load_config(empty_file, [written])


def test_params_that_are_no_yaml_name_the_key(empty_file):
    with pytest.raises(InputError, match="--params hidden_size: '\\[256' cannot be read"):
        load_config(empty_file, ["hidden_size=[256"])


def test_missing_file_names_the_closest_one_beside_it(tmp_path):
    (tmp_path / "hopper_dnn.yaml").write_text("")
    with pytest.raises(InputError, match=r"hopper_dn.yaml' does not exist \(did you mean 'hopper_dnn.yaml'\?\)"):
        load_config(tmp_path / "hopper_dn.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n- 2\n", "holds a list; expected lines of 'key: value'"),
        (b"just words", "holds a str; expected lines of 'key: value'"),
        (b"\x89HDF\r\n\xff\xfe", "cannot be read"),
        (b"fit_epochs: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_file_that_is_no_configuration_is_named(tmp_path, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(repr(str(path)))}.* {re.escape(expected)}"):
        load_config(path)


def test_folder_given_as_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)


# --- What is written for later ---


def changed_everywhere():
    """A configuration in which every field has another value than its default."""
    return LearnConfig(
        probabilistic=True,
        kind="probabilistic",
        ensemble_size=5,
        hidden_size=(200, 100),
        activation_fn="relu",
        layer_norm=True,
        learn_reward=True,
        reward_hidden_size=(64,),
        fit_epochs=12,
        batch_size=32,
        fit_lr=5e-4,
        scheduler="multistep",
        scheduler_gamma=0.5,
        scheduler_milestones=(3, 6),
        warmup_fraction=0.25,
        weight_decay=(2.5e-5, 5e-5, 1e-4),
        weight_decay_mode="coupled",
        beta_nll=0.5,
        beta_nll_decay=0.75,
        huber_width=0.02,
        reduced_precision=0.25,
        products="torch/apart/2",
        grad_clip=1.5,
        bootstrap=True,
        split_seed=7,
        patience=5,
        num_elites=3,
        seed=3,
    )


@pytest.mark.parametrize("config", [LearnConfig(), changed_everywhere()], ids=["default", "changed"])
def test_effective_configuration_reads_back_as_an_equal_one(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")

    assert load_config(path) == config
    assert list(yaml.safe_load(config.to_yaml())) == FIELDS, "every setting is written, in the order of config.py"


def test_test_above_changes_every_field():
    default, changed = LearnConfig(), changed_everywhere()
    assert [name for name in FIELDS if getattr(default, name) == getattr(changed, name)] == []


def test_plain_settings_are_plain_python():
    plain = changed_everywhere().to_dict()

    assert {type(value) for value in plain.values()} <= {bool, int, float, str, list}
    assert plain["hidden_size"] == [200, 100]


def test_layer_decays_are_one_per_layer_with_the_output_last():
    assert LearnConfig(hidden_size=(8, 8), weight_decay=0.5).layer_decays == (0.5, 0.5, 0.5)
    assert LearnConfig(hidden_size=(8, 8), weight_decay=(0.1, 0.2, 0.3)).layer_decays == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "deterministic"),
        ({"probabilistic": True}, "probabilistic"),
        ({"kind": "probabilistic"}, "probabilistic"),
        ({"kind": "deterministic"}, "deterministic"),
        ({"kind": "student_t"}, "student_t"),  # whether there is such a kind is for those to say who build it
        ({"kind": "probabilistic", "probabilistic": True}, "probabilistic"),
    ],
    ids=str,
)
def test_kind_of_ensemble_is_the_one_named_or_the_one_that_is_or_is_not_probabilistic(settings, name):
    assert LearnConfig(**settings).kind_of_ensemble == name


# --- Every setting is documented and used ---


@pytest.mark.parametrize("name", FIELDS)
def test_setting_has_a_line_that_explains_it(name):
    lines = Path(config_module.__file__).read_text(encoding="utf-8").splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(f"    {name}: ")]

    assert re.fullmatch(r"    # \S.{15,}", lines[at - 1])
    assert not lines[at - 1].startswith("    # ---"), "the heading of a group explains no setting"


def read_attributes(path):
    """Names of the attributes that a module reads, those that only check a configuration left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
    only_checked = {id(node) for check in checks for node in ast.walk(check)}
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in only_checked)
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id in ("config", "self")}


@pytest.fixture(scope="module")
def readers():
    """By the name of a module that makes ensembles: the attributes that it reads."""
    paths = [ROOT / "config.py", ROOT / "learn_model.py", *(ROOT / "training").glob("*.py")]
    assert len(paths) > 5
    return {path.name: read_attributes(path) for path in paths}


# Settings that the program asks for by another name: the property that stands for them.
PROPERTIES = {"weight_decay": "layer_decays", "kind": "kind_of_ensemble", "probabilistic": "kind_of_ensemble"}


@pytest.mark.parametrize("name", FIELDS)
def test_setting_is_read_by_the_program(name, readers):
    if name in PROPERTIES:
        assert name in readers["config.py"]
    losses = [loss_settings(member_class(kind).ensemble_class, LearnConfig()) for kind in KINDS]
    others = set().union(*(read for module, read in readers.items() if module != "config.py"), *losses)
    assert PROPERTIES.get(name, name) in others


def test_integer_too_large_for_a_float_is_an_input_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InputError):
        load_config(tmp_path / "empty.yaml", ["seed=" + "1" * 400])


def test_list_with_a_hole_is_an_input_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InputError):
        load_config(tmp_path / "empty.yaml", ["hidden_size=256,,256"])
