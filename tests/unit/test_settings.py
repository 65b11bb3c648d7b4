"""Settings: what is read from where, and that a wrong value says what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_glm_patch.catalog import patch_ids
from vllm_glm_patch.errors import UserError
from vllm_glm_patch.settings import SHAPE_POLICIES, Settings, names

settings_objects = st.builds(
    Settings,
    enabled=st.booleans(),
    strict=st.booleans(),
    disable=st.lists(st.sampled_from(patch_ids()), unique=True).map(tuple),
    shape_policy=st.sampled_from(SHAPE_POLICIES),
    compile_full_step=st.booleans(),
)


@given(settings_objects)
def test_settings_survive_the_way_through_the_environment(settings: Settings) -> None:
    assert Settings.from_environment(settings.environment()) == settings


@given(settings_objects)
def test_settings_survive_the_way_through_additional_config(settings: Settings) -> None:
    config = {name: getattr(settings, name) for name in names()}
    assert Settings().with_config({"glm_patch": config, "other": 1}) == settings


@given(settings_objects, settings_objects)
def test_additional_config_replaces_the_environment_but_never_the_off_switch(first: Settings, second: Settings) -> None:
    both = first.with_config({"glm_patch": {name: getattr(second, name) for name in names()}})
    assert both.enabled == (first.enabled and second.enabled)
    assert both.shape_policy == second.shape_policy


def test_an_unset_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings()


@pytest.mark.parametrize("config", [None, {}, {"other": {}}, "text", object()])
def test_a_configuration_without_our_key_changes_nothing(config: object) -> None:
    assert Settings().with_config(config) == Settings()


@given(st.text().filter(lambda text: text.strip().lower() not in SHAPE_POLICIES))
def test_a_wrong_shape_policy_names_itself_and_what_is_allowed(text: str) -> None:
    with pytest.raises(UserError) as error:
        Settings().with_config({"glm_patch": {"shape_policy": text}})
    assert repr(text) in str(error.value)
    assert all(policy in str(error.value) for policy in SHAPE_POLICIES)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("VLLM_GLM_PATCH", "maybe", "allowed values: 1"),
        ("VLLM_GLM_PATCH_STRICT", "2", "allowed values: 1"),
        ("VLLM_GLM_PATCH_DISABLE", "scale-overread,nonsense", "'nonsense'; known patches: "),
        ("VLLM_GLM_PATCH_SHAPE_POLICY", "caught", "auto, captured, guarded, off"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        Settings.from_environment({variable: value})
    assert variable in str(error.value)
    assert told in str(error.value)


def test_a_misspelt_variable_is_named_and_those_of_the_fence_are_not_ours() -> None:
    with pytest.raises(UserError, match=r"VLLM_GLM_PATCH_SHAPE_POLCY is not known; known are VLLM_GLM_PATCH, "):
        Settings.from_environment({"VLLM_GLM_PATCH_SHAPE_POLCY": "off"})
    assert Settings.from_environment({"VLLM_GLM_PATCH_FENCE": "1", "VLLM_GLM_PATCH_FENCE_ALIGN": "512"}) == Settings()
    assert Settings.from_environment({"VLLM_GLM_PATCH_CACHE": "/somewhere"}) == Settings()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"shape_polcy": "off"}, "unknown key 'shape_polcy'; allowed keys: enabled, strict, disable, shape_policy"),
        ("guarded", "must be an object"),
        ({"disable": 3}, "must be patch ids"),
        ({"strict": "perhaps"}, "allowed values: 1, true"),
    ],
)
def test_a_wrong_configuration_is_named(config: object, told: str) -> None:
    with pytest.raises(UserError, match="glm_patch") as error:
        Settings().with_config({"glm_patch": config})
    assert told in str(error.value)
