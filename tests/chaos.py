"""Random faults around a small search: `python -m tests.chaos [--minutes 10] [--seed 0]`.

A search of three trials is run once undisturbed. Then it is run again and again, while signals, suspensions, second
drivers, killed processes, full disks, read-only file systems and damaged records strike it at random moments, and it
is resumed after each end. After each end the exit code and the last line have to be those of docs/outputs.md, and no
process, session folder or lock may be left. Each search that ends has to have the trials and the metrics of the
undisturbed one. Prints how often each fault struck; the exit code is 1 if a check failed.

Full disks and read-only file systems need root, for a file system of its own. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.drivers import reset_ignored_signals

SPACE = """
base:
  model: {width: 0.05, stam_depth: 1}
  data: {crop: 64}
  train: {iterations: 150, batch_size: 4, validate_every: 25, log_every: 5}
  compute: {cpus_per_worker: 0.5}
space: {optimizer.lr: {loguniform: [1e-4, 1e-2]}}
samples: 3
scheduler: {name: fifo}
"""
TIMES = {"clips_per_second", "validation_seconds", "gpu_bytes", "feed_wait", "report_seconds"}
RESUME = "To resume from the last checkpoint, run: tune-ego resume "
STRIKES_WITHIN = (1.0, 30.0)
"""Seconds after the start of a command within which a fault strikes."""
ENDS_WITHIN = 90.0
CLEAN_WITHIN = 20.0
CLEAN_AFTER_KILL_WITHIN = 180.0
"""Ray's agents end by themselves after their driver was killed: 30 s later, on a busy machine over 60 s."""


class Wrong(Exception):
    """A check that failed."""


class Chaos:
    """The folder, the undisturbed results and the random numbers of a session."""

    def __init__(self, folder: Path, *, own_disk: bool) -> None:
        self.folder, self.own_disk = folder, own_disk
        self.random = random.Random(0)
        self.storage = folder / "disk"
        self.environment = {**os.environ, "RAY_TMPDIR": str(folder / "r"), "PYTHONUNBUFFERED": "1"}
        self.root = self.storage
        """Folder of the search that runs."""
        self.counts: Counter[str] = Counter()
        self.may_end_with: set[int] = set()
        """Exit codes that the running command may end with, beside 0 and those of the last fault."""
        self.reference: dict[str, dict[int, dict[str, Any]]] = {}

    # The commands

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tune_ego", *arguments]

    def start(self, name: str) -> subprocess.Popen[str]:
        root = self.storage / name
        if (root / "experiment.json").exists():
            arguments = ["resume", str(root)]
        else:
            shutil.rmtree(root, ignore_errors=True)
            arguments = ["tune", str(self.folder / "space.yaml"), "--data", str(self.folder / "shards")]
            arguments += ["--storage", str(self.storage), "--name", name]
        with open(self.folder / "output.txt", "w") as output:
            return subprocess.Popen(
                self.command(*arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=self.environment,
                cwd=self.folder,
            )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, env=self.environment, check=False, timeout=200
        )

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    # The faults. Each strikes a running driver, and returns the exit codes that it may end with; none: it goes on.

    def signal(self, driver: subprocess.Popen[str]) -> set[int]:
        number = self.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        driver.send_signal(number)
        return {130}

    def signal_to_group(self, driver: subprocess.Popen[str]) -> set[int]:
        os.killpg(driver.pid, self.random.choice([signal.SIGTERM, signal.SIGHUP]))
        return {130}

    def two_signals(self, driver: subprocess.Popen[str]) -> set[int]:
        driver.send_signal(signal.SIGTERM)
        time.sleep(self.random.uniform(0.1, 3))
        driver.send_signal(signal.SIGINT)
        return {130}

    def kill(self, driver: subprocess.Popen[str]) -> set[int]:
        driver.kill()
        return {-9}

    def kill_ray(self, driver: subprocess.Popen[str]) -> set[int]:
        victim = self.random.choice(["raylet", "gcs_server"])
        victims = [pid for pid, line in self.processes() if f"/{victim} " in line]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return {2} if victims else set()

    def kill_worker(self, driver: subprocess.Popen[str]) -> set[int]:
        workers = [pid for pid, line in self.processes() if "RayTrainWorker" in line]
        if workers:
            os.kill(self.random.choice(workers), signal.SIGKILL)
        return set()

    def suspend(self, driver: subprocess.Popen[str]) -> set[int]:
        driver.send_signal(signal.SIGSTOP)
        try:
            time.sleep(self.random.uniform(1, 5))
            self.second_driver(driver)
        finally:
            driver.send_signal(signal.SIGCONT)
        return set()

    def second_driver(self, driver: subprocess.Popen[str]) -> set[int]:
        root = self.root
        try:
            record = json.loads((root / "driver.json").read_text())
        except (OSError, ValueError):
            record = {}
        # Not one that a killed driver has left: the second driver could be there before the first.
        if record.get("pid") == driver.pid and (root / "experiment.json").exists():
            second = self.run("resume", str(root))
            if second.returncode != 2 and (root / "driver.json").exists():
                raise Wrong(f"a second driver ended with {second.returncode}: {second.stdout[-500:]}{second.stderr}")
            if "drives this search or run" not in second.stderr and driver.poll() is None:
                raise Wrong(f"a second driver said: {second.stderr}")
        return set()

    def refused_at_start(self, driver: subprocess.Popen[str]) -> set[int]:
        """The exit code of a driver that cannot make the folder its own because of the storage."""
        return set() if (self.root / "driver.json").exists() or driver.poll() is not None else {2}

    def fill_disk(self, driver: subprocess.Popen[str]) -> set[int]:
        self.may_end_with |= self.refused_at_start(driver)
        file = self.storage / "fill"
        subprocess.run(["dd", "if=/dev/zero", f"of={file}", "bs=64k"], capture_output=True, check=False)
        time.sleep(self.random.uniform(2, 20))
        file.unlink()
        return set()

    def read_only(self, driver: subprocess.Popen[str]) -> set[int]:
        self.may_end_with |= self.refused_at_start(driver)
        for _ in range(20):  # it is busy while a file is open for writing
            if (
                subprocess.run(["mount", "-o", "remount,ro", self.storage], capture_output=True, check=False).returncode
                == 0
            ):
                break
            time.sleep(0.1)
        time.sleep(self.random.uniform(2, 20))
        subprocess.run(["mount", "-o", "remount,rw", self.storage], check=True)
        return set()

    def damage(self, root: Path) -> str:
        """Damage a record of a search that is not driven; "" if it has none yet. A trial's damage must not spread."""
        choices = [*root.glob("runs/*/metrics.jsonl"), *root.glob("runs/*/decisions.json")]
        choices += [*root.glob("runs/*/iteration-*/checkpoint.pt"), *root.glob("runs/*/iteration-*/checkpoint.json")]
        state = json.loads((root / "trials.json").read_text()) if (root / "trials.json").exists() else {}
        # A trial that has ended keeps damage for good: it is named and left out, which is not what is compared here.
        choices = [
            file for file in choices if state.get(file.relative_to(root).parts[1], {}).get("state") != "finished"
        ]
        choices += [root / "driver.json"]
        file = self.random.choice(sorted(choices))
        content = file.read_bytes() if file.exists() else b""
        cut = content[: self.random.randrange(len(content))] if content else b"{"
        file.write_bytes(self.random.choice([cut, cut + b"\x00\xff", b""]))
        return file.name

    # The checks

    def processes(self) -> list[tuple[int, str]]:
        """Processes of the Ray clusters in this session's folder."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                environment = (place / "environ").read_bytes()
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            ours = f"RAY_TMPDIR={self.folder}/r".encode() in environment
            if ours and state != "Z" and "tune_ego" not in line and int(place.name) != os.getpid():
                found.append((int(place.name), line))
        return found

    def check_end(self, driver: subprocess.Popen[str], root: Path, codes: set[int], fault: str) -> None:
        code = driver.wait()
        done = self.finished(root)
        last = self.output().strip().splitlines()[-1] if self.output().strip() else ""
        if code == 0:
            if not done:
                raise Wrong(f"{fault}: ended with 0 and the search is not over")
        elif code not in codes:
            raise Wrong(f"{fault}: ended with {code}, not {codes}: {self.output()[-1500:]}")
        if code == 130 and not (RESUME in last or last == "tune-ego: interrupted"):
            raise Wrong(f"{fault}: its last line is {last!r}")
        refused = bool(self.may_end_with) and "driver.json: cannot be written" in last
        if code == 2 and RESUME not in last and "Ray" not in last and not refused:
            raise Wrong(f"{fault}: its last line is {last!r}")
        if "Traceback" in self.output():
            raise Wrong(f"{fault}: a traceback: {self.output()[-3000:]}")
        end = time.monotonic() + (CLEAN_AFTER_KILL_WITHIN if code == -9 else CLEAN_WITHIN)
        while left := self.processes():
            if time.monotonic() > end:
                raise Wrong(f"{fault}: processes are left: {left}")
            time.sleep(0.5)
        locks = [name for name in ("driver.json", "stop") if (root / name).exists()]
        if code != -9 and locks:
            raise Wrong(f"{fault}: {locks} are left")
        # Three are kept after failures, beside that of a killed driver.
        folders = list((self.folder / "r" / "ray").glob("session_2*/tune_ego.json"))
        if len(folders) > 4:
            raise Wrong(f"{fault}: session folders are left: {folders}")

    def finished(self, root: Path) -> bool:
        try:
            records = json.loads((root / "trials.json").read_text())
        except (OSError, ValueError):
            return False
        return len(records) == 3 and all(record["state"] == "finished" for record in records.values())

    def lines(self, root: Path) -> dict[str, dict[int, dict[str, Any]]]:
        """Trial -> iteration -> metrics without those of clocks."""
        return {
            run.name: {
                line["iteration"]: {key: value for key, value in line.items() if key not in TIMES}
                for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            }
            for run in sorted((root / "runs").iterdir())
        }

    def check_results(self, root: Path) -> None:
        """Compare with the undisturbed search: each line that is there, and the last one of each trial."""
        found = self.lines(root)
        if found.keys() != self.reference.keys():
            raise Wrong(f"other trials: {sorted(found)}")
        for trial, lines in found.items():
            if max(lines) != max(self.reference[trial]):
                raise Wrong(f"{trial} ends at {max(lines)}")
            for iteration, line in lines.items():
                if self.reference[trial].get(iteration) != line:
                    raise Wrong(f"{trial}: {line} is not {self.reference[trial].get(iteration)}")
        shown = self.run("status", str(root))
        if shown.returncode or "finished" not in shown.stdout:
            raise Wrong(f"status: {shown.stdout}{shown.stderr}")

    # The session

    def prepare(self) -> None:
        (self.folder / "space.yaml").write_text(SPACE)
        for arguments in (
            ["synthesize", "egtea", "--clips", "60", "--size", "96x72", "--verbs", "2", "--nouns", "2"],
            ["prepare", "egtea", "shards", "--image-size", "96x72"],
        ):
            subprocess.run(
                self.command(*arguments), env=self.environment, cwd=self.folder, check=True, capture_output=True
            )
        driver = self.start("undisturbed")
        if driver.wait():
            raise Wrong(f"the undisturbed search: {self.output()}")
        self.check_end(driver, self.storage / "undisturbed", set(), "none")
        self.reference = self.lines(self.storage / "undisturbed")
        shutil.rmtree(self.storage / "undisturbed")

    def session(self, seed: int, minutes: float) -> None:
        """Run searches one after another, the last of which begins before the minutes have passed."""
        self.random = random.Random(seed)
        self.counts.clear()
        end = time.monotonic() + 60 * minutes
        searches = 0
        try:
            while time.monotonic() < end:
                self.round(f"{seed}-{searches}")
                searches += 1
        finally:
            print(f"seed {seed}: {searches} searches ended; {dict(sorted(self.counts.items()))}", flush=True)

    def round(self, name: str) -> None:
        """Run one search to its end, with faults."""
        faults: list[Callable[[subprocess.Popen[str]], set[int]]] = [
            *(self.signal, self.signal_to_group, self.two_signals, self.kill, self.kill_ray, self.kill_worker),
            *(self.suspend, self.second_driver),
            *([self.fill_disk, self.read_only] if self.own_disk else []),
        ]
        root = self.root = self.storage / name
        while not self.finished(root):
            if root.exists() and self.random.random() < 0.3:
                self.counts[f"damaged {self.damage(root)}"] += 1
            driver = self.start(root.name)
            codes: set[int] = set()
            self.may_end_with = set()
            while not codes and driver.poll() is None:
                try:
                    driver.wait(self.random.uniform(*STRIKES_WITHIN))
                except subprocess.TimeoutExpired:
                    fault = self.random.choice(faults)
                    codes = fault(driver)
                    self.counts[fault.__name__] += 1
                    print(f"  search {name}: {fault.__name__}", flush=True)
            try:
                driver.wait(ENDS_WITHIN)
            except subprocess.TimeoutExpired as error:
                raise Wrong(f"it hangs after {fault.__name__}: {self.output()[-1500:]}") from error
            finally:
                if driver.poll() is None:
                    os.killpg(driver.pid, signal.SIGKILL)
            self.check_end(driver, root, codes | self.may_end_with, fault.__name__ if codes else "none")
        self.check_results(root)
        shutil.rmtree(root)


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Make a file system of 96 MB in a folder; yields whether there is one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    own = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield own
    finally:
        if own:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for each seed")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds, one after another")
    options = parser.parse_args()
    reset_ignored_signals()
    wrong = []
    with tempfile.TemporaryDirectory(prefix="te") as name, disk(Path(name) / "disk") as own_disk:
        (Path(name) / "r").mkdir()
        chaos = Chaos(Path(name), own_disk=own_disk)
        chaos.prepare()
        for seed in options.seed:
            try:
                chaos.session(seed, options.minutes)
            except Wrong as error:
                print(f"WRONG, seed {seed}: {error}", flush=True)
                wrong.append(seed)
    if wrong:
        raise SystemExit(f"wrong: seeds {wrong}")


if __name__ == "__main__":
    main()
