"""Ray sessions: which cluster is joined or started, and signals within one."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import ray

from tune_ego.cluster import end_interrupted, is_local, ray_session


def test_a_cluster_is_local_where_neither_option_nor_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_local(None) and not is_local("auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_local(None)


def test_a_session_within_another_joins_it_and_leaves_it_running(ray_cluster: None) -> None:
    before = ray.get_runtime_context().get_job_id()
    with ray_session():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized() and ray.get_runtime_context().get_job_id() == before


def test_a_session_s_settings_do_not_replace_the_user_s(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS")
    with ray_session():
        assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
        assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"


def test_sigterm_does_what_ctrl_c_does(ray_cluster: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[int] = []
    with ray_session():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        own = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's background process
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, own)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_session_in_another_thread_sets_no_handler(ray_cluster: None) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with ray_session():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_an_interrupted_command_says_how_to_resume_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        end_interrupted("tune-ego resume /x")
    assert caught.value.code == 130
    assert capsys.readouterr().out == "Interrupted. To resume from the last checkpoint, run: tune-ego resume /x\n"
