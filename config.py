"""``LearnConfig``: every number that changes what is learned, with its meaning, its default and its check.

A YAML file states only what differs from the defaults here; ``--params key=value`` overrides both. Values are parsed
as YAML and then converted to the field's type, since YAML reads both ``5e-4`` and ``256,256`` as strings.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import yaml

from utils import InputError, did_you_mean

_WAY_TO_MULTIPLY = re.compile(r"(torch|onednn|openblas)/(together|apart)/[1-9][0-9]{0,2}")
LARGEST_FILE, MOST_KEYS = 1 << 17, 1000  # bytes and keys of a configuration, of which ours have some 2,000 and 30
# The largest counts, sizes and numbers that settings may have: far beyond what anybody trains, within what PyTorch can.
MOST_MEMBERS, MOST_LAYERS, WIDEST_LAYER, LARGEST_COUNT, LARGEST_NUMBER = 10_000, 100, 65_536, 10**9, 1e9


@dataclass(frozen=True)
class LearnConfig:
    """Settings of one training run.

    Raises:
        InputError: If a value is outside what its field allows.
    """

    # --- Model ---
    # Kind of ensemble: Gaussian members trained on their likelihood, or point predictions trained on squared error.
    probabilistic: bool = False
    # Kind of ensemble by name, one of KINDS in dynamics_model.py; null leaves the choice to `probabilistic`. Means of
    # faithful and posthoc members learn as those of point predictions do; posthoc needs a holdout.
    kind: str | None = None
    # Members, all trained at once; each has its own initialisation and order of minibatches.
    ensemble_size: int = 7
    # Units of each hidden layer; as many layers as numbers, [] for a linear model.
    hidden_size: tuple[int, ...] = (256, 256, 256, 256)
    # Activation between layers; swish is another name of silu.
    activation_fn: Literal["silu", "swish", "relu", "gelu", "elu", "tanh"] = "silu"
    # Layer normalisation of each hidden layer, before its activation.
    layer_norm: bool = False
    # Also learn the reward r(s, a, s') with a network of its own, so that the dynamics are the same with and without.
    learn_reward: bool = False
    # Units of each hidden layer of the reward network.
    reward_hidden_size: tuple[int, ...] = (128, 128)

    # --- Optimisation ---
    # Passes over the training rows.
    fit_epochs: int = 40
    # Rows per member and step; the last batch of an epoch holds what is left.
    batch_size: int = 256
    # Learning rate of Adam: at the start or, for onecycle, at its peak.
    fit_lr: float = 5e-3
    # Schedule of the learning rate; null keeps it constant.
    scheduler: Literal["exponential", "multistep", "cosine", "onecycle"] | None = "onecycle"
    # Factor per epoch (exponential) or per milestone (multistep).
    scheduler_gamma: float = 0.99
    # Epochs after which multistep applies its factor.
    scheduler_milestones: tuple[int, ...] = ()
    # Share of all steps over which onecycle rises to its peak.
    warmup_fraction: float = 0.1
    # Decay of weights (not of biases) per unit of learning rate; one number, or one per layer, output layer last.
    weight_decay: float | tuple[float, ...] = 0.0
    # decoupled: AdamW (Loshchilov and Hutter 2019); coupled: 0.5 * decay * |W|^2 in the loss, as in PETS and MOPO.
    weight_decay_mode: Literal["decoupled", "coupled"] = "decoupled"
    # Exponent of beta-NLL (Seitzer et al. 2022): 0 is the plain likelihood, 1 weighs errors like squared error does.
    beta_nll: float = 0.0
    # Share of training over which beta_nll falls linearly to 0, the plain likelihood; 0 keeps it constant.
    beta_nll_decay: float = 0.0
    # Width of Huber's loss of the mean, normalised units: larger errors count in proportion to their size, not to its
    # square. null is squared error. For kinds whose mean does not learn from a likelihood.
    huber_width: float | None = None
    # Largest norm of a member's gradient per step; null leaves gradients as they are.
    grad_clip: float | None = None
    # Share of training, from its start, in which matrix products round their operands where that is faster: to bfloat16
    # on processors with AMX, to TF32 on GPUs that have it, with PyTorch 2.9 or newer. 0 never rounds; scores never do.
    reduced_precision: float = 0.8

    # How training multiplies, LIBRARY/GROUPING/THREADS: by torch, onednn or openblas; members take steps together, or
    # each thread takes members of its own (apart). null tries the ways at the start of a run and takes the fastest.
    products: str | None = None

    # --- Data ---
    # Train each member on its own bootstrap sample: as many rows as there are, drawn with replacement.
    bootstrap: bool = False
    # Seed of the split into training and held-out trajectories; null takes seed.
    split_seed: int | None = None

    # --- Selection, by validation error ---
    # Epochs without improvement after which a member stops; training ends when all have. Needs a holdout.
    patience: int | None = None
    # How many members, the best ones, are marked as elites; null marks all.
    num_elites: int | None = None

    # --- Reproducibility ---
    # Seed of every random stream of the run.
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks ranges; types are checked where values enter, in ``load_config``."""
        for name, most in (
            ("ensemble_size", MOST_MEMBERS),
            ("fit_epochs", LARGEST_COUNT),
            ("batch_size", LARGEST_COUNT),
        ):
            value = getattr(self, name)
            _require(1 <= value <= most, name, value, f"at least 1 and at most {most:,}")
        for name in ("hidden_size", "reward_hidden_size"):
            sizes = getattr(self, name)
            is_usual = len(sizes) <= MOST_LAYERS and 1 <= min(sizes, default=1) <= max(sizes, default=1) <= WIDEST_LAYER
            _require(
                is_usual, name, sizes, f"positive layer sizes, at most {MOST_LAYERS}, each at most {WIDEST_LAYER:,}"
            )
        for name in ("patience", "num_elites"):
            value = getattr(self, name)
            _require(value is None or 1 <= value <= LARGEST_COUNT, name, value, "null or at least 1 and at most 10^9")
        for name in ("fit_lr", "scheduler_gamma"):
            value = getattr(self, name)
            _require(0 < value <= LARGEST_NUMBER, name, value, "a positive number, at most 10^9")
        for name in ("beta_nll", "beta_nll_decay", "warmup_fraction", "reduced_precision"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        for name in ("seed", "split_seed"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 2**32, name, value, "a whole number from 0 to 2^32 - 1")
        for name in ("huber_width", "grad_clip"):
            value = getattr(self, name)
            is_usual = value is None or 0 < value <= LARGEST_NUMBER
            _require(is_usual, name, value, "null or a positive number, at most 10^9")
        is_way = self.products is None or _WAY_TO_MULTIPLY.fullmatch(self.products)
        _require(is_way, "products", self.products, "null, or LIBRARY/GROUPING/THREADS such as torch/apart/2")
        milestones = self.scheduler_milestones
        is_usual = 1 <= min(milestones, default=1) <= max(milestones, default=1) <= LARGEST_COUNT
        _require(is_usual, "scheduler_milestones", milestones, "epochs from 1 on, at most 10^9")
        decays = self.layer_decays
        is_usual = min(decays) >= 0 and max(decays) <= LARGEST_NUMBER
        _require(is_usual, "weight_decay", self.weight_decay, "no negative number, and none above 10^9")
        layers = len(self.hidden_size) + 1
        _require(
            len(decays) == layers,
            "weight_decay",
            self.weight_decay,
            f"one number, such as 0, or one for each of the {layers} layers (hidden layers and output)",
        )
        _require(
            self.scheduler != "multistep" or len(self.scheduler_milestones) > 0,
            "scheduler_milestones",
            self.scheduler_milestones,
            "the epochs at which the multistep scheduler applies its factor",
        )
        _require(
            self.num_elites is None or self.num_elites <= self.ensemble_size,
            "num_elites",
            self.num_elites,
            f"at most ensemble_size ({self.ensemble_size})",
        )
        agrees = self.kind in (None, "probabilistic") or not self.probabilistic
        _require(agrees, "kind", self.kind, "null or probabilistic, as `probabilistic` is true")
        needed = self.beta_nll_decay == 0 or self.beta_nll > 0
        _require(needed, "beta_nll_decay", self.beta_nll_decay, "0 where beta_nll is 0: there is nothing to decay")

    @property
    def kind_of_ensemble(self) -> str:
        """Name of the kind of ensemble."""
        return self.kind or ("probabilistic" if self.probabilistic else "deterministic")

    @property
    def layer_decays(self) -> tuple[float, ...]:
        """Weight decay of each layer, output layer last."""
        if isinstance(self.weight_decay, tuple):
            return self.weight_decay
        return (self.weight_decay,) * (len(self.hidden_size) + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain Python types, tuples as lists, ready for YAML, JSON or pickle."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def to_yaml(self) -> str:
        """Returns the effective configuration as a YAML file that ``load_config`` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_config(path: str | Path, overrides: typing.Iterable[str] = ()) -> LearnConfig:
    """Reads a YAML file of settings and applies ``key=value`` overrides, the last one of a key winning.

    Raises:
        InputError: If the file cannot be read, a key is unknown (the closest one is named) or a value does not fit.
    """
    values = dict(_read_yaml(Path(path)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"--params got {override!r}; expected key=value, such as fit_epochs=100")
        try:
            values[key] = _parse_yaml(text)
        except ValueError:
            shown = _SHORT.repr(text)
            raise InputError(f"--params {key}: {shown} cannot be read as a value; quote it as in YAML") from None
    return config_from_dict(values, source=str(path))


def config_from_dict(values: dict[str, Any], source: str) -> LearnConfig:
    """Builds a configuration from plain values, each converted to its field's type.

    Args:
        values: Settings by name; what is missing keeps its default.
        source: Where the values come from, for error messages.

    Raises:
        InputError: If a key is unknown or a value does not fit its field.
    """
    types = typing.get_type_hints(LearnConfig)
    typed = {}
    for key, value in values.items():
        if key not in types:
            hint = did_you_mean(str(key)[:80], types)
            raise InputError(f"{source}: unknown setting {_SHORT.repr(key)}{hint}; config.py lists every setting")
        try:
            typed[key] = _coerce(value, types[key])
        except (TypeError, ValueError, OverflowError):
            found, expected = _SHORT.repr(value), _describe(types[key])
            raise InputError(f"{source}: {key} is {found}; expected {expected}") from None
    return LearnConfig(**typed)


# --- YAML ---


class _PlainLoader(yaml.SafeLoader):
    """Reads what settings need: names, numbers, true, false and null, in lists and mappings that are written out.

    Aliases, with which a few lines stand for gigabytes, are refused, and so is what reads like one value and means
    another: numbers to the base of 2, 8, 16 or 60, dates, merged mappings, tags of types.
    """

    deepest = 3  # a mapping of settings, of which one may be a list, and one level more for a message about that

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        """Composes the next value, unless it is an alias or too deep inside others."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", event.start_mark)
        if self.depth > self.deepest:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def number(self, node: yaml.Node) -> int | float:
        """Returns a decimal number."""
        text = self.construct_scalar(node).replace("_", "").lower()
        if len(text) > 400 or ":" in text or re.match(r"[-+]?0[0-9box]", text):
            raise self.refusal(node, "expected a decimal number")
        kind = int if node.tag.endswith(":int") else float
        return kind(text.replace(".inf", "inf").replace(".nan", "nan"))

    def mapping(self, node: yaml.Node) -> dict[Any, Any]:
        """Returns a mapping whose keys are written out."""
        if len(node.value) > MOST_KEYS:
            raise self.refusal(node, f"more than {MOST_KEYS} keys")
        return self.construct_mapping(node, deep=True)

    def sequence(self, node: yaml.Node) -> list[Any]:
        """Returns a list."""
        return self.construct_sequence(node, deep=True)

    def truth(self, node: yaml.Node) -> bool:
        """Returns a truth value."""
        text = self.construct_scalar(node).lower()
        if text not in self.bool_values:
            raise self.refusal(node, "expected true or false")
        return self.bool_values[text]

    def flatten_mapping(self, node: yaml.Node) -> None:
        """Merges nothing into a mapping."""

    def refusal(self, node: yaml.Node, expected: str = "only plain values are read") -> yaml.YAMLError:
        """Returns an error that shows a value."""
        shown = _SHORT.repr(node.value) if isinstance(node, yaml.ScalarNode) else "a collection"
        return yaml.constructor.ConstructorError(None, None, f"{shown}: {expected}", node.start_mark)

    def refuse(self, node: yaml.Node) -> Any:
        """Raises an error that shows a value."""
        raise self.refusal(node)

    yaml_constructors: typing.ClassVar = {
        None: refuse,
        "tag:yaml.org,2002:null": yaml.SafeLoader.construct_yaml_null,
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
        "tag:yaml.org,2002:bool": truth,
        "tag:yaml.org,2002:int": number,
        "tag:yaml.org,2002:float": number,
        "tag:yaml.org,2002:seq": sequence,
        "tag:yaml.org,2002:map": mapping,
    }


def _parse_yaml(text: str) -> Any:
    """Returns what a YAML text stands for; raises a ValueError that says in a line why it cannot be read."""
    try:
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # PyYAML lets through what its own conversions raise
        raise ValueError(" ".join(str(error).split())[:300]) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise OSError(f"it has more than {LARGEST_FILE:,} bytes")
        text = content.decode("utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [known.name for known in path.parent.glob("*.yaml")])
        raise InputError(f"configuration {str(path)!r} does not exist{near}; see the folder configs/") from None
    except (OSError, ValueError) as error:
        raise InputError(f"configuration {str(path)!r} cannot be read ({error}); expected a YAML text file") from None
    try:
        values = _parse_yaml(text)
    except ValueError as error:
        raise InputError(f"configuration {str(path)!r} is not valid YAML: {error}") from None
    if values is None:  # a file of comments only: all defaults
        return {}
    if not isinstance(values, dict):
        raise InputError(f"configuration {str(path)!r} holds a {type(values).__name__}; expected lines of 'key: value'")
    return values


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


# --- From values to fields ---


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {_SHORT.repr(value)}; expected {expected}")


def _coerce(value: Any, wanted: Any) -> Any:
    """Converts a YAML value to a field's type, as its author meant it; raises TypeError or ValueError."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, UnionType):
        if type(None) in arguments and (value is None or str(value).lower() in ("none", "null")):
            return None
        for option in arguments:
            try:
                return _coerce(value, option)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        name = str(value).lower()
        if name in arguments:
            return name
        raise ValueError
    if origin is tuple:
        if isinstance(value, str):
            value = value.strip("()[] ").removesuffix(",").split(",")
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, arguments[0]) for item in items)
    if wanted is bool:
        named = {"true": True, "false": False}
        if str(value).lower() not in named:
            raise ValueError
        return named[str(value).lower()]
    if wanted is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if wanted is type(None) or isinstance(value, bool) or value is None:
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    if wanted is int:
        if number != int(number):
            raise ValueError
        return int(number)
    return number


def _describe(wanted: Any) -> str:
    """Says in words what values a field's type admits."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list, each {_describe(arguments[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a name", type(None): "null"}[wanted]
