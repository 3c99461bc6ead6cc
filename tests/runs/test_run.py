"""The run folder: whole files, one writer, honest errors."""

import fcntl
import json
import os
import re
import subprocess
import sys

import pytest

from shenhong.errors import RunError
from shenhong.runs.events import read_events
from shenhong.runs.files import atomic_folder, atomic_write
from shenhong.runs.run import Run
from shenhong.serve.page.runs import summary
from shenhong.stages.describe import describe


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    atomic_write(tmp_path / "a", "old")
    # A limit on file size makes the kernel itself refuse the write, as a full disk does.
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from pathlib import Path
from shenhong.errors import RunError
from shenhong.runs.files import atomic_write
try:
    atomic_write(Path({str(tmp_path / "a")!r}), b"x" * 5000)
except RunError as error:
    print(error); sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "cannot write" in done.stdout and "--run" in done.stdout
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("2")
        raise ZeroDivisionError
    assert (tmp_path / "f" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    synced, before_rename = set(), set()
    fsync, replace = os.fsync, os.replace

    def note(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(*paths):
        before_rename.update(synced)
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("1")
        (folder / "in").mkdir()
        (folder / "in" / "y").write_text("2")
    wanted = {str(folder / name) for name in (".", "x", "in", "in/y")}
    assert before_rename == wanted
    assert str(tmp_path) in synced


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    path = tmp_path / "run"
    code = f"""
import sys, time
from pathlib import Path
from shenhong.runs.run import Run
run = Run(Path({str(path)!r}), create=True); run.save()
print("open", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
        Run(path)
    holder.kill()
    holder.wait()
    with Run(path) as run:
        assert run.manifest["format"] == 1


def test_foreign_damaged_and_newer_folders_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run folder"):
        Run(tmp_path / "mine", create=True)
    with pytest.raises(RunError, match="not a run folder"):
        Run(tmp_path / "absent")
    with Run(tmp_path / "run", create=True) as run:
        run.save()
    manifest = tmp_path / "run" / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good[: len(good) // 2])
    with pytest.raises(RunError, match="damaged"):
        Run(tmp_path / "run")
    manifest.write_text(json.dumps({**json.loads(good), "format": 99}))
    with pytest.raises(RunError, match="format 99"):
        Run(tmp_path / "run")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_events_survive_a_kill_inside_a_line(tmp_path):
    with Run(tmp_path / "run", create=True) as run:
        run.save()
        run.event("train", step=1, loss=3.0)
        run.event("train", step=2, loss=2.0)
    file = tmp_path / "run" / "events.jsonl"
    file.write_bytes(file.read_bytes() + b'{"kind": "tra')
    assert len(read_events(tmp_path / "run")) == 2
    with Run(tmp_path / "run") as run:
        run.event("train", step=2, loss=1.5)  # the step was run again after the kill
    events = read_events(tmp_path / "run")
    assert [e["loss"] for e in events] == [3.0, 1.5]
    assert file.read_bytes().endswith(b"\n")


def test_events_that_are_not_ours_are_passed_over(tmp_path):
    with Run(tmp_path / "run", create=True) as run:
        run.save()
        run.event("train", step=1, loss=3.0)
    file = tmp_path / "run" / "events.jsonl"
    others = ["5", "null", "[]", '"step"', "{}", '{"step": 1}', '{"kind": [], "step": 1}']
    others += ['{"kind": "train", "step": {}}', "[" * 100_000]
    file.write_bytes(file.read_bytes() + "\n".join([*others, '{"kind": "train"}', ""]).encode())
    assert [e["kind"] for e in read_events(tmp_path / "run")] == ["train", "train"]
    assert "training nats per token" not in describe(tmp_path / "run")
    assert summary(tmp_path / "run")["state"] == "stopped"


def test_a_file_is_written_into_a_new_folder(tmp_path):
    atomic_write(tmp_path / "new" / "folder" / "x", "text")
    assert (tmp_path / "new" / "folder" / "x").read_text() == "text"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        atomic_write(tmp_path / "file" / "x", "text")


def test_stages_add_up_their_time_and_freeze_measures_once(tmp_path):
    with Run(tmp_path / "run", create=True) as run:
        with pytest.raises(KeyboardInterrupt), run.stage("train"):
            raise KeyboardInterrupt
        assert not run.done("train")
        with run.stage("train") as outputs:
            outputs["x"] = 1
        assert run.freeze("steps", lambda: 10) == 10
    with Run(tmp_path / "run") as run:
        assert run.done("train")
        assert run.manifest["stages"]["train"]["outputs"] == {"x": 1}
        assert run.freeze("steps", lambda: 20) == 10


@pytest.mark.parametrize(
    "place", [".lock", "events.jsonl", "checkpoints", "steps", "steps/a/checkpoints", ".x.tmp"]
)
def test_no_link_inside_a_run_folder_is_followed(tmp_path, place):
    """What it leads to is neither overwritten, cut nor swept; it is refused by name."""
    path, outside = tmp_path / "run", tmp_path / "outside"
    with Run(path, create=True) as run:
        run.save()
        run.event("stage")
    outside.mkdir()
    (outside / ".mine.tmp").write_text("half a line")
    target = outside if place.endswith(("s", "tmp")) else outside / ".mine.tmp"
    (path / place).parent.mkdir(parents=True, exist_ok=True)
    (path / place).unlink(missing_ok=True)
    (path / place).symlink_to(target)
    with pytest.raises(RunError, match=rf"{re.escape(str(path / place))} is a link"):
        Run(path)
    assert (outside / ".mine.tmp").read_text() == "half a line"


def test_a_file_with_a_second_name_elsewhere_is_not_written_to(tmp_path):
    for name in (".lock", "events.jsonl"):
        with Run(tmp_path / name, create=True) as run:
            run.save()
        (tmp_path / f"mine{name}").write_text("half a line")
        (tmp_path / name / name).unlink(missing_ok=True)
        os.link(tmp_path / f"mine{name}", tmp_path / name / name)
        with pytest.raises(RunError, match=f"{name} .*second name"):
            Run(tmp_path / name)
        assert (tmp_path / f"mine{name}").read_text() == "half a line"


def test_a_pipe_in_a_run_folder_hangs_nobody(tmp_path):
    with Run(tmp_path / "run", create=True) as run:
        run.save()
    os.mkfifo(tmp_path / "run" / "events.jsonl")
    assert read_events(tmp_path / "run") == []
    with pytest.raises(RunError, match=r"events\.jsonl is no regular file"):
        Run(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "run" / "manifest.json")
    with pytest.raises(RunError, match="damaged"):
        Run(tmp_path / "run", write=False)


def test_links_that_come_while_a_run_goes_on_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    with Run(tmp_path / "run", create=True) as run:
        run.save()
        (run.path / "events.jsonl").symlink_to(outside / "file")
        with pytest.raises(RunError, match=r"events\.jsonl is a link"):
            run.event("stage")
        (run.path / f".manifest.json.{os.getpid()}.tmp").symlink_to(outside / "file")
        run.save()  # under a file of its own
        (run.path / "checkpoints").symlink_to(outside)
        step = run.path / "checkpoints" / "step-000001"
        with pytest.raises(RunError, match="checkpoints is a link"), atomic_folder(step):
            pass
        with pytest.raises(RunError, match="checkpoints is a link"):
            atomic_write(run.path / "checkpoints" / "x", "text")
    assert os.listdir(outside) == ["file"] and (outside / "file").read_text() == "mine"


def test_a_run_folder_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with Run(tmp_path / "runs" / "a", create=True) as run:
        run.save()
        with atomic_folder(run.path / "checkpoints" / "step-000001") as folder:
            (folder / "x").write_text("1")
    with Run(tmp_path / "runs" / "a"):
        assert (tmp_path / "disk" / "a" / "checkpoints" / "step-000001" / "x").exists()


def test_a_lock_that_was_replaced_meanwhile_is_not_held_twice(tmp_path, monkeypatch):
    """Whoever locks a file that no longer has the name would write beside the one who locks the new file."""
    with Run(tmp_path / "run", create=True) as run:
        run.save()
    lock, real = tmp_path / "run" / ".lock", fcntl.flock

    def replaced(descriptor, how):
        real(descriptor, how)
        lock.unlink()
        lock.write_text("7")

    monkeypatch.setattr(fcntl, "flock", replaced)
    with pytest.raises(RunError, match="in use"):
        Run(tmp_path / "run")


def test_half_an_event_is_cut_however_long_it_is(tmp_path):
    with Run(tmp_path / "run", create=True) as run:
        run.save()
        run.event("train", step=1)
    file = tmp_path / "run" / "events.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b"x" * 200_000)
    with Run(tmp_path / "run"):
        assert file.read_bytes() == whole
    file.write_bytes(b"x" * 200_000)
    with Run(tmp_path / "run"):
        assert file.read_bytes() == b""
