"""Configurations of strangers: every value is plain and in range, or one line says what is not."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

import config as config_module
from config import LARGEST_FILE, LearnConfig, load_config

ROOT = Path(config_module.__file__).parent


def laughs(levels, inline):
    """A few lines that stand for 9 to the power of so many values."""
    anchors = ["&a0 [x,x,x,x,x,x,x,x,x]"]
    anchors += [f"&a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    return f"[{', '.join(anchors)}]" if inline else "\n".join(f"k{i}: {a}" for i, a in enumerate(anchors))


INLINE = laughs(10, inline=True)
MERGES = "m0: &m0 {a: 1}\n" + "".join(
    f"m{level}: &m{level} {{<<: [{','.join([f'*m{level - 1}'] * 9)}]}}\n" for level in range(1, 9)
)
HEAVY = {
    **{f"laughs as {name}": f"{name}: {INLINE}\n" for name in ("hidden_size", "fit_lr", "probabilistic", "patience")},
    "laughs as a name": f"activation_fn: {INLINE}\n",
    "laughs under unknown keys": laughs(10, inline=False),
    "laughs as a key": f"? {INLINE}\n: 1\n",
    "laughs at the top": INLINE,
    "one alias": "fit_epochs: &a 1\nensemble_size: *a\n",
    "an alias in itself": "hidden_size: &a [*a, 1]\n",
    "a mapping in itself": "&a {fit_epochs: *a}\n",
    "an alias of nothing": "fit_epochs: *x\n",
    "merges": MERGES,
    "merges beside a setting": MERGES + "fit_epochs: 1\n<<: *m8\n",
    "a merge of a mapping": "<<: {fit_epochs: 1}\n",
    "a merge of a number": "<<: 5\n",
    "a merge of numbers": "<<: [1, 2]\n",
    "deep lists": "fit_epochs: " + "[" * 3000 + "]" * 3000,
    "deep mappings": "{a: " * 3000 + "1" + "}" * 3000,
    "deep blocks": "".join(" " * depth + "a:\n" for depth in range(300)),
    "deep keys": "? " * 500 + "1",
    "many layers": f"hidden_size: [{','.join(['1'] * 20000)}]\n",
    "many layers as text": f"hidden_size: {','.join(['1'] * 20000)}\n",
    "many keys": "".join(f"k{index}: 1\n" for index in range(5000)),
    "keys of one hash": "".join(f"{index * (2**61 - 1)}: 1\n" for index in range(3000)),
    "a long text": f"activation_fn: {'x' * 10**6}\n",
    "a long text that fits": f"activation_fn: {'x' * 10**5}\n",
    "a long key": f"{'x' * 10**6}: 1\n",
    "a long unknown key": f"? {'x' * 10**5}\n: 1\n",
    "a long value of an unknown key": f"fit_epochss: {'x' * 10**5}\n",
    "a long comment": f"# {'x' * 10**7}\nfit_epochs: 1\n",
    "many umlauts": "# " + "ä" * (LARGEST_FILE // 2 + 10) + "\nfit_epochs: 1\n",
    "many documents": "---\n" * 20000,
}
INTEGERS = [
    *("0x10", "0X10", "-0x10", "0b101", "0o17", "017", "010", "00", "1:30", "190:20:30", "1:2:3:4", "9" * 5000),
    *("0x" + "f" * 5000, ":".join(["59"] * 5000), "1e30", "1e400", "-1", "0", "2.5", ".nan", ".inf", "-.inf", "1e9999"),
    *("!!int 'abc'", "!!int 0x10", "!!float abc", "!!bool maybe", "!!bool 3", "!!bool [1]", "!!null 3", "!!int [1]"),
    *(
        "2001-01-01",
        "2001-99-99",
        "2001-12-14t21:59:43.10-05:00",
        "!!timestamp x",
        "yes",
        "no",
        "on",
        "~",
        "null",
        "''",
    ),
    *("[1]", "[]", "{}", "{a: 1}", "{=: 3}", "=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary aGk="),
    *("!!binary '@@@'", "!!python/tuple [1, 2]", "!!python/name:os.system", "!custom 3", "!<x> 3", "ten", "'1 2'"),
    *(
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/object/new:os.system ['touch pwned']",
        "|\n  x",
        "½",
    ),
]
SETTINGS = [
    *("ensemble_size: 1e30", "ensemble_size: 100000", "batch_size: 1e30", "batch_size: 2e9", "fit_epochs: 1e30"),
    *("hidden_size: [1e30]", "hidden_size: [70000]", "hidden_size: 1e30", "hidden_size: [0x10]", "hidden_size: [1:30]"),
    *("hidden_size: [256, [256]]", "hidden_size: {a: 1}", "hidden_size: !!set {a, b}", "hidden_size: [null]"),
    *("reward_hidden_size: [1e30]", "reward_hidden_size: [0]", "reward_hidden_size: [-1]", "reward_hidden_size: x"),
    *("patience: 1e30", "patience: 0", "num_elites: 1e30", "scheduler_milestones: [1e30]", "seed: 1e30", "seed: -1"),
    *(
        "split_seed: 4294967296",
        "seed: 0x10",
        "seed: 1_0:30",
        "fit_lr: 1e30",
        "fit_lr: 0",
        "fit_lr: -1",
        "fit_lr: .nan",
    ),
    *("fit_lr: 1:30.5", "fit_lr: 190:20:30.15", "fit_lr: !!float abc", "fit_lr: 1.0e+999", "scheduler_gamma: 1e30"),
    *("grad_clip: 1e30", "grad_clip: -.inf", "huber_width: 1e30", "huber_width: 0", "weight_decay: 1e30"),
    *("weight_decay: [1, 2]", "weight_decay: [1e30, 0, 0, 0, 0]", "weight_decay: .nan", "warmup_fraction: 2"),
    *("beta_nll: 1e30", "reduced_precision: .inf", "scheduler: 3", "scheduler: [cosine]", "activation_fn: __class__"),
    *(
        "probabilistic: 1",
        "probabilistic: 'yes'",
        "probabilistic: 2001-01-01",
        "probabilistic: !!bool maybe",
        "kind: 3",
    ),
    *(
        "kind: [a]",
        "kind: 2001-01-01",
        "products: ../../x",
        "products: torch/apart/0",
        "products: 3",
        "weight_decay_mode: 1",
    ),
    *(
        "__init__: 3",
        "__post_init__: 3",
        "to_dict: 3",
        "seed : {x}",
        "1: 2",
        "~: 1",
        ".nan: 2",
        "true: 2",
        "2001-01-01: 2",
    ),
    *(
        "? [1]\n: 2",
        "? {a: 1}\n: 2",
        "fit_épochs: 1",
        "\u202efit_epochs: 1",
        '"\\e]0;owned\\a": 1',
        'kind: "\\e[31m"\nkid: 1',
    ),
    *(
        '"\\uD800": 1',
        "fit_epochs: 1\n---\nfit_epochs: 2",
        "%YAML 9.9\n---\nfit_epochs: -1",
        "%FOO bar\n---\nfit_epochs: -1",
    ),
    *("%TAG ! tag:yaml.org,2002:python/\n---\nfit_epochs: !object/apply:os.system ['touch pwned']", "- 1\n- 2", "5"),
    *("hello", "fit_epochs:\n\t1", "\tfit_epochs: 1", "fit_epochs: 1\0", "fit_epochs: \a1", 'fit_epochs: "\\e[31mred"'),
    *("hidden_size: [1, 2", "a: b: c", "'", '"', "? ", "&", "*", "[", "{", "%", "@", "`", "|x", "fit_epochs: !"),
]
BYTES = {
    "random bytes": os.urandom(4096),
    "UTF-16": "fit_epochs: -1\n".encode("utf-16"),
    "Latin-1": b"fit_epochs: \xe9\n",
    "invalid UTF-8": b"fit_epochs: \xff\xfe\n",
    "surrogates": b"fit_epochs: \xed\xa0\x80\n",
    "gzip": gzip.compress(b"fit_epochs: 1"),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(500),
    "zeros": bytes(10**5),
    "controls": bytes(range(1, 32)),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("case", HEAVY)
def test_small_texts_that_stand_for_much_are_refused(tmp_path, refused, case):
    refused(load_config, write(tmp_path / "c.yaml", HEAVY[case]))


@pytest.mark.parametrize("text", INTEGERS, ids=lambda text: ascii(text)[:30])
def test_what_is_no_whole_number_in_range_is_refused(tmp_path, refused, text):
    for content in (f"fit_epochs: {text}\n", f"ensemble_size: {text}\n"):
        refused(load_config, write(tmp_path / "c.yaml", content))
    (tmp_path / "c.yaml").write_text("")
    refused(load_config, tmp_path / "c.yaml", [f"batch_size={text}"])
    assert os.listdir(tmp_path) == ["c.yaml"]  # noqa: PTH208


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: ascii(text)[:40])
def test_settings_that_make_no_sense_are_refused(tmp_path, refused, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    refused(load_config, write(tmp_path / "c.yaml", text))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_text_are_refused(tmp_path, refused, case):
    refused(load_config, write(tmp_path / "c.yaml", BYTES[case]))


@pytest.mark.parametrize(
    "device", ["/dev/zero", "/dev/urandom", "/proc/self/mem", "/dev/null/x", "/", "a" * 300, "a\0b"]
)
def test_paths_that_are_no_files_are_refused(refused, device):
    refused(load_config, Path(device))


def test_a_named_pipe_and_a_loop_of_links_are_refused(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    refused(load_config, tmp_path / "pipe.yaml")
    refused(load_config, tmp_path / "loop.yaml")


def test_what_was_right_is_still_read(tmp_path):
    text = "\ufefffit_epochs: 1_0\nfit_lr: 1.5e-3\nprobabilistic: yes\nhidden_size: [16, 16]\r\nseed: 7 # seven\n"
    expected = LearnConfig(fit_epochs=10, fit_lr=1.5e-3, probabilistic=True, hidden_size=(16, 16), seed=7)
    assert load_config(write(tmp_path / "c.yaml", text)) == expected


def test_the_command_says_it_in_a_line(tmp_path):
    write(tmp_path / "c.yaml", HEAVY["laughs as hidden_size"])
    command = [sys.executable, str(ROOT / "learn_model.py"), "--dataset", "hopper-medium-demo", "--config", "c.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "aliases" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
