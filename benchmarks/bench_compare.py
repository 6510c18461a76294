"""Time `repmatch compare` on two LoRA checkpoints of a 7-billion-parameter model's size, made of random numbers.

python benchmarks/bench_compare.py --rank 16
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import describe, run
from safetensors.numpy import save_file

WIDE, FORWARD, LAYERS = 4096, 11008, 32
SHAPES = {  # (d_out, d_in) of a LLaMA layer's seven projections
    "self_attn.q_proj": (WIDE, WIDE),
    "self_attn.k_proj": (WIDE, WIDE),
    "self_attn.v_proj": (WIDE, WIDE),
    "self_attn.o_proj": (WIDE, WIDE),
    "mlp.gate_proj": (FORWARD, WIDE),
    "mlp.up_proj": (FORWARD, WIDE),
    "mlp.down_proj": (WIDE, FORWARD),
}


def checkpoint(folder: Path, rank: int, seed: int) -> Path:
    """Write a peft checkpoint of random numbers."""
    folder.mkdir()
    draw, held = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for name, (d_out, d_in) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            held[f"{key}.lora_A.weight"] = draw.standard_normal((rank, d_in), np.float32).astype(np.float16)
            held[f"{key}.lora_B.weight"] = draw.standard_normal((d_out, rank), np.float32).astype(np.float16)
    save_file(held, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in SHAPES})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Make two checkpoints and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        paths = [checkpoint(Path(folder) / name, options.rank, seed) for seed, name in enumerate(("a", "b"))]
        size = sum(f.stat().st_size for f in paths[0].iterdir())
        ran = run([sys.executable, "-m", "repmatch", "compare", *map(str, paths), "--json"])
    print(describe())
    print(
        f"{LAYERS * len(SHAPES)} matrices, rank {options.rank}, {size / 1e6:.0f} MB a file: {ran.seconds:.1f} s, "
        f"{ran.cpu:.1f} processor seconds, peak {ran.peak_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
