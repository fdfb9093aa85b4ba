"""Configs: every shipped file loads, every mistake is named in one line, numbers are read as people write them."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist.config import KINDS, difference, dump, load, parse, shrink
from llamagen_dist.config.loader import resolve
from llamagen_dist.config.section import Scaled, keys_of, scaled_keys
from llamagen_dist.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
GPT = """
kind: gpt
run_dir: runs/x
model: {size: GPT-B}
data: {train: a, validation: b}
train: {images: 2560}
optim: {lr: 1e-5}
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "c.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def errors(path: Path, *settings: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(path, settings)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name):
    assert load(ROOT / name).kind in KINDS


def test_all_errors_at_once_with_path_and_nearest_key(file):
    lines = errors(file(GPT + "lr: 1\n"), "optim.lrr=3", "train.seed=-1", "trian.images=4")
    assert len(lines) == 4
    assert any("optim.lrr: unknown key; did you mean optim.lr?" in line for line in lines)
    assert any(": lr: unknown key; did you mean optim.lr?" in line for line in lines)
    assert any("trian: unknown key; did you mean train?" in line for line in lines)
    assert any("train.seed" in line and "-1" in line for line in lines)


def test_numbers_are_numbers_and_words_are_words(file):
    path = file(GPT.replace("1e-5", "1e-4").replace("runs/x", "off"))
    config = load(path, ["train.seed=012", "optim.weight_decay=5e-2", "train.images=25_600"])
    assert config.optim.lr == 1e-4
    assert config.run_dir == Path("off")
    assert (config.train.seed, config.optim.weight_decay, config.train.images) == (12, 0.05, 25600)


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_float_survives_dump_and_load(tmp_path_factory, lr):
    folder = tmp_path_factory.mktemp("config")
    (folder / "a.yaml").write_text(GPT)
    config = load(folder / "a.yaml", [f"optim.lr={lr!r}"])
    assert config.optim.lr == lr
    (folder / "b.yaml").write_text(dump(config))
    assert load(folder / "b.yaml") == config
    assert yaml.safe_load(dump(config))["optim"]["lr"] == lr, "a plain YAML 1.1 reader must see a number too"


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,6}(\.[a-z_]{1,6}){0,2}", fullmatch=True), st.integers(), max_size=5))
def test_settings_nest(pairs):
    prefixes = [k for k in pairs for other in pairs if other.startswith(k + ".")]
    if prefixes:
        return  # a key cannot be a value and a section
    nested = parse(f"{k}={v}" for k, v in pairs.items())
    for key, value in pairs.items():
        inner = nested
        for part in key.split("."):
            inner = inner[part]
        assert inner == value


@pytest.mark.parametrize("word", ["1e-4", "012", "on", "1_000", "0x1F", "2026-11-26", "a #b", "~", "12:30"])
def test_a_word_that_looks_like_a_number_survives_dump_and_load(file, word):
    config = load(file(GPT), [f"run_dir='{word}'"])
    assert config.run_dir == Path(word)
    assert load(file(dump(config), "again.yaml")) == config
    assert yaml.safe_load(dump(config))["run_dir"] == word, "a plain YAML 1.1 reader must see a word too"
    if word == "1e-4":  # sabotage twin: as YAML 1.1 alone would have it written
        with pytest.raises(UserError, match="run_dir"):
            load(file(yaml.safe_dump(config.model_dump(mode="json")), "again.yaml"))


def test_base_is_inherited_and_overridden(file):
    file(GPT, "base.yaml")
    config = load(file("base: base.yaml\noptim: {clip: 2}\n"))
    assert (config.optim.lr, config.optim.clip) == (1e-5, 2)
    file("base: d.yaml\nkind: gpt\n", "e.yaml")
    assert "inherits from itself" in errors(file("base: e.yaml\nkind: gpt\n", "d.yaml"))[0]


def test_cross_field_rules_are_told(file):
    path = file(GPT)
    assert "the nearest is 2560" in errors(path, "train.images=2500")[0]
    assert "both" in errors(path, "model.dim=32")[0]
    assert "set tensor: 2" in errors(path, "parallel.sequence=true")[0]
    assert "set parallel.zero to 1, 2 or 3" in errors(path, "compute.precision=bf16", "parallel.zero=0")[0]
    assert "set compile: false" in errors(path, "compute.compile=true", "parallel.zero=3")[0]
    assert "set one (such as 0.999)" in errors(path, "validation.weights=ema")[0]
    assert load(path, ["validation.weights=ema", "ema.decay=0.9"]).validation.weights == "ema"
    assert "cosine_images" in errors(path, "optim.schedule=cosine")[0]
    assert "final_lr" in errors(path, "optim.final_lr=1")[0]
    assert "needs warmup_images > 0" in errors(path, "optim.schedule=warmup")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: gptt\n", "did you mean gpt?"),
        ("run_dir: x\n", "kind: missing; one of"),
        ("- 1\n", "a mapping of keys to values"),
        ("kind: gpt\nkind: gpt\n", "appears twice"),
        ("kind: [\n", "not valid YAML"),
        ("kind: gpt\n[1, 2]: 3\n", "a key is a word"),
        ("{kind: gpt, {a: 1}: 3}\n", "a key is a word"),
        ("kind: &a [*a]\n", "kind: "),
        ("kind: " + "[" * 5000 + "\n", "not valid YAML"),
        ("kind: [gpt]\n", "kind: ['gpt'] is unknown"),
        ("kind: gpt\x00\n", "not valid YAML"),
    ],
)
def test_broken_files_are_one_sentence(file, text, expected):
    lines = errors(file(text))
    assert len(lines) == 1
    assert expected in lines[0]


def test_a_missing_file_and_a_bad_setting(tmp_path, file):
    assert "no such config file" in errors(tmp_path / "none.yaml")[0]
    assert "write key=value" in errors(file(GPT), "lr")[0]


def test_the_difference_of_two_configs_names_keys(file):
    path = file(GPT)
    old, new = load(path), load(path, ["optim.lr=2e-4", "log.every_steps=5"])
    assert difference(old, new, ignore=("log",)) == ["optim.lr: 1e-05 -> 0.0002"]
    assert difference(old, old) == []


# --- numbers that no run can have ---

NUMBERS = sorted(
    (kind, key, int in parts)
    for kind, section in KINDS.items()
    for key, parts in keys_of(section)
    if {int, float} & set(parts) and "*" not in key
)
IMPOSSIBLE = (".inf", "-.inf", ".nan", "inf", "nan", "1e400", "-1e400", "9" * 19, "9" * 400, "9" * 5000, "true")


@pytest.mark.parametrize(("kind", "key", "whole"), NUMBERS)
def test_every_numeric_key_refuses_what_is_no_number_of_a_run(kind, key, whole):
    """In a file and as a word, quoted (``"nan"``, which pydantic reads as a float) or not; one line, no traceback."""
    for text in IMPOSSIBLE:
        for value in (text, f'"{text}"', f"[{text}]", f"[{text}, {text}]"):
            if not whole and text == "9" * 19 and '"' in value:
                continue  # as a floating-point number it is one
            with pytest.raises(UserError) as caught:
                resolve(parse([f"kind={kind}", f"{key}={value}"]), "file")
            wrong = [line for line in str(caught.value).splitlines() if line.startswith(f"file: {key}")]
            assert wrong, (key, value)
    with pytest.raises(UserError) as caught:  # sabotage twin: a number is not refused as such
        resolve(parse([f"kind={kind}", f"{key}=1", "no_such_key=1"]), "file")
    assert f"{key}: 1 is not a finite" not in str(caught.value)


def test_numbers_in_mappings_and_lists_are_looked_at_too(file):
    assert [
        "ladder.a.optim.lr: nan is not a finite number" in e for e in errors(file(GPT), "ladder.a={optim.lr: .nan}")
    ]
    sweep = "kind: sweep\ntitle: t\nmodule: m\nconfig: c\ngrid: {optim.lr: [1e-3, 1e400]}\n"
    assert "grid.optim.lr.1: inf is not a finite number" in errors(file(sweep))[0]


def test_a_number_too_long_to_read_is_one_sentence(file):
    assert "a number of 5000 digits" in errors(file(GPT + f"log: {{every_steps: {'9' * 5000}}}"))[0]


# --- what only a start would find ---


def command(*words: str) -> tuple[int, list[str]]:
    from llamagen_dist import cli

    try:
        cli.main(["config", *map(str, words)])
    except UserError as error:
        return 2, str(error).splitlines()
    return 0, []


def test_a_size_that_does_not_exist_is_found_with_all_other_mistakes(file):
    words = ["model.size=GPT-XXS", "optim.lrr=1", "train.images=5", "compute.precision=bf16", "parallel.zero=0"]
    code, lines = command(file(GPT), *words)
    assert (code, len(lines)) == (2, 4)
    assert any("model.size: 'GPT-XXS' is unknown; did you mean GPT-XXL?" in line for line in lines)
    assert any("set parallel.zero to 1, 2 or 3" in line for line in lines), "rules between other sections are heard"


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("gpt/GPT-B", ["model={size: ~, n_layer: 2, n_head: 3, dim: 64}"], "dim 64 is not a multiple of n_head 3"),
        (
            "gpt/GPT-B",
            ["model={size: ~, n_layer: 2, n_head: 32, dim: 64}"],
            "must be a multiple of 4: half of it turns",
        ),
        ("gpt/GPT-B", ["model.n_kv_head=5"], "n_kv_head 5 does not divide n_head 12"),
        ("gpt/GPT-B", ["model.prefix_tokens=2"], "a class is one token"),
        ("gpt/GPT-B", ["parallel.tensor=5"], "parallel.tensor: 5 does not divide this model's heads 12"),
        ("gpt/ladder", ["ladder.tiny.model.n_head=5"], "ladder.tiny: model: dim"),
        ("gpt/ladder", ["ladder.tiny={model.dims: 5}"], "did you mean model.dim?"),
        ("gpt/ladder", ["ladder.tiny={parallel.tensor: 2}"], "cannot differ between rungs"),
        ("tokenizer/VQ-16", ["model.size=VQ-61"], "model.size: 'VQ-61' is unknown; did you mean VQ-16?"),
        ("tokenizer/VQ-16", ["model.codebook_size=64"], "codebook_size: a released size has its own"),
        ("tokenizer/VQ-16", ["model.channels=64"], "give either size (VQ-8 or VQ-16) or both"),
        ("tokenizer/quickstart", ["model.channel_multipliers=[]"], "model.channel_multipliers: "),
        ("tokenizer/quickstart", ["data.image_size=30"], "data.image_size: 30 pixels cannot be cut into"),
        (
            "tokenizer/quickstart",
            ["loss.discriminator={kind: patchgan, layers: 9}"],
            "layers need at least 1536 pixels",
        ),
        ("extract/imagenet", ["model.size=VQ-16", "image_size=100"], "image_size: 100 pixels cannot be cut"),
        ("eval/sample", ["tokenizer_model.size=VQ-7"], "tokenizer_model.size: 'VQ-7' is unknown"),
        ("eval/sample", ["model={size: GPT-W}"], "model.size: 'GPT-W' is unknown"),
    ],
)
def test_what_a_start_would_stumble_over_is_found_by_the_command(name, words, expected, capsys):
    paths = ["run_dir=r", "data.train=a", "data.validation=b"] if name.split("/")[0] in ("gpt", "tokenizer") else []
    if name.startswith("eval"):
        paths = ["checkpoint=c", "tokenizer=t", "out=o"]
    if name.startswith("extract"):
        paths = ["tokenizer=t", "images=i", "out=o"]
    if name.startswith("tokenizer/VQ"):
        paths.append("loss.perceptual=none")
    code, lines = command(ROOT / "configs" / f"{name}.yaml", *paths, *words)
    assert code == 2
    assert any(expected in line for line in lines), lines
    assert command(ROOT / "configs" / f"{name}.yaml", *paths)[0] == 0, "sabotage twin"


def test_the_points_of_a_sweep_and_the_stages_of_a_pipeline_are_opened_too(file):
    base = file(GPT, "base.yaml")
    sweep = f"kind: sweep\ntitle: t\nmodule: m\nconfig: {base}\ngrid: {{optim.KEY: [1, 2]}}\n"
    code, lines = command(file(sweep.replace("KEY", "lrr")))
    assert (code, len(lines)) == (2, 1)
    assert "point lrr-1: base.yaml: optim.lrr: unknown key; did you mean optim.lr?" in lines[0]
    assert command(file(sweep.replace("KEY", "lr"))) == (0, []), "sabotage twin"
    assert command(file(sweep.replace("KEY", "lr")), "grid={train.images: [1]}")[0] == 2, "words change the sweep"
    stage = f"{{name: s, why: w, module: m, config: {base}, set: {{train.KEY: 2}}}}"
    pipeline = f"kind: pipeline\ntitle: t\nstages: [{stage}]\n"
    assert "train.sed: unknown key; did you mean train.seed?" in command(file(pipeline.replace("KEY", "sed")))[1][0]
    assert command(file(pipeline.replace("KEY", "seed"))) == (0, []), "sabotage twin"
    for name in SHIPPED:
        if name.startswith(("configs/sweep", "configs/pipeline")):
            assert command(ROOT / name) == (0, []), name


def test_a_plan_may_ask_about_a_split_that_cannot_be(file):
    assert load(file(GPT), ["parallel.tensor=5"]).parallel.tensor == 5


# --- words of the command line ---


@pytest.mark.parametrize(
    "text", ["a #b", "#b", "a # b", "'a' #b", "a\t#b", "runs/x #1/y", "&x a", "!x a", "a: #b", '"a" b', "[a] #b"]
)
def test_no_part_of_a_word_is_dropped(file, text):
    """YAML takes `` #b`` for a comment; the shell has already said that it belongs to the value."""
    (value,) = parse([f"run_dir={text}"]).values()
    assert value == text.strip()
    assert load(file(GPT), [f"run_dir={text}"]).run_dir == Path(text)


def test_words_are_still_yaml():
    words = {
        "2026-11-26": "2026-11-26",
        "1": 1,
        "[1, 2]": [1, 2],
        "{a: 1}": {"a": 1},
        "'a #b'": "a #b",
        "a#b": "a#b",
        "": None,
        "~": None,
    }
    assert {word: parse([f"k={word}"])["k"] for word in words} == words


# --- --small ---


def test_every_length_of_a_run_shrinks(file):
    """Also the schedule's: a rehearsal whose cosine kept its full length would never decay."""
    lengths = {
        "train.images": 256000,
        "optim.warmup_images": 25600,
        "optim.cosine_images": 256000,
        "validation.every_images": 25600,
        "checkpoint.every_images": 51200,
        "checkpoint.keep_every_images": 102400,
    }
    words = [f"{key}={value}" for key, value in lengths.items()]
    config = load(
        file(GPT), [*words, "optim.schedule=cosine", "validation.images=1000", "validation.at_images=[25600]"]
    )
    short = shrink(config, 0.1).model_dump()
    for key, value in lengths.items():
        section, last = key.split(".")
        assert short[section][last] == value // 10, key
    assert (short["validation"]["images"], short["validation"]["at_images"]) == (100, (2560,))
    assert shrink(config, 1.0) == config


def test_no_number_of_images_is_left_out():
    """Every key whose name speaks of images is marked, so that nobody keeps a list of them elsewhere."""
    for kind, section in KINDS.items():
        marked = set(scaled_keys(section))
        named = {
            key
            for key, _ in keys_of(section)
            if key.split(".")[-1].endswith("_images") or key.endswith("cooldown_from")
        }
        assert named <= marked, kind
    assert scaled_keys(KINDS["gpt"])["optim.cosine_images"] == Scaled()


def test_lengths_that_no_longer_go_together_are_one_sentence(file):
    words = ["optim.schedule=cosine", "optim.warmup_images=1280", "optim.cosine_images=2560"]
    with pytest.raises(UserError, match=r"shrunk by 0\.01: optim: cosine_images must lie behind the warm-up"):
        shrink(load(file(GPT), words), 0.01)
