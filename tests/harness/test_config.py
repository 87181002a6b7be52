"""Overrides become the cells one expects, and faults become sentences."""

import pytest

from harness.config import Composer, build, check_targets, conf_dir, options
from harness.errors import InputError


@pytest.fixture(scope="module")
def composer():
    return Composer()


def test_comma_lists_and_ranges_are_swept_with_seed_outermost(composer):
    cells = composer.expand(["sparsity=0.5,0.75", "seed=range(2)", "method=pisa"])
    assert [dict(c)["seed"] for c in cells] == ["0", "0", "1", "1"]
    assert [dict(c)["sparsity"] for c in cells] == ["0.5", "0.75"] * 2
    assert {dict(c)["method"] for c in cells} == {"pisa"}


def test_a_list_value_is_one_value(composer):
    assert len(composer.expand(["workload.at=[0,1]", "workload=step"])) == 1
    assert composer.compose([("workload", "step"), ("workload.at", "[0,1]")]).config["workload"]["at"] == [0, 1]


def test_density_is_the_rest_of_sparsity_and_reaches_the_routing(composer):
    one = composer.compose([("sparsity", "0.9")])
    assert one.config["density"] == 0.1 and one.config["method"]["routing"]["density"] == 0.1


def test_nested_axes_and_values_are_overridden(composer):
    one = composer.compose([("method", "pisa"), ("method/tail", "zeroth"), ("model.steps", "20")])
    assert one.config["method"]["tail"]["name"] == "zeroth" and one.config["model"]["steps"] == 20
    assert one.choices["method/tail"] == "zeroth"


def test_the_models_own_order_is_the_usual_one(composer):
    assert composer.compose([("model", "toy_wan")]).choices["method/order"] == "tile_3d"
    assert composer.compose([("method/order", "raster")]).choices["method/order"] == "raster"
    direct = composer.compose([("method/order", "tile_3d")])
    assert direct.config == composer.compose([]).config


def test_an_experiment_gives_way_to_the_users_words(composer):
    words = composer.experiment(["seed=7", "experiment=main"], "main")
    assert "seed=7" in words and not any(w.startswith("seed=0") for w in words)
    assert any(w.startswith("sparsity=0.5") for w in words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=pizza"], "Did you mean 'pisa'"),
        (["model=toy_won"], "Did you mean 'toy_wan'"),
        (["method/tail=hybird"], "Did you mean 'hybrid'"),
        (["sparsity=1"], r"sparsity must be in \[0, 1\)"),
        (["sparsity=-0.1"], r"sparsity must be in \[0, 1\)"),
        (["sparsity=much"], r"sparsity must be in \[0, 1\)"),
        (["sparsty=0.5"], "Did you mean 'sparsity'"),
        (["method.tail=zeroth"], "write method/tail=zeroth"),
        (["sparsity=0.5,", "0.75"], "empty value|no spaces around commas"),
        (["0.75"], "no spaces around commas"),
        (["sparsity="], "empty value"),
        (["seed=interval(0,1)"], "list the values"),
        (["experiment=mian"], "Did you mean 'main'"),
    ],
)
def test_a_fault_is_one_sentence(composer, words, sentence):
    with pytest.raises(InputError, match=sentence):
        for cell in composer.expand(composer.experiment(words, "bench_kernel")):
            composer.compose(cell)


def test_every_config_file_composes_and_builds(composer):
    for group in ("method", "method/order", "method/routing", "method/tail", "model", "workload", "metrics", "tracker"):
        for name in options(group):
            one = composer.compose([(group, name)])
            if group.startswith("method"):
                build(one.config["method"])
            else:
                build(one.config[group], where=group)


def test_every_experiment_expands(composer):
    for name in options("experiment"):
        assert composer.expand(composer.experiment([f"experiment={name}"], "main"))


def test_config_files_are_short():
    for path in conf_dir().rglob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 30, path


def test_foreign_classes_are_not_built_unless_named():
    node = {"_target_": "os.path.join"}
    with pytest.raises(InputError, match="allow=os"):
        check_targets({"inner": node}, None)
    check_targets({"inner": node}, "os")
    with pytest.raises(InputError, match="allow="):
        build({"_target_": "pisanother.Thing"})
