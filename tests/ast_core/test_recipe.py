"""Shipped recipes have the published values; invalid recipes are refused before a worker starts."""

import difflib
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from ast_core import published_inputs
from ast_core.errors import ConfigError
from ast_core.models import create_model
from ast_core.models.registry import MODELS, model_kind
from ast_core.recipe import GROUPS, SYNONYMS, Recipe, load_recipe
from ast_core.settings import descriptions
from jobs import train

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
FILES = {path.stem: path for path in RECIPES.rglob("*.yaml")}
AUDIOSET = {"input_tdim": 1024, "loss": "BCE", "metrics": "mAP", "freqm": 48, "timem": 192, "mixup": 0.5}
AUDIOSET |= {"dataset_mean": -4.2677393, "dataset_std": 4.5689974, "batch_size": 12, "warmup": True, "noise": False}
AUDIOSET |= {"lrscheduler_decay": 0.5}
ESC = {"input_tdim": 512, "loss": "CE", "metrics": "acc", "freqm": 24, "timem": 96, "mixup": 0.0, "lr": 1e-4}
ESC |= {"dataset_mean": -6.6268077, "dataset_std": 5.358466, "batch_size": 48, "warmup": False, "noise": False}
ESC |= {"epochs": 25, "lrscheduler_start": 5, "lrscheduler_step": 1, "lrscheduler_decay": 0.85}
ESC |= {"sampling": "uniform", "wa_start": None, "wa_end": None}

SMALL64 = {"features": "small64", "input_fdim": 64, "input_tdim": 400, "embedding_size": 1024, "sampling": "weighted"}
SMALL64 |= {"freqm": 12, "timem": 60, "mixup": 0.3, "noise": False, "warmup": True, "loss": "BCE", "metrics": "mAP"}
SMALL64 |= {"dataset_mean": -29.686902 / 2, "dataset_std": 40.898224 / 2, "epochs": 10, "wa_start": 1, "wa_end": 5}
SMALL64 |= {"lrscheduler_start": 2, "lrscheduler_step": 1, "lrscheduler_decay": 0.5}

# Values from the run scripts of the reference implementation, of AudioTaggingDoneRight and of PSLA.
EXPECTED = {
    "compare-cnn-transformer-small": SMALL64
    | {"model": "cnn_transformer", "n_trans_layers": 2, "addpos": True, "transformer_dropout": 0.75}
    | {"lr": 4e-4, "batch_size": 448},
    "fsd50k": AUDIOSET
    | {"model": "efficientnet", "eff_b": 2, "att_head": 4, "input_tdim": 3000, "sampling": "weighted", "lr": 5e-4}
    | {"dataset_mean": -4.6476, "dataset_std": 4.5699, "norm_divisor": 1, "batch_size": 24, "epochs": 40}
    | {"lrscheduler_start": 10, "lrscheduler_step": 5, "wa_start": 21, "wa_end": 40},
    "compare-talnet-small": SMALL64 | {"model": "talnet", "lr": 1.6e-3, "batch_size": 400},
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


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_every_shipped_recipe_loads_with_the_values_of_its_file(path: Path):
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
def test_a_shipped_recipe_has_the_input_settings_of_published_weights(
    name: str, known: published_inputs.PublishedInput
):
    recipe = load_recipe(FILES[name].read_text(encoding="utf-8"), {}, origin=name)
    assert (recipe.dataset_mean, recipe.dataset_std, recipe.input_tdim) == (known.mean, known.std, known.num_frames)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_has_the_published_values(name: str):
    text = FILES[name].read_text(encoding="utf-8")
    recipe = load_recipe(text, {}, origin=name).to_dict()
    expected = EVERYWHERE | EXPECTED[name]
    assert {key: recipe[key] for key in expected} == expected


def test_only_the_fast_recipe_uses_patchout_and_it_changes_four_keys():
    recipes = {
        name: load_recipe(path.read_text(encoding="utf-8"), {}, origin=name).to_dict() for name, path in FILES.items()
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


def test_the_command_line_overrides_the_file_and_the_file_the_defaults():
    recipe = load("lr: 2.0e-5\nbatch_size: 24", lr="3e-5")
    assert (recipe.lr, recipe.batch_size, recipe.epochs) == (3e-5, 24, Recipe().epochs)


def test_an_empty_recipe_has_the_defaults():
    assert load() == load("# nothing but a comment\n") == Recipe()


def test_a_recipe_is_restored_from_its_dictionary_and_from_a_pickle():
    recipe = load("mixup: 0.25\nwa_start: 2\nwa_end: 3")
    assert Recipe(**recipe.to_dict()) == pickle.loads(pickle.dumps(recipe)) == recipe


def test_a_changed_recipe_is_checked_again():
    recipe = load("epochs: 3")
    assert replace(recipe, lr=1).lr == 1.0
    with pytest.raises(ConfigError, match=r"^lr is 'fast'; use a number$"):
        replace(recipe, lr="fast")
    with pytest.raises(ConfigError, match=r"^no setting 'rate'; use "):
        Recipe(rate=1.0)


def test_every_key_has_a_group_and_a_description_and_is_in_the_help():
    described = {key: text for group in GROUPS for key, text in descriptions(group).items()}
    assert described.keys() == {field.name for field in fields(Recipe)}
    listed = train.parser().format_help().split("recipe keys, model:")[1]
    for key, text in described.items():
        assert f"--{key}  " in listed
        assert " ".join(text.split()) in " ".join(listed.split())


def test_model_args_build_the_model():
    args = load("model_size: tiny224\ninput_tdim: 64\ntimem: 32\nlabel_dim: 7\nfstride: 16").model_args()
    model = create_model(**args)
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


def test_another_programs_name_of_a_key_is_refused_with_ours():
    with pytest.raises(ConfigError, match=r"no recipe key 'learning_rate'; did you mean lr\?"):
        load("learning_rate: 1")
    assert set(SYNONYMS.values()) <= {field.name for field in fields(Recipe)}


def test_an_unknown_key_without_a_similar_one_points_to_the_help():
    with pytest.raises(ConfigError, match=r"no recipe key 'zzzzzz'; `jobs/train.py --help` lists the keys"):
        load("zzzzzz: 1")


@pytest.mark.parametrize(("given", "missing"), [("wa_start", "wa_end"), ("wa_end", "wa_start")])
def test_wa_start_without_wa_end_is_refused_and_vice_versa(given: str, missing: str):
    with pytest.raises(ConfigError, match=f"^{given} is 3 but {missing} is not set; set both or neither$"):
        load(f"epochs: 9\n{given}: 3")


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_a_number_without_a_point_is_a_number(text: str):
    assert load(f"lr: {text}").lr == load(lr=text).lr == 1e-5


def test_an_integer_is_accepted_for_a_float_key():
    recipe = load("mixup: 1")
    assert (recipe.mixup, type(recipe.mixup)) == (1.0, float)


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("batch_size", "true", "a whole number"),  # true is not 1
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
        ("metrics", "[mAP]", "mAP or acc"),
        ("metrics", "null", "mAP or acc"),
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
        ("attention", "flash", "auto or fused or plain or fa4"),
        ("compile", "1", "true or false or null"),
        ("imagenet_weights", "7", "text or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_allowed_ones(key: str, value: str, takes: str):
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
        ("adam_beta1", "1"),  # PyTorch's Adam requires less than 1
        ("adam_beta2", "-0.1"),
        ("weight_decay", "-1e-7"),
        ("freqm", "-1"),
        ("timem", "-1"),
        ("label_dim", "0"),
        ("dataset_std", "0"),
        ("dataset_std", "-4.5"),
        ("dataset_mean", ".inf"),
        ("micro_batch_size", "0"),
        ("grad_clip", "0"),
        ("grad_clip", ".inf"),
        ("patchout_f", "-1"),
        ("patchout_f", "12"),  # the patch grid is 12 × 101; one row and one column must remain
        ("patchout_t", "101"),
        ("fstride", "17"),
        ("tstride", "0"),
        ("input_tdim", "15"),
        ("input_fdim", "0"),
        ("model_size", "huge"),
        ("seed", "-1"),  # NumPy's generators require 0 or more
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, value: str):
    with pytest.raises(ConfigError, match=rf"^{key} is .*; use "):
        load(**{key: value})


@pytest.mark.parametrize(("wa_start", "wa_end"), [(3, 2), (0, 2), (2, 5)])
def test_averaged_epochs_outside_the_run_are_refused_with_the_keys_to_set(wa_start: int, wa_end: int):
    message = (
        rf"^wa_start is {wa_start} and wa_end is {wa_end}, but epochs is 4; set the three together, with "
        r"1 <= wa_start <= wa_end <= epochs, or both wa_start and wa_end null$"
    )
    with pytest.raises(ConfigError, match=message):
        load(f"epochs: 4\nwa_start: {wa_start}\nwa_end: {wa_end}")


@pytest.mark.parametrize(
    ("mask", "widest", "size", "given"), [("timem", 192, "input_tdim", 128), ("freqm", 48, "input_fdim", 32)]
)
def test_a_mask_wider_than_the_input_is_refused_with_the_keys_to_set(mask: str, widest: int, size: str, given: int):
    message = (
        rf"^{mask} is {widest}, but {size} is {given}; set {mask} and {size} together, with {mask} at most {size}$"
    )
    with pytest.raises(ConfigError, match=message):
        load(f"{size}: {given}")


def test_null_is_accepted_for_optional_keys():
    recipe = load("micro_batch_size: null\nlabel_dim: null\nwa_start: null\nwa_end: ~")
    assert {recipe.micro_batch_size, recipe.label_dim, recipe.wa_start, recipe.wa_end} == {None}


@pytest.mark.parametrize("text", ["- lr", "lr", "7"])
def test_a_recipe_that_is_not_a_mapping_is_refused_by_name(text: str):
    with pytest.raises(ConfigError, match=r"test\.yaml: a recipe is a mapping"):
        load(text)


def test_invalid_yaml_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"test\.yaml: not valid YAML") as refused:
        load("lr: [1\nbatch_size: 2")
    assert "\n" not in str(refused.value)


def test_a_command_line_that_does_not_fit_its_recipe_is_refused_not_rewritten():
    text = (RECIPES / "audioset-balanced.yaml").read_text()
    with pytest.raises(ConfigError, match=r"^wa_start is 6 and wa_end is 25, but epochs is 2; set the three"):
        load_recipe(text, {"epochs": "2"}, origin="balanced")
    with pytest.raises(ConfigError, match=r"^epochs is 0; use 1 to 100000$"):
        load_recipe(text, {"epochs": "0"}, origin="balanced")
    fewer = load_recipe(text, {"epochs": "2", "wa_start": "1", "wa_end": "2"}, origin="balanced")
    assert (fewer.epochs, fewer.wa_start, fewer.wa_end) == (2, 1, 2)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("mixup", "2", "0 to 1"),
        ("adam_beta1", "1", "0 or more, and less than 1"),
        ("grad_clip", "0", "more than 0, or null"),
        ("patience", "0", "1 to 100000, or null"),
        ("dataset_std", ".nan", "a finite number"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_whole_range(key: str, value: str, allowed: str):
    with pytest.raises(ConfigError, match=rf"^{key} is .*; use {allowed}$"):
        load(**{key: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmentations: mixup", "augmentations is 'mixup'; use a list, for example [mixup, spec_augment, noise_roll]"),
        ("augmentations: [mixpu]", "augmentations has 'mixpu'; use mixup or spec_augment or noise_roll"),
        ("augmentations: [7]", "augmentations has 7; use NAME, or NAME: {SETTING: VALUE}"),
        ("augmentations: [mixup: 0.5]", "augmentations has {'mixup': 0.5}; use NAME, or NAME: {SETTING: VALUE}"),
        ("augmentations: [mixup, mixup]", "augmentations lists mixup twice; keep one"),
        (
            "augmentations: [noise_roll, mixup]",
            "augmentations is [noise_roll, mixup], but raw log-mel is augmented before it is normalised; "
            "use [mixup, noise_roll]",
        ),
        (
            "augmentations: [mixup]\nfreqm: 24",
            "freqm is a setting of spec_augment, which augmentations does not list; list spec_augment, leave freqm "
            "out, or turn it off",
        ),
        (
            "augmentations: [spec_augment: {freqm: 24}]",
            "spec_augment in augmentations: freqm is a recipe key; set it outside of the list",
        ),
        ("augmentations: [mixup: {share: 1}]", "mixup in augmentations: no setting 'share'; use mixup or mixup_domain"),
    ],
)
def test_augmentations_that_cannot_act_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(text)


def test_settings_of_augmentations_that_are_not_listed_may_be_off_and_are_not_checked():
    recipe = load("augmentations: [spec_augment]\nmixup: 0.0\nnoise: false")
    assert recipe.to_dict()["augmentations"] == ["spec_augment"]
    assert load("augmentations: []\ninput_tdim: 64").timem == 192  # wider than the input


@pytest.mark.parametrize("model", MODELS)
def test_any_recipe_trains_another_model_with_that_models_own_keys(model: str):
    text = (RECIPES / "small.yaml").read_text()
    recipe = load_recipe(text, {"model": model}, origin="small")
    assert (recipe.model, recipe.epochs, recipe.norm_stats) == (model, 60, "data")
    assert recipe.model_args()["name"] == model
    if model != "ast":
        assert (recipe.fstride, recipe.tstride) == (10, 10)  # the file's 16 are the AST's
    if "imagenet_pretrain" in model_kind(model).keys:
        assert recipe.imagenet_pretrain is False  # as in the file


def test_convnext_is_tiny_unless_another_size_is_given():
    assert load_recipe("model: convnext", {}, origin="test").model_size == "tiny"
    assert load_recipe("model_size: tiny224", {"model": "convnext"}, origin="test").model_size == "tiny"
    assert load_recipe("model: convnext", {"model_size": "atto"}, origin="test").model_size == "atto"
    with pytest.raises(ConfigError, match=r"^model_size is 'huge'; use one of atto, .*, base for convnext$"):
        load_recipe("model: convnext\nmodel_size: huge", {}, origin="test")


@pytest.mark.parametrize("model", ["[ast]", "1", "null"])
def test_a_model_that_is_no_text_is_refused_in_one_line(model: str):
    with pytest.raises(ConfigError, match=r"^model is .*$"):
        load_recipe("", {"model": model}, origin="test")
