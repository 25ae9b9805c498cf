"""A recipe says what the paper did, and what it cannot mean is refused before any worker starts."""

import difflib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ast_core import published_inputs
from ast_core.errors import ConfigError
from ast_core.models.ast import ASTModel
from ast_core.recipe import SYNONYMS, Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
AUDIOSET = {"input_tdim": 1024, "loss": "BCE", "metrics": "mAP", "freqm": 48, "timem": 192, "mixup": 0.5}
AUDIOSET |= {"dataset_mean": -4.2677393, "dataset_std": 4.5689974, "batch_size": 12, "warmup": True, "noise": False}
AUDIOSET |= {"lrscheduler_decay": 0.5}
ESC = {"input_tdim": 512, "loss": "CE", "metrics": "acc", "freqm": 24, "timem": 96, "mixup": 0.0, "lr": 1e-4}
ESC |= {"dataset_mean": -6.6268077, "dataset_std": 5.358466, "batch_size": 48, "warmup": False, "noise": False}
ESC |= {"epochs": 25, "lrscheduler_start": 5, "lrscheduler_step": 1, "lrscheduler_decay": 0.85}
ESC |= {"sampling": "uniform", "wa_start": None, "wa_end": None}

# DESIGN.md, the table of recipes and the lines under it.
EXPECTED = {
    "audioset-full": AUDIOSET
    | {"lr": 1e-5, "epochs": 5, "lrscheduler_start": 2, "lrscheduler_step": 1, "sampling": "weighted"}
    | {"wa_start": 1, "wa_end": 5},
    "audioset-balanced": AUDIOSET
    | {"lr": 5e-5, "epochs": 25, "lrscheduler_start": 10, "lrscheduler_step": 5, "sampling": "uniform"}
    | {"wa_start": 6, "wa_end": 25},
    "esc50": ESC,
    "esc10": ESC,
    "speechcommands": {"input_tdim": 128, "loss": "BCE", "metrics": "acc", "freqm": 48, "timem": 48, "mixup": 0.6}
    | {"dataset_mean": -6.845978, "dataset_std": 5.5654526, "batch_size": 128, "warmup": False, "noise": True}
    | {"lr": 2.5e-4, "epochs": 30, "lrscheduler_start": 5, "lrscheduler_step": 1, "lrscheduler_decay": 0.85}
    | {"sampling": "uniform", "wa_start": None, "wa_end": None},
}
EVERYWHERE = {"model_size": "base384", "fstride": 10, "tstride": 10, "input_fdim": 128, "label_dim": None}
EVERYWHERE |= {"adam_beta1": 0.95, "adam_beta2": 0.999, "weight_decay": 5e-7}
EVERYWHERE |= {"imagenet_pretrain": True, "audioset_pretrain": False}


def load(text: str = "", **overrides: str) -> Recipe:
    return load_recipe(text, overrides, origin="test.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_sets_the_keys_that_it_writes(path: Path):
    text = path.read_text(encoding="utf-8")
    recipe = load_recipe(text, {}, origin=path.name).to_dict()
    written = yaml.safe_load(text)
    assert {key: recipe[key] for key in written} == written


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("audioset-full", published_inputs.AUDIOSET),
        ("audioset-full-fast", published_inputs.AUDIOSET),
        ("audioset-balanced", published_inputs.AUDIOSET),
        ("esc50", published_inputs.ESC50),
        ("esc10", published_inputs.ESC50),
        ("speechcommands", published_inputs.SPEECH_COMMANDS),
    ],
)
def test_a_shipped_recipe_takes_its_input_as_the_readers_of_published_weights_do(
    name: str, known: published_inputs.PublishedInput
):
    recipe = load_recipe((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), {}, origin=name)
    assert (recipe.dataset_mean, recipe.dataset_std, recipe.input_tdim) == (known.mean, known.std, known.num_frames)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_has_the_papers_figures(name: str):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = load_recipe(text, {}, origin=name).to_dict()
    expected = EVERYWHERE | EXPECTED[name]
    assert {key: recipe[key] for key in expected} == expected


def test_only_the_fast_recipe_leaves_out_patches_and_differs_from_the_papers_where_it_says():
    recipes = {
        path.stem: load_recipe(path.read_text(encoding="utf-8"), {}, origin=path.name).to_dict() for path in FILES
    }
    fast, full = recipes["audioset-full-fast"], recipes["audioset-full"]
    differ = {key for key in fast if fast[key] != full[key]}
    assert differ == {"patchout_f", "patchout_t", "batch_size", "lr"}
    assert (fast["patchout_f"], fast["patchout_t"]) == (4, 40)
    assert fast["lr"] == pytest.approx(full["lr"] * (fast["batch_size"] / full["batch_size"]) ** 0.5, rel=0.02)
    assert {name for name, recipe in recipes.items() if recipe["patchout_f"] or recipe["patchout_t"]} == {
        "audioset-full-fast"
    }
    assert {recipe["grad_clip"] for recipe in recipes.values()} == {None}


def test_patchout_leaves_at_least_one_patch_of_the_grid():
    assert load("patchout_f: 11\npatchout_t: 100").patchout_t == 100
    message = r"^patchout_t is 7; use 0 to 6 \(of 7 columns of patches\)$"
    with pytest.raises(ConfigError, match=message):
        load("input_tdim: 112\ntstride: 16\ntimem: 0\npatchout_t: 7")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults():
    recipe = load("lr: 2.0e-5\nbatch_size: 24", lr="3e-5")
    assert (recipe.lr, recipe.batch_size, recipe.epochs) == (3e-5, 24, Recipe().epochs)


def test_an_empty_recipe_is_the_defaults():
    assert load() == load("# nothing but a comment\n") == Recipe()


def test_a_recipe_survives_its_dictionary():
    recipe = load("mixup: 0.25\nwa_start: 2\nwa_end: 3")
    assert Recipe(**recipe.to_dict()) == recipe


def test_the_model_takes_what_the_recipe_gives_it():
    args = load("model_size: tiny224\ninput_tdim: 64\ntimem: 32\nlabel_dim: 7\nfstride: 16").model_args()
    model = ASTModel(**args, imagenet_pretrain=False)
    assert (model.input_shape, model.v.patch_embed.grid_size, len(model.mlp_head[1].bias)) == ((64, 128), (8, 5), 7)


@pytest.mark.parametrize(
    ("written", "near"), [("lrs", "lr"), ("batchsize", "batch_size"), ("mix_up", "mixup"), ("tdim", "timem")]
)
def test_an_unknown_key_names_the_nearest_known_one(written: str, near: str):
    assert difflib.get_close_matches(written, [field.name for field in fields(Recipe)])[0] == near
    with pytest.raises(ConfigError, match=rf"no recipe key '{written}'; did you mean {near}\?"):
        load(f"{written}: 1")
    with pytest.raises(ConfigError, match=rf"no recipe key '{written}'; did you mean {near}\?"):
        load(**{written: "1"})


def test_an_unknown_key_under_another_programs_name_names_ours():
    with pytest.raises(ConfigError, match=r"no recipe key 'learning_rate'; did you mean lr\?"):
        load("learning_rate: 1")
    assert set(SYNONYMS.values()) <= {field.name for field in fields(Recipe)}


def test_an_unknown_key_that_resembles_no_other_points_to_the_help():
    with pytest.raises(ConfigError, match=r"no recipe key 'zzzzzz'; `jobs/train.py --help` lists the keys"):
        load("zzzzzz: 1")


@pytest.mark.parametrize(("given", "missing"), [("wa_start", "wa_end"), ("wa_end", "wa_start")])
def test_one_end_of_the_averaged_epochs_alone_is_refused(given: str, missing: str):
    with pytest.raises(ConfigError, match=f"^{given} is 3 but {missing} is not set; set both or neither$"):
        load(f"epochs: 9\n{given}: 3")


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_a_number_without_a_point_is_a_number(text: str):
    assert load(f"lr: {text}").lr == load(lr=text).lr == 1e-5


def test_a_whole_number_serves_where_a_number_is_asked_and_becomes_one():
    recipe = load("mixup: 1")
    assert (recipe.mixup, type(recipe.mixup)) == (1.0, float)


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("batch_size", "true", "a whole number"),  # YAML's true is no 1
        ("batch_size", "12.0", "a whole number"),
        ("batch_size", "dozen", "a whole number"),
        ("batch_size", "[12]", "a whole number"),
        ("epochs", "null", "a whole number"),
        ("lr", "true", "a number"),
        ("lr", "fast", "a number"),
        ("lr", "null", "a number"),
        ("lr", "[1e-5]", "a number"),
        ("warmup", "1", "true or false"),
        ("warmup", "'true'", "true or false"),
        ("noise", "null", "true or false"),
        ("loss", "MSE", "BCE or CE"),
        ("loss", "bce", "BCE or CE"),
        ("loss", "[BCE]", "BCE or CE"),
        ("metrics", "map", "mAP or acc"),
        ("sampling", "balanced", "weighted or uniform"),
        ("precision", "fp8", "fp32 or bf16 or fp16"),
        ("grad_clip", "yes", "a number or null"),
        ("patchout_f", "4.0", "a whole number"),
        ("patchout_t", "null", "a whole number"),
        ("model_size", "224", "text"),
        ("label_dim", "many", "a whole number or null"),
        ("dataset_mean", "own", "a number"),
        ("dataset_mean", "null", "a number"),
        ("norm_stats", "own", "recipe or data"),
        ("mixup_domain", "waveform", "power or log_mel"),
        ("attention", "flash", "auto or fused or plain"),
        ("compile", "1", "true or false or null"),
        ("imagenet_weights", "7", "text or null"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_the_key_takes(key: str, value: str, takes: str):
    for recipe in ({"text": f"{key}: {value}"}, {key: value}):
        with pytest.raises(ConfigError, match=rf"^{key} is .*; use {takes}$"):
            load(**recipe)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", "0"),
        ("epochs", "0"),
        ("epochs", "-1"),
        ("lrscheduler_start", "0"),
        ("lrscheduler_step", "0"),
        ("lr", "0"),
        ("lr", "-1e-5"),
        ("lr", ".nan"),
        ("lr", ".inf"),
        ("lrscheduler_decay", "0"),
        ("mixup", "1.01"),
        ("mixup", "-0.1"),
        ("mixup", ".nan"),
        ("adam_beta1", "1"),  # torch's Adam takes less than 1
        ("adam_beta2", "-0.1"),
        ("weight_decay", "-1e-7"),
        ("freqm", "129"),
        ("freqm", "-1"),
        ("timem", "1025"),
        ("label_dim", "0"),
        ("dataset_std", "0"),
        ("dataset_std", "-4.5"),
        ("dataset_mean", ".inf"),
        ("micro_batch_size", "0"),
        ("grad_clip", "0"),
        ("grad_clip", ".inf"),
        ("patchout_f", "-1"),
        ("patchout_f", "12"),  # the grid of patches is 12 × 101, and one of each stays
        ("patchout_t", "101"),
        ("fstride", "17"),
        ("tstride", "0"),
        ("input_tdim", "15"),
        ("input_fdim", "0"),
        ("model_size", "huge"),
        ("seed", "-1"),  # NumPy's generators take 0 or more
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(key: str, value: str):
    with pytest.raises(ConfigError, match=rf"^{key} is .*; use "):
        load(**{key: value})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("wa_start: 2", "wa_end"),
        ("wa_end: 2", "wa_end"),
        ("wa_start: 3\nwa_end: 2", "wa_end"),
        ("wa_start: 0\nwa_end: 2", "wa_start"),
        ("epochs: 4\nwa_start: 2\nwa_end: 5", "wa_end"),
        ("input_tdim: 128", "timem"),  # the default mask of 192 is longer
        ("input_fdim: 32", "freqm"),
    ],
)
def test_values_that_do_not_go_together_are_refused(text: str, key: str):
    with pytest.raises(ConfigError, match=rf"^{key} is .*; use "):
        load(text)


def test_null_leaves_it_to_the_data_where_that_can_be():
    recipe = load("micro_batch_size: null\nlabel_dim: null\nwa_start: null\nwa_end: ~")
    assert {recipe.micro_batch_size, recipe.label_dim, recipe.wa_start, recipe.wa_end} == {None}


@pytest.mark.parametrize("text", ["- lr", "lr", "7"])
def test_a_file_that_is_no_mapping_is_refused_by_name(text: str):
    with pytest.raises(ConfigError, match=r"test\.yaml: a recipe is a mapping"):
        load(text)


def test_text_that_is_no_yaml_is_refused_on_one_line():
    with pytest.raises(ConfigError, match=r"test\.yaml: not valid YAML") as refused:
        load("lr: [1\nbatch_size: 2")
    assert "\n" not in str(refused.value)


def test_what_the_command_line_bounds_gives_way_and_it_is_announced(caplog: pytest.LogCaptureFixture):
    text = (RECIPES / "audioset-balanced.yaml").read_text()
    few = {"epochs": "2", "input_tdim": "128", "input_fdim": "32"}
    recipe = load_recipe(text, few, origin="balanced")
    assert (recipe.wa_start, recipe.wa_end, recipe.timem, recipe.freqm) == (2, 2, 128, 32)
    assert caplog.messages == [
        "wa_start is 2 in place of 6: no more than epochs",
        "wa_end is 2 in place of 25: no more than epochs",
        "freqm is 32 in place of 48: no more than input_fdim",
        "timem is 128 in place of 192: no more than input_tdim",
    ]
    with pytest.raises(ConfigError, match="wa_end is 25"):
        load_recipe(text, few | {"wa_end": "25"}, origin="balanced")
    with pytest.raises(ConfigError, match="epochs is 0"):
        load_recipe(text, {"epochs": "0"}, origin="balanced")
