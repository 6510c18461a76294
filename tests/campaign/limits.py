"""What the machine refuses: room on the disk, the right to write, memory; and a clock that jumps."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from campaign.checks import sound, which, whole_after
from campaign.child import Child, Fate
from campaign.damage import CATALOG, Base
from campaign.operations import KINDS, Author, dump, states
from campaign.state import State, read_state
from campaign.tally import NotRun, Outcome, Wrong
from repmatch import store as stores

NOBODY = 65534
WRITERS = tuple(kind for kind in KINDS if kind != "repair")  # on a sound store it writes nothing
_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) { const char *s = getenv("CLOCK_SHIFT"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int out = real(id, t);
  if (!out && id == CLOCK_REALTIME) t->tv_sec += shift();
  return out;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000; return 0;
}
time_t time(time_t *out) {
  struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec; return now.tv_sec;
}
"""


def copy_of(base: Base, path: Path, rng: random.Random) -> tuple[Author, State]:
    """Copy a base store; return an author that goes on from it, and what the store holds."""
    shutil.copytree(base.path, path)
    author = base.writer(rng)
    return author, author.state.copy()


def full_disk(folder: Path, rng: random.Random, bases: Sequence[Base]) -> Outcome:
    """Fill a small file system by writing until it refuses; make room; go on."""
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(small)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise NotRun("no right to mount a small file system")
    try:
        path = small / "s"
        author, start = copy_of(rng.choice(bases), path, rng)
        (small / "exports").mkdir()
        used = sum(512 * p.stat().st_blocks for p in path.rglob("*")) + (1 << 16)
        room = rng.choice([1 << 12, 1 << 16, 1 << 18, 1 << 19, 1 << 20]) + rng.randrange(1 << 16)
        subprocess.run(["mount", "-o", f"remount,size={used + room}", str(small)], check=True)
        author.batch = 400
        script = [author._step("ingest" if i % 3 == 0 else rng.choice(WRITERS)) for i in range(5)]
        script += [author._step("compact"), author._step("ingest")]
        child = Child.start(path, script, folder / "said", Fate())
        child.join()
        refusal = child.refusal()
        if refusal and not (refusal.startswith("!") and ("full" in refusal or "No space" in refusal)):
            raise Wrong("crash", refusal)
        expected = states(script, start)
        with stores.open(path, mode="r") as store:
            at = which(read_state(store, path.with_name("exports")), expected, child.done(), "on the full disk")
            sound(store, "on the full disk")
        subprocess.run(["mount", "-o", "remount,size=1g", str(small)], check=True)
        whole_after(path, script, expected, at)
        return Outcome(struck=bool(refusal), detected=bool(refusal), note="" if refusal else "there was room enough")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def read_only(folder: Path, rng: random.Random, bases: Sequence[Base]) -> Outcome:
    """Let a writer without rights at a store of which one file or folder is read-only; give the rights back; go on."""
    if os.getuid():
        raise NotRun("only root can become somebody else")
    path = folder / "s"
    author, start = copy_of(rng.choice(bases), path, rng)
    (folder / "exports").mkdir()
    everything = [folder, *folder.rglob("*")]
    for entry in everything:
        os.chown(entry, NOBODY, NOBODY)
    for parent in [folder, *folder.parents]:
        if not parent.stat().st_mode & 0o001:
            raise NotRun("the trial's folder cannot be reached by another user")
    victims = [path, path / "segments", path / "adapters", path / CATALOG, path / "store.lock", folder / "exports"]
    victims += [*path.glob("segments/*"), path / "staging"]
    victim = rng.choice(victims)
    mode = victim.stat().st_mode
    victim.chmod(0o555 if victim.is_dir() else 0o444)
    script = [author._step(kind) for kind in rng.sample(WRITERS, 3)]
    expected = states(script, start)
    child = Child.start(path, script, folder / "said", Fate(user=NOBODY))
    child.join()
    refusal = child.refusal()
    if refusal.startswith("?"):
        raise Wrong("crash", f"{victim.name}: {refusal}")
    with stores.open(path, mode="r") as store:
        at = which(read_state(store, folder / "exports"), expected, child.done(), f"{victim.name} read-only")
        sound(store, f"{victim.name} read-only")
    if victim.exists():  # a compaction may have removed it
        victim.chmod(mode)
    whole_after(path, script, expected, at)
    kind = victim.name if victim.suffix not in (".bin", ".journal") else victim.suffix
    return Outcome(
        struck=bool(refusal), detected=bool(refusal), note=kind if victim != folder / "exports" else "target"
    )


def no_memory(folder: Path, rng: random.Random, bases: Sequence[Base]) -> Outcome:
    """Take memory away from a writer: it ends, by an error or by the system, and nothing is half done."""
    path = folder / "s"
    author, start = copy_of(rng.choice(bases), path, rng)
    author.batch = 500  # an ingest commits every 512 rows, and a step is to be all or nothing
    script = [author._step("ingest") for _ in range(3)]
    script += [*(author._step(rng.choice(KINDS)) for _ in range(2)), author._step("ingest")]
    expected = states(script, start)
    child = Child.start(path, script, folder / "said", Fate(memory=rng.randrange(1 << 20, 700 << 20)))
    hung = not child.join(60)
    refusal = child.refusal()
    if refusal.startswith("?") and "emory" not in refusal and "thread" not in refusal and "alloc" not in refusal:
        raise Wrong("crash", refusal)
    if hung:
        raise Wrong("crash", "the writer hung when memory ran out")
    struck = child.process.exitcode != 0 or bool(refusal)
    at = found(path, expected, child.done())
    whole_after(path, script, expected, at)
    what = refusal.split(" ")[0].strip("!?") or (f"exit {child.process.exitcode}" if struck else "memory enough")
    return Outcome(struck, detected=struck, note=what)


def found(path: Path, expected: Sequence[State], acked: int) -> int:
    """Return the state that a store is in after a fault."""
    with stores.open(path, mode="r") as store:
        return which(read_state(store, path.with_name("exports")), expected, acked, "a reader")


def shim(folder: Path) -> Path:
    """Build a library that moves the wall clock by CLOCK_SHIFT seconds."""
    source, built = folder / "clock.c", folder / "clock.so"
    source.write_text(_SHIM)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotRun("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"], check=True)
    return built


def clock(folder: Path, rng: random.Random, bases: Sequence[Base]) -> Outcome:
    """Write with a clock that stands years, hours or seconds in the past or future, and jumps between writers."""
    path = folder / "s"
    author, start = copy_of(rng.choice(bases), path, rng)
    (folder / "exports").mkdir()
    script = [author._step(rng.choice(KINDS)) for _ in range(4)]
    expected = states(script, start)
    library, done = shim(folder), 0
    for part in (script[:2], script[2:]):
        shift = rng.choice([-1, 1]) * rng.choice([5, 3600, 86400, 400 * 86400, 20 * 365 * 86400])
        program = (
            "import sys; from campaign.child import play, Fate\n"
            "play(sys.argv[1], sys.argv[2], sys.stdin.read(), sys.argv[3], Fate())"
        )
        env = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_SHIFT": str(shift)}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        said = folder / f"said-{done}"
        subprocess.run(
            [sys.executable, "-c", program, str(path), str(folder / "exports"), str(said)],
            input=dump(part), text=True, env=env, check=True, timeout=300,
        )  # fmt: skip
        lines = said.read_text().splitlines()
        if lines[-1][0] in "!?":
            raise Wrong("crash", lines[-1])
        done += sum(line[0].isdigit() for line in lines)
    for file in rng.sample([p for p in path.rglob("*") if p.is_file()], 3):
        os.utime(file, (rng.randrange(2**31),) * 2)
    whole_after(path, script, expected, done)
    return Outcome(note="backwards and forwards")
