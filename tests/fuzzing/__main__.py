"""A coverage-guided fuzzer at everything that reads what comes from outside.

    PYTHONPATH=tests python -m fuzzing --seconds 60 [--only jsonl csv ...]

Each target runs in a process of its own under atheris (libFuzzer), for the seconds given, with at most four gigabytes
and ten seconds an input. What was found stays in build/fuzz/TARGET: the corpus, and an input for each crash, which
`python -m fuzzing --input FILE --only TARGET` repeats. Exits 1 if anything was found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path("build/fuzz")


def fuzz(name: str, seconds: int) -> int:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["repmatch"]):
        from fuzzing import targets
    target, seeds = targets.TARGETS[name]
    folder = ROOT / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds()):
        (corpus / f"seed{i}").write_bytes(seed)
    limits = ["-rss_limit_mb=4096", "-timeout=10", "-max_len=65536", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup(
        ["fuzz", str(corpus), f"-artifact_prefix={folder}/", f"-max_total_time={seconds}", *limits],
        lambda data: targets.run(target, data),
    )
    atheris.Fuzz()
    return 0


def main() -> int:
    """Fuzz each target asked for and print what was found."""
    from fuzzing import targets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--only", nargs="+", default=[*targets.TARGETS], choices=[*targets.TARGETS], metavar="TARGET")
    parser.add_argument("--input", type=Path, help="give this file to the target in place of fuzzing it")
    options = parser.parse_args()
    if options.input is not None:
        for name in options.only:
            targets.run(targets.TARGETS[name][0], options.input.read_bytes())
        return 0
    wrong = 0
    for name in options.only:
        done = subprocess.run(
            [sys.executable, "-m", "fuzzing.one", name, str(options.seconds)],
            capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        coverage = re.findall(r"cov: (\d+)", done.stderr)
        print(f"{name}: {runs[-1] if runs else '?'} inputs, coverage {coverage[-1] if coverage else '?'}", end="")  # noqa: T201
        found = sorted(str(p) for kind in ("crash", "timeout", "oom") for p in (ROOT / name).glob(f"{kind}-*"))
        if done.returncode or found:
            wrong += 1
            print(f", found {found or 'nothing, and died'}\n{done.stderr[-3000:]}")  # noqa: T201
        else:
            print(", nothing found", flush=True)  # noqa: T201
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
