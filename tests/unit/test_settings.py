"""Settings: what is read from where, and that a wrong value says what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_glm_patch.catalog import patch_ids
from vllm_glm_patch.errors import UserError
from vllm_glm_patch.settings import MOE_BACKENDS, SHAPE_POLICIES, Settings, names

settings_objects = st.builds(
    Settings,
    enabled=st.booleans(),
    strict=st.booleans(),
    disable=st.lists(st.sampled_from(patch_ids()), unique=True).map(tuple),
    shape_policy=st.sampled_from(SHAPE_POLICIES),
    compile_full_step=st.booleans(),
    moe_backend=st.sampled_from(MOE_BACKENDS),
    tuned_dir=st.text("abc/~_. ", max_size=20).map(str.strip),
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


def test_the_users_tables_lie_where_they_are_told_to_or_in_the_users_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert str(Settings().tables()) == "/home/somebody/.config/vllm-glm-patch/tuned"
    assert str(Settings(tuned_dir="~/tuned").tables()) == "/home/somebody/tuned"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/xdg")
    assert str(Settings().tables()) == "/etc/xdg/vllm-glm-patch/tuned"
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert Settings().tables() is None


@pytest.mark.parametrize(("name", "value"), [("moe_backend", "cutlass"), ("tuned_dir", 5)])
def test_a_wrong_backend_or_folder_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name!r} is {value!r}"):
        Settings().with_config({"glm_patch": {name: value}})
