"""Published figures beside those of a comparison on AudioSet."""

import pytest

from ast_core.labels import LabelVocabulary, audioset_labels
from jobs.recipe_option import read_recipe
from pipeline.compare.published import audioset_part, published_figures


@pytest.mark.parametrize(
    ("num_train", "num_eval", "part"),
    [
        (2_063_949, 20_371, "full"),
        (1_900_000, 18_887, "full"),
        (22_160, 20_371, "balanced"),
        (20_550, 18_887, "balanced"),
        (22_160, 500, None),
        (5_000, 20_371, None),
        (500_000, 20_371, None),
    ],
)
def test_audioset_is_recognised_by_its_classes_and_numbers_of_clips(num_train: int, num_eval: int, part: str | None):
    assert audioset_part(audioset_labels(), num_train, num_eval) == part
    other = LabelVocabulary.from_names([f"class {i}" for i in range(527)])
    assert audioset_part(other, num_train, num_eval) is None


@pytest.mark.parametrize(
    ("recipe", "part", "published", "comparison"),
    [
        ("audioset-full", "full", 0.449, 0.430),
        ("audioset-balanced", "balanced", 0.347, 0.3315),
        ("compare-ast", "full", 0.449, 0.430),
        ("compare-talnet", "full", None, 0.429),
        ("compare-talnet-small", "full", 0.362, 0.393),
        ("compare-cnn-transformer", "full", None, 0.437),
        ("compare-cnn-transformer-small", "full", None, 0.411),
        ("compare-resnet50", "full", None, 0.410),
        ("psla-efficientnet", "full", 0.4397, None),
        ("psla-efficientnet-balanced", "balanced", 0.3192, None),
    ],
)
def test_each_published_recipe_finds_its_figures(
    recipe: str, part: str, published: float | None, comparison: float | None
):
    found = published_figures(part, read_recipe(recipe, []).to_dict())
    assert found is not None
    assert (found.published, found.comparison) == (published, comparison)


def test_a_model_without_published_figures_has_none():
    assert published_figures("full", read_recipe("small", []).to_dict()) is None
    assert published_figures("balanced", read_recipe("compare-talnet", []).to_dict()) is None
    assert published_figures(None, read_recipe("audioset-full", []).to_dict()) is None
    smaller = read_recipe("compare-talnet", ["--embedding_size", "1024"]).to_dict()
    assert published_figures("full", smaller) is None


@pytest.mark.parametrize("recipe", ["audioset-full", "compare-resnet50", "psla-efficientnet"])
@pytest.mark.parametrize("changed", [["--features", "data"], ["--input_tdim", "512"]])
def test_a_model_with_another_input_has_no_published_figures(recipe: str, changed: list[str]):
    assert published_figures("full", read_recipe(recipe, changed).to_dict()) is None


def test_null_settings_count_as_the_models_own():
    keys = ["--att_head", "null"]
    found = published_figures("full", read_recipe("psla-efficientnet", keys).to_dict())
    assert found is not None
    assert found.published == 0.4397
