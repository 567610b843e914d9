"""An exported model as a version in MLflow's registry."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.runs.run import Run
from pipeline.tracking.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUIREMENTS = ("onnx", "onnxruntime", "numpy")
MODEL = "model"  # MLflow's name of the artifact


class RegistryError(Exception):
    """The registry does not answer, or refuses the model."""


class ExportedModel(NamedTuple):
    """An ONNX file with one input and one output, an example of its input and output, and facts about it."""

    file: Path
    input_name: str
    output_name: str
    example: NDArray[np.uint8]  # (2, H, W, 3)
    answers: NDArray[np.float32]  # (2, K)
    facts: Mapping[str, object]


class RegisteredModel(NamedTuple):
    """A version in the registry, the address under which MLflow loads it, and the version that had its alias before."""

    name: str
    version: str
    uri: str
    before: str | None


def register(exported: ExportedModel, name: str, *, alias: str | None, run: Run, store: Store) -> RegisteredModel:
    """Add a version to the registered model `name`, with the run as its source if the server knows it.

    Raises: RegistryError, in one sentence.
    """
    try:
        with redirect_stderr(StringIO()), _own_environment():  # MLflow prints the versions that it creates
            return _register(exported, name, alias=alias, run=run, store=store)
    except Exception as error:  # a backend may raise anything
        reason = store.reason(error)
        text = f"register={name}: {store.printed_address} does not accept the model: {reason}"
        raise RegistryError(text) from error


@contextmanager
def _own_environment() -> Iterator[None]:
    """Give the environment its variables back, which MLflow's functions set for all processes to come."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            del os.environ[name]
        os.environ.update(before)


def _register(exported: ExportedModel, name: str, *, alias: str | None, run: Run, store: Store) -> RegisteredModel:
    import mlflow
    import mlflow.onnx
    import onnx
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    client, experiment_id = store.open()
    mlflow.set_tracking_uri(store.uri)
    mlflow.set_registry_uri(store.uri)
    mlflow.set_experiment(experiment_id=experiment_id)
    inputs = TensorSpec(exported.example.dtype, (-1, *exported.example.shape[1:]), exported.input_name)
    outputs = TensorSpec(exported.answers.dtype, (-1, *exported.answers.shape[1:]), exported.output_name)
    info = Model.log(
        artifact_path=None,
        name=MODEL,
        flavor=mlflow.onnx,
        registered_model_name=name,
        run_id=_known_run(client, run),
        metadata=dict(exported.facts),
        onnx_model=onnx.load_model(exported.file),
        signature=ModelSignature(inputs=Schema([inputs]), outputs=Schema([outputs])),
        input_example={exported.input_name: exported.example},
        pip_requirements=[f"{library}=={version(library)}" for library in REQUIREMENTS],
        onnx_execution_providers=["CPUExecutionProvider"],  # those of the package in REQUIREMENTS
        save_as_external_data=False,
    )
    number, before = str(info.registered_model_version), None
    if alias is not None:
        registry = mlflow.MlflowClient(store.uri, store.uri)  # `client` has the registry that was set before
        before = registry.get_registered_model(name).aliases.get(alias)
        registry.set_registered_model_alias(name, alias, number)
    return RegisteredModel(name, number, f"models:/{name}@{alias}" if alias else f"models:/{name}/{number}", before)


def _known_run(client: MlflowClient, run: Run) -> str | None:
    """Return the run's id if the server has it."""
    from mlflow.exceptions import MlflowException

    if not run.tracking_id:
        return None
    try:
        return str(client.get_run(run.tracking_id).info.run_id)
    except MlflowException:
        return None
