"""Runs that several tests look at, each made once, so that one server lives at a time."""

from __future__ import annotations

import importlib.util

import pytest
from runs import Rooms, Served, installed_package

from tools.server import write_tiny_model


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Rooms:
    if importlib.util.find_spec("vllm") is None or not installed_package().is_dir():
        pytest.skip("needs vLLM for the CPU and the installed wheel; `make environment` sets both up in .venv")
    model = tmp_path_factory.mktemp("model") / "glm"
    write_tiny_model(model, model.parent / "model.log")
    return Rooms(model, lambda name: tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def unpatched(rooms: Rooms) -> Served:
    return rooms.serve("unpatched", environment={"VLLM_GLM_PATCH": "0"})


@pytest.fixture(scope="session")
def captured(rooms: Rooms) -> Served:
    """Uninitialised memory holds huge numbers here (glibc fills it with 0x7f), so that a pass does not rest on zeros in it."""
    return rooms.serve("captured", environment={"VLLM_GLM_PATCH_SHAPE_POLICY": "captured", "MALLOC_PERTURB_": "128"})


@pytest.fixture(scope="session")
def guarded(rooms: Rooms) -> Served:
    return rooms.serve("guarded", environment={"VLLM_GLM_PATCH_SHAPE_POLICY": "guarded"})
