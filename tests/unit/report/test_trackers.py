from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raytune_llm.config.tracking import NoTracking, TensorBoard
from raytune_llm.config.tracking import Tracker as Service
from raytune_llm.errors import ResourceError
from raytune_llm.report.trackers import TRACKERS, TrackedRun, Tracker, open_tracker

SERVICES = ("wandb", "mlflow", "swanlab", "trackio")


def run_at(folder, from_step=0):
    return TrackedRun("demo", folder, from_step, {"train": {"seed": 1}})


def service(name, group=None):
    return Service(name=name, project="p", run=None, group=group)


@pytest.fixture
def without_services(monkeypatch):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr(importlib, "import_module", missing)


@pytest.fixture
def wandb_client(monkeypatch):
    """Stands in for the package wandb and notes what it is told."""
    told = {"starts": [], "logs": [], "finished": 0}

    def init(**settings):
        told["starts"].append(settings)

        def finish():
            told["finished"] += 1

        return SimpleNamespace(
            id=settings["id"] or "new-id", log=lambda numbers, step: told["logs"].append((step, numbers)), finish=finish
        )

    monkeypatch.setattr(importlib, "import_module", lambda module: SimpleNamespace(init=init))
    return told


def test_a_tracker_gets_the_numbers_of_a_record_by_their_step():
    seen = []
    tracker = Tracker(send=lambda numbers, step: seen.append((step, numbers)), close=lambda: None)
    tracker({"step": 3, "epoch": 0.5, "loss": 2, "note": "text"})
    assert seen == [(3, {"epoch": 0.5, "loss": 2})]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    for from_step, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        tracker = open_tracker(TensorBoard(name="tensorboard"), run_at(tmp_path, from_step))
        for step in steps:
            tracker({"step": step, "loss": 10.0 * step + from_step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 10), (2, 20), (3, 32), (4, 42), (5, 52)]


def test_no_tracking_takes_records_and_keeps_nothing(tmp_path):
    tracker = open_tracker(NoTracking(name="none"), run_at(tmp_path))
    tracker({"step": 1, "loss": 1.0})
    tracker.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(without_services, tmp_path, name):
    with pytest.raises(ResourceError, match=rf"tracking={name} .*`pip install {name}`"):
        open_tracker(service(name), run_at(tmp_path))


def test_a_resumed_run_goes_on_in_the_run_that_the_service_knows(wandb_client, tmp_path):
    for from_step in (0, 5):
        tracker = open_tracker(service("wandb"), run_at(tmp_path, from_step))
        tracker({"step": from_step + 1, "loss": 1.0})
        tracker.close()
    assert [start["id"] for start in wandb_client["starts"]] == [None, "new-id"]
    assert wandb_client["logs"] == [(1, {"loss": 1.0}), (6, {"loss": 1.0})]
    assert wandb_client["finished"] == 2


def test_a_new_run_in_an_old_folder_is_new_to_the_service_too(wandb_client, tmp_path):
    for _ in range(2):
        open_tracker(service("wandb"), run_at(tmp_path))
    assert [start["id"] for start in wandb_client["starts"]] == [None, None]


def test_an_id_of_another_service_is_not_taken(wandb_client, tmp_path):
    (tmp_path / "tracking.json").write_text(json.dumps({"name": "swanlab", "project": "p", "id": "theirs"}))
    open_tracker(service("wandb"), run_at(tmp_path, from_step=5))
    assert wandb_client["starts"][0]["id"] is None


def test_every_place_of_the_config_has_its_function():
    assert set(TRACKERS) == {"none", "tensorboard", *SERVICES}


def test_runs_that_belong_together_are_one_group(wandb_client, tmp_path):
    open_tracker(service("wandb", group="sweep"), run_at(tmp_path)).close()
    open_tracker(service("wandb"), run_at(tmp_path)).close()
    assert [start.get("group") for start in wandb_client["starts"]] == ["sweep", None]


def test_trials_have_a_name_of_their_own_in_the_group_of_their_sweep():
    assert service("trackio").of_trial("sweep", "001_lr=1") == service("trackio", group="sweep")
    named = Service(name="trackio", project="p", run="mine", group="ours").of_trial("sweep", "001_lr=1")
    assert (named.run, named.group) == ("mine_001_lr=1", "ours")


def test_mlflow_has_several_runs_at_a_time_in_a_process_and_resumes_each_where_it_is(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folders = [tmp_path / "a", tmp_path / "b"]
    for from_step in (0, 1):
        trackers = []
        for folder in folders:
            folder.mkdir(exist_ok=True)
            trackers.append(open_tracker(service("mlflow", group="sweep"), run_at(folder, from_step)))
        for number, tracker in enumerate(trackers):
            tracker({"step": from_step + 1, "loss": 10.0 * number + from_step})
        for tracker in trackers:
            tracker.close()
    for number, folder in enumerate(folders):
        client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        [found] = client.search_runs([client.get_experiment_by_name("p").experiment_id])
        history = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "loss")]
        assert history == [(1, 10.0 * number), (2, 10.0 * number + 1)]
        assert (found.info.status, found.info.run_name, found.data.tags["group"]) == ("FINISHED", "demo", "sweep")
        assert found.data.params == {"train.seed": "1"}


def test_wandb_has_several_runs_at_a_time_in_a_process(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    trackers = [open_tracker(service("wandb", group="sweep"), run_at(tmp_path / name)) for name in ("a", "b")]
    for tracker in trackers:
        tracker({"step": 1, "loss": 1.0})
        tracker.close()
    assert len({(tmp_path / name / "tracking.json").read_text() for name in ("a", "b")}) == 2


def test_trackio_has_several_runs_at_a_time_in_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackers = [open_tracker(service("trackio", group="sweep"), TrackedRun(name, tmp_path, 0, {})) for name in ("a", "b")]
    for number, tracker in enumerate(trackers):
        tracker({"step": 1, "loss": float(number)})
    for tracker in trackers:
        tracker.close()
    runs = {run.name: run for run in trackio.Api().runs("p")}
    assert runs.keys() == {"a", "b"}
