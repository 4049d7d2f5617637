"""Writing that survives kills, full disks and neighbours; reading of archives that lie."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile

import numpy as np
import pytest

from flmoe_fast import files
from flmoe_fast.files import LOCK, BusyError, StorageError, read_arrays, replacing, writing_to

#: Run in a process of its own, in which no file can grow beyond a megabyte.
LIMITED = """
    import resource, signal, sys
    import numpy as np, torch
    from flmoe_fast.files import replacing
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    path, kind = sys.argv[1:]
    big = np.zeros(2**18)
    with replacing(path) as file:
        if kind == "torch":
            torch.save(torch.from_numpy(big), file)
        elif kind == "numpy":
            np.savez(file, big=big)
        else:
            file.write(big.tobytes())
"""


@pytest.mark.parametrize("kind", ("torch", "numpy", "bytes"))
def test_a_full_disk_names_the_file_and_leaves_the_old_one(kind, tmp_path):
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LIMITED), path, kind], capture_output=True, text=True)
    assert done.returncode == 1 and "StorageError" in done.stderr.splitlines()[-1], done.stderr
    assert f"{path} was not written: the file is too large" in done.stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EIO))
def test_what_the_system_says_when_it_syncs(number, tmp_path, monkeypatch):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def broken(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(StorageError, match=r"kept\.txt was not written") as caught, replacing(path, "w") as file:
        file.write("new")
    assert caught.value.errno == number and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_errors_of_the_block_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        open(tmp_path / "none" / "b")
    with pytest.raises(KeyError), replacing(tmp_path / "a"):
        raise KeyError
    with pytest.raises(StorageError, match="none/a was not written"), replacing(tmp_path / "none" / "a"):
        pass


def test_bytes_are_synced_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(handle):
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        real["fsync"](handle)

    def replace(part, path):
        done.append(("name", str(part)))
        real["replace"](part, path)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    with replacing(tmp_path / "a.txt", "w") as file:
        file.write("new")
    part = done[1][1]
    assert done == [("sync", part), ("name", part), ("sync", str(tmp_path))]


HOLDER = """
    import sys, time
    from flmoe_fast.files import writing_to
    with writing_to(sys.argv[1], "flmoe-fast train", shared=len(sys.argv) > 2):
        print("held", flush=True)
        time.sleep(60)
"""


def holder(folder, *shared):
    arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), *shared]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_writer_who_says_who_it_is(tmp_path):
    process = holder(tmp_path)
    try:
        for shared in (False, True):
            with pytest.raises(BusyError, match=f"flmoe-fast train, process {process.pid} on"):
                with writing_to(tmp_path, "me", shared=shared):
                    pass
    finally:
        process.kill()
        process.wait()
    with writing_to(tmp_path, "me"):  # the lock went with the process
        assert (tmp_path / LOCK).read_text().startswith("me, process")
    process = holder(tmp_path, "shared")
    try:
        with writing_to(tmp_path, "me", shared=True):
            pass
        with pytest.raises(BusyError), writing_to(tmp_path, "me"):
            pass
    finally:
        process.kill()
        process.wait()


def test_of_several_processes_one_writes(tmp_path):
    told, children = [], []
    for number in range(4):
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with writing_to(tmp_path, f"writer {number}"):
                    os.write(there, b"held")
                    signal.pause()
            except BusyError as busy:
                os.write(there, str(busy).encode())
            finally:
                os._exit(0)
        children.append(child)
        told.append(here)
    try:
        said = [os.read(handle, 1000).decode() for handle in told]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert said.count("held") == 1
    assert all(f"{tmp_path} is being written by " in text for text in said if text != "held")
    with writing_to(tmp_path, "me"):
        pass


def test_a_removed_lock_is_seen(tmp_path, monkeypatch):
    """Negative control: two write at once."""
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        with writing_to(tmp_path, "one"), pytest.raises(BusyError), writing_to(tmp_path, "two"):
            pass


def test_a_lost_sync_of_the_folder_is_seen(tmp_path, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(files, "_sync_folder", lambda folder: None)
    with pytest.raises(AssertionError):
        test_bytes_are_synced_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch)


@pytest.mark.parametrize("shared", (False, True))
def test_who_is_alone_removes_what_killed_ones_left(shared, tmp_path):
    (tmp_path / "samples").mkdir()
    left = [tmp_path / ".a.json.0123.part", tmp_path / "samples" / ".b.npz.4567.part"]
    process = holder(tmp_path, "shared")
    for path in (*left, tmp_path / "a.part"):  # the last is somebody's own
        path.write_bytes(b"half")
    try:
        with writing_to(tmp_path, "me", shared=True):
            assert all(path.exists() for path in left)  # it may be the other's
    finally:
        process.kill()
        process.wait()
    with writing_to(tmp_path, "me", shared=shared):
        assert sorted(path.name for path in tmp_path.rglob("*.part")) == ["a.part"]


def test_those_who_share_a_folder_do_not_refuse_each_other(tmp_path, monkeypatch):
    """One who only looks whether it is alone holds the folder for a moment; another waits for that."""
    with open(tmp_path / LOCK, "a+") as file:
        files.fcntl.flock(file, files.fcntl.LOCK_EX)
        threading.Timer(0.3, files.fcntl.flock, (file, files.fcntl.LOCK_SH)).start()
        with writing_to(tmp_path, "me", shared=True):
            pass
        monkeypatch.setattr(files, "PATIENCE", 0.0)
        files.fcntl.flock(file, files.fcntl.LOCK_EX)
        with pytest.raises(BusyError), writing_to(tmp_path, "me", shared=True):
            pass


def test_a_full_disk_names_the_lock(tmp_path, monkeypatch):
    def full(handle, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(StorageError, match=r"\.lock was not written: the disk is full"), writing_to(tmp_path, "me"):
        pass


def test_archives_that_lie(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(3), b=np.array("text"))
    assert read_arrays(path)["a"].tolist() == [0, 1, 2]
    with zipfile.ZipFile(path) as archive:
        member = archive.read("a.npy")
    for name, parts, says in (
        ("twice", [("a.npy", member), ("a.npy", member)], "two arrays of the same name"),
        ("header", [("a.npy", member.replace(b"(3,)", b"(3,\n"))], "."),
        ("size", [("a.npy", member.replace(b"(3,), ", b"(2**60,)"))], "."),
        ("huge", [("a.npy", member.replace(b"(3,), }       ", b"(999999999,), }"))], "."),
        ("other", [("a.bin", b"text")], "a part that is no array"),
        ("object", [("a.npy", member.replace(b"<i8", b"|O8"))], "."),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for part, content in parts:
                archive.writestr(part, content)
        with pytest.raises(ValueError, match=says):
            read_arrays(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.npy", "w") as file:
            for _ in range(9):
                file.write(bytes(2**20))
    monkeypatch.setattr(files, "LARGEST_ARCHIVE", 2**23)
    with pytest.raises(ValueError, match="more than 8388608"):
        read_arrays(tmp_path / "bomb")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none")
